"""Pushing and pulling with the real huggingface_hub client on both sides of a server on this machine."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from e2e_sae_nb import RunConfig, UserError, load_run, train
from e2e_sae_nb.hub import pull, push
from e2e_sae_nb.model_card import write_folder

CLI = [sys.executable, "-c", "from e2e_sae_nb.cli import main; main()"]
PLACES = ["blocks.2.hook_resid_pre", "blocks.4.hook_resid_pre"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return train(RunConfig.from_dict({
        "tlens_model_name": "docstrings", "saes": {"sae_positions": PLACES, "dict_size_to_input_ratio": 2, "architecture": "batchtopk", "k": 8}, "lr": 1e-3,
        "batch_size": 8, "n_samples": 32, "loss": {"sparsity": {"coeff": 0.0}, "logits_kl": {"coeff": 1.0}}, "eval_n_samples": 8, "device": "cpu",
        "train_data": {"dataset_name": "docstrings:networkx", "n_ctx": 32}, "save_dir": str(folder), "wandb_run_name": "two"}))


@pytest.fixture(autouse=True)
def no_xet(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.delenv("HF_TOKEN", raising=False)


def environment(hub, tmp_path, **more):
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_round_trip(run, tmp_path):
    "Every file arrives as it was written, on a branch and on main, and a second push replaces the SAEs of the first."
    written = files(write_folder(run, "me/two", tmp_path / "written"))
    with HubServer() as hub:
        here = {"endpoint": hub.url, "token": TOKEN}
        address = push(run.path, "me/two", **here)
        got = pull("me/two", tmp_path / "got", **here)
        assert address == f"{hub.url}/me/two/commit/{hub.repos['me/two']['branches']['main']['sha']}"
        arrived = files(got.path)
        assert arrived.pop(".gitattributes") == b"" and arrived == written
        hub.repos["me/two"]["branches"]["main"]["files"] |= {"checkpoints/samples_99/saes.safetensors": b"old", "notes.txt": b"mine"}
        push(run, "me/two", **here)
        now = hub.repos["me/two"]["branches"]["main"]["files"]
        assert "checkpoints/samples_99/saes.safetensors" not in now and now["notes.txt"] == b"mine"
        cached = pull("me/two", **here)
        assert cached.config.saes.sae_positions == tuple(PLACES)
    for name, sae in run.saes.items():
        for key, value in sae.state_dict().items():
            assert got.saes[name].state_dict()[key].equal(value) and cached.saes[name].state_dict()[key].equal(value)


def test_dies_in_mid_upload(run, tmp_path, monkeypatch):
    "One line, no commit, and nothing left behind here."
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda s: None)  # the client waits between its attempts
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = files(run.path)
    with HubServer(die_after=1000) as hub:
        with pytest.raises(UserError, match="nothing was changed, so it can be repeated") as raised:
            push(run, "me/two", endpoint=hub.url, token=TOKEN)
        assert "\n" not in str(raised.value) and any(r.startswith("PUT") for r in hub.requests)
        assert list(hub.repos["me/two"]["branches"]["main"]["files"]) == [".gitattributes"] and not hub.large
    assert files(run.path) == before and not list(tmp_path.iterdir())


def test_dies_in_mid_download(run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda s: None)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with HubServer() as hub:
        push(run, "me/two", endpoint=hub.url, token=TOKEN)
        tree = hub.repos["me/two"]["branches"]["main"]["files"]
        tree["checkpoints/samples_32/saes.safetensors"] = tree["checkpoints/samples_32/saes.safetensors"][:-1] + b"!"
        with pytest.raises(UserError, match="what me/two holds is not a whole run: me/two/checkpoints.* is damaged"):
            pull("me/two", tmp_path / "got", endpoint=hub.url)
    with pytest.raises(UserError, match="downloading me/two at .* did not succeed"):
        pull("me/two", tmp_path / "got", endpoint=hub.url)  # the server is gone
    assert not (tmp_path / "got").exists() and not list(tmp_path.glob(".got*"))


@pytest.mark.parametrize("repo, says", [("me/two/three", "OWNER/NAME|repo_id|Repo id"), ("not there/x", "repo_id|Repo id")])
def test_names(run, repo, says):
    with HubServer() as hub, pytest.raises(UserError, match=says):
        push(run, repo, endpoint=hub.url, token=TOKEN)


def test_rights(run):
    with HubServer() as hub, pytest.raises(UserError, match="does not let this login write") as raised:
        push(run, "me/two", endpoint=hub.url, token="hf_other")
    assert not isinstance(raised.value, HfHubHTTPError)


def test_commands(run, tmp_path):
    "push and pull, a missing login, a dry run; and the card's snippet runs as it stands there."
    with HubServer() as hub:
        def cli(*words, **more):
            return subprocess.run([*CLI, *map(str, words)], capture_output=True, text=True, timeout=300, env=environment(hub, tmp_path, **more))

        done = cli("push", run.path, "me/two")
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "hf auth login" in done.stderr and not hub.requests
        done = cli("push", run.path, "me/two", "--dry-run", tmp_path / "dry")
        assert done.returncode == 0 and not hub.requests, done.stderr
        done = cli("push", run.path, "me/two", "--private", HF_TOKEN=TOKEN)
        assert done.returncode == 0 and hub.repos["me/two"]["private"], done.stderr[-2000:]
        done = cli("pull", "me/two", "--out", tmp_path / "got")
        assert done.returncode == 2 and "hf auth login" in done.stderr and len(done.stderr.strip().splitlines()) == 1
        done = cli("pull", "me/two", "--out", tmp_path / "got", HF_TOKEN=TOKEN)
        assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "got"), done.stderr[-2000:]
        card = (tmp_path / "got" / "README.md").read_text()
        assert card == (tmp_path / "dry" / "README.md").read_text()
        (code, saelens) = re.findall(r"```python\n(.*?)```", card, re.S)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment(hub, tmp_path, HF_TOKEN=TOKEN))
        assert done.returncode == 0 and done.stdout.startswith("tensor([["), done.stderr[-2000:]
        assert f'"saelens/{PLACES[0]}"' in saelens and (tmp_path / "got" / "saelens" / PLACES[0] / "cfg.json").is_file()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["library_name"] == "e2e_sae_nb" and "e2e" in header["tags"]
    assert f"| {run.summary['kl']:.4g} |" in card and run.summary["provenance"]["config_hash"] in card


def test_local_folder(run, tmp_path):
    made = write_folder(run, "me/two", tmp_path / "made")
    assert pull(made).path == made and pull(made, tmp_path / "copy").path == tmp_path / "copy"
    assert load_run(tmp_path / "copy").summary["kl"] == run.summary["kl"]
