"""Faults and hostile input: every one is refused or survived with a line that says what would be right, and nothing is lost or half-written."""

import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import save_file

import e2e_sae_nb.memory as memory_module
import e2e_sae_nb.training as training_module
from e2e_sae_nb import RunConfig, load_run, train
from e2e_sae_nb.checkpoint import checkpoints, latest_checkpoint, load_saes, load_state, load_tensors, locked, read_cfg, save_checkpoint
from e2e_sae_nb.config import read_yaml, to_dict
from e2e_sae_nb.core import UserError, read_json, write_json
from e2e_sae_nb.dashboard import Dashboard
from e2e_sae_nb.e2e_sae_files import load_e2e_sae
from e2e_sae_nb.models import tiny_model, tiny_subject
from e2e_sae_nb.runs import Run
from e2e_sae_nb.sae import SAE
from e2e_sae_nb.saelens import load_saelens
from e2e_sae_nb.state import begin, resume

PLACE = "blocks.1.hook_resid_pre"
CLI = [sys.executable, "-c", "from e2e_sae_nb.cli import main; main()"]


@pytest.fixture(scope="module")
def subject():
    return tiny_subject("gpt2")


@pytest.fixture
def config(tmp_path):
    rng = random.Random(0)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"input_ids": rng.choices(range(37), k=8)}) + "\n" for _ in range(300)))
    return RunConfig.from_dict({
        "tlens_model_name": "docstrings", "batch_size": 4, "lr": 1e-2, "n_samples": 48, "save_every_n_samples": 8, "save_dir": str(tmp_path / "out"),
        "wandb_run_name": "run", "eval_n_samples": 8, "log_every_n_grad_steps": 1, "device": "cpu",
        "train_data": {"dataset_name": str(tmp_path / "t.jsonl"), "is_tokenized": True, "n_ctx": 8, "held_out_share": 0.2},
        "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 4}, "loss": {"sparsity": {"coeff": 0.1}, "out_to_in": {"coeff": 1.0}}})


@pytest.fixture
def run(config, subject):
    return train(config, subject=subject)


def one_line(says: str, call, *args, **keys) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **keys)
    message = str(caught.value)
    assert says in message and "\n" not in message, message
    return message


def whole(folder):
    "Every checkpoint can be read in full, nothing is half-written, and the log has whole lines."
    found = checkpoints(folder)
    for path in found.values():
        assert all(torch.isfinite(p).all() for sae in load_saes(path).values() for p in sae.parameters())
        load_tensors(path, "training.safetensors", read_cfg(path))
        load_state(path, read_cfg(path))
    assert not [p for p in folder.rglob(".*") if p.name != ".lock"]  # which a lock leaves, empty
    assert all(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return list(found)


class Payload:
    "A pickle that makes a file when it is loaded."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# Files


@pytest.mark.parametrize("file", ["saes.safetensors", "training.safetensors", "training.json", "cfg.json"])
@pytest.mark.parametrize("change", ["cut", "flip", "empty", "gone", "foreign"])
def test_damaged_files_are_refused(file, change, run, subject):
    path = latest_checkpoint(run.path) / file
    data = bytearray(path.read_bytes())
    if change == "gone":
        path.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"cut": data[:middle], "flip": flipped, "empty": b"", "foreign": b"\x7fELF" + bytes(200)}[change])
    with pytest.raises(UserError, match="damaged|not valid|missing|not a checkpoint|no cfg.json") as caught:
        resume(run.path, subject)
    assert "\n" not in str(caught.value)


def test_pickles_never_run(run, tmp_path):
    "As weights of a checkpoint, even with the right checksums; as a .pt file of the reference, plain or zipped."
    path, proof = latest_checkpoint(run.path), tmp_path / "ran"
    (path / "saes.safetensors").write_bytes(pickle.dumps(Payload(proof)))
    one_line("damaged", load_run, run.path)
    cfg = read_json(path / "cfg.json")
    cfg["sha256"]["saes.safetensors"] = hashlib.sha256((path / "saes.safetensors").read_bytes()).hexdigest()
    cfg["sha256"].pop("cfg.json")
    write_json(path / "cfg.json", cfg)
    one_line("not a valid safetensors file", load_run, run.path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(proof)))
    torch.save({"blocks-1-hook_resid_pre.decoder.bias": Payload(proof)}, tmp_path / "zipped.pt")
    for name in ("plain.pt", "zipped.pt"):
        one_line("was not loaded", load_e2e_sae, tmp_path / name)
    assert not proof.exists()


@pytest.mark.parametrize("change, says", [
    (lambda cfg: [cfg], "format_version None"), (lambda cfg: cfg | {"format_version": "1"}, "format_version '1'"),
    (lambda cfg: cfg | {"format_version": True}, "format_version True"), (lambda cfg: cfg | {"format_version": 0}, "format_version 0"),
    (lambda cfg: cfg | {"format_version": 99}, "upgrade e2e_sae_nb"), (lambda cfg: cfg | {"positions": [1]}, "lacks the positions"),
    (lambda cfg: cfg | {"sha256": None}, "checksums"), (lambda cfg: cfg | {"samples": 7}, "was altered"),
    (lambda cfg: cfg | {"positions": {PLACE: 5}, "sha256": {k: v for k, v in cfg["sha256"].items() if k != "cfg.json"}}, "nothing usable")])
def test_altered_cfg(change, says, run):
    path = latest_checkpoint(run.path) / "cfg.json"
    write_json(path, change(read_json(path)))
    one_line(says, load_run, run.path)


@pytest.mark.parametrize("shapes", [{"W_enc": (8,)}, {"W_dec": (4, 8)}, {"b_enc": (3,)}, {"b_dec": (5, 1)}])
def test_foreign_shapes(shapes, tmp_path):
    "A checkpoint that is whole, but whose tensors do not fit together."
    sae, place = SAE(4, 8), tmp_path / "samples_1"
    save_checkpoint(place, {PLACE: sae}, {})
    tensors = {f"{PLACE}.{k}": torch.zeros(shapes.get(k, v.shape)) for k, v in sae.state_dict().items()}
    save_file(tensors, place / "saes.safetensors")
    cfg = read_json(place / "cfg.json")
    cfg["sha256"] = {"saes.safetensors": hashlib.sha256((place / "saes.safetensors").read_bytes()).hexdigest()}
    write_json(place / "cfg.json", cfg)
    one_line("should be", load_saes, place)


@pytest.mark.parametrize("cfg, tensors, says", [
    ({}, {"W_enc": (8, 4)}, "W_enc should hold real numbers, [4, 8]"), ({}, {"b_enc": (3,)}, "b_enc should hold real numbers, [8]"),
    ({}, {"W_dec": (4, 8)}, "W_dec should hold real numbers, [8, 4]"), ({}, {"W_dec": ()}, "should hold real numbers"), ({}, {"b_dec": (1, 4)}, "b_dec should hold real numbers, [4]"),
    ({"d_sae": "8"}, {}, "d_sae"), ([], {}, "cfg.json should map keys"), ({"metadata": "none"}, {}, "its metadata should map keys"),
    ({"metadata": {"hook_name": 5}}, {}, "names no hook"), ({"architecture": "topk"}, {}, "says how many latents are active"),
    ({"architecture": "topk", "k": 0}, {}, "from 1 to d_sae (8)"), ({"architecture": "topk", "k": True}, {}, "from 1 to d_sae (8)"),
    ({"architecture": "topk", "k": "all"}, {}, "from 1 to d_sae (8)"), ({"activation_fn": "topk", "activation_fn_kwargs": [3]}, {}, "says how many latents are active"),
    ({"architecture": ["standard"]}, {}, "cannot be read"), ({"finetuning_scaling_factor": True}, {"scaling_factor": (8,)}, "multiply the rows of W_dec")])
def test_foreign_saelens_files(cfg, tensors, says, tmp_path):
    "Folders in SAELens' format that are not what they should be."
    good = {"architecture": "standard", "d_in": 4, "d_sae": 8, "metadata": {"hook_name": PLACE}}
    shapes = {"W_enc": (4, 8), "b_enc": (8,), "W_dec": (8, 4), "b_dec": (4,)} | tensors
    if says.startswith(("b_enc", "W_enc")):  # shapes alone say it, too
        good = {"hook_name": PLACE}
    write_json(tmp_path / "cfg.json", good | cfg if isinstance(cfg, dict) else cfg)
    save_file({name: torch.full(shape, 0.5) for name, shape in shapes.items()}, tmp_path / "sae_weights.safetensors")
    assert str(tmp_path) in one_line(says, load_saelens, tmp_path)


def test_pretrained_file_for_another_place(tmp_path, config, subject):
    "A file none of whose positions the run has would change nothing, so it is refused."
    shapes = {"encoder.0.weight": (16, 16), "encoder.0.bias": (16,), "decoder.weight": (16, 16), "decoder.bias": (16,)}
    torch.save({f"blocks-0-hook_resid_pre.{name}": torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "samples_1.pt")
    other = replace(config, saes=replace(config.saes, pretrained_sae_paths=(str(tmp_path / "samples_1.pt"),), retrain_saes=True))
    one_line(f"holds SAEs at blocks.0.hook_resid_pre, but this run has its at {PLACE}", train, other, subject=subject)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("retrain", [False, True])
def test_one_pretrained_position_of_two(retrain, tmp_path, config, subject):
    "As the reference's test_load_single_pretrained_sae: weights are copied exactly, and only what is to be trained is."
    places = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    state = reference_state(places[:1], seed=1)
    torch.save(state, tmp_path / "samples_4.pt")
    t = begin(pretrained_config(config, places, [tmp_path / "samples_4.pt"], retrain), subject)
    loaded, fresh = (t.saes[place] for place in places)
    for name, value in (("encoder.0.weight", loaded.W_enc.T), ("encoder.0.bias", loaded.b_enc), ("decoder.weight", loaded.W_dec.T), ("decoder.bias", loaded.b_dec)):
        assert torch.equal(value, state[f"blocks-0-hook_resid_post.{name}"])
    assert all(p.requires_grad == retrain for p in loaded.parameters()) and all(p.requires_grad for p in fresh.parameters())
    assert {id(p) for p in t.optimizer.originals} == {id(p) for sae in ([loaded, fresh] if retrain else [fresh]) for p in sae.parameters()}


def test_several_pretrained_files(tmp_path, config, subject):
    "As the reference's test_load_multiple_pretrained_sae: the later file wins where both hold a position; only what neither holds is trained."
    places = tuple(f"blocks.{i}.hook_resid_post" for i in range(3))
    first, second = reference_state(places[:2], seed=1), reference_state(places[1:2], seed=2)
    for name, state in (("a", first), ("b", second)):
        torch.save(state, tmp_path / f"{name}.pt")
    t = begin(pretrained_config(config, places, [tmp_path / "a.pt", tmp_path / "b.pt"], False), subject)
    for place, state in zip(places, (first, second), strict=False):
        assert torch.equal(t.saes[place].W_enc.T, state[f"{place.replace('.', '-')}.encoder.0.weight"])
        assert torch.equal(t.saes[place].W_dec.T, state[f"{place.replace('.', '-')}.decoder.weight"])
    assert [any(p.requires_grad for p in t.saes[place].parameters()) for place in places] == [False, False, True]


def reference_state(places, seed):
    "What e2e_sae saves for SAEs at these places, with names in its order."
    g, shapes = torch.Generator().manual_seed(seed), {"encoder.0.weight": (64, 16), "encoder.0.bias": (64,), "decoder.weight": (16, 64), "decoder.bias": (16,)}
    return {f"{place.replace('.', '-')}.{name}": torch.randn(shape, generator=g) for place in places for name, shape in shapes.items()}


def pretrained_config(config, places, paths, retrain):
    return replace(config, saes=replace(config.saes, sae_positions=places, pretrained_sae_paths=tuple(map(str, paths)), retrain_saes=retrain))


def test_reference_file_of_another_width(tmp_path, config, subject):
    weights = {"encoder.0.weight": (32, 5), "encoder.0.bias": (32,), "decoder.weight": (5, 32), "decoder.bias": (5,)}
    torch.save({f"{PLACE.replace('.', '-')}.{name}": torch.zeros(shape) for name, shape in weights.items()}, tmp_path / "samples_1.pt")
    other = replace(config, saes=replace(config.saes, pretrained_sae_paths=(str(tmp_path / "samples_1.pt"),), retrain_saes=True))
    one_line("has width 5", train, other, subject=subject)
    assert not (tmp_path / "out").exists()


def test_resume_under_another_configuration(run, subject):
    path = run.path / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values["saes"]["dict_size_to_input_ratio"] = 8
    path.write_text(yaml.safe_dump(values))
    one_line("holds other SAEs", resume, run.path, subject)


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.system ['true']", "!!python/object/new:os.mkdir [x]", "a: &a [1, *a]", "[" * 2_000,
                                  "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)), "\x00", "a: [", "x: @"])
def test_hostile_yaml(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    begun = time.perf_counter()
    one_line("not valid YAML", read_yaml, tmp_path / "c.yaml")
    assert time.perf_counter() - begun < 20


# Data and names


@pytest.mark.parametrize("rows, says", [([], "is empty"), ([[1, 2, 3]], "too little"), ([[40] * 8] * 200, "token id 40"), ([[-1] * 8] * 200, "does not hold"),
                                        ([["a", "b"]] * 200, "does not hold")])
def test_hostile_data(rows, says, config, subject, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    one_line(says, train, config, subject=subject)
    assert not (tmp_path / "out").exists()


def test_a_bad_token_far_into_the_data(config, subject, tmp_path):
    "What was saved before it was met is kept."
    good = (tmp_path / "t.jsonl").read_text()
    (tmp_path / "t.jsonl").write_text(good + "".join(json.dumps({"input_ids": [90 + i % 9] * 8}) + "\n" for i in range(50)))
    data = replace(config.train_data, shuffle_buffer=0)
    one_line("vocabulary has", train, replace(config, train_data=data, n_samples=400, save_every_n_samples=80), subject=subject)
    assert whole(tmp_path / "out" / "run")


@pytest.mark.parametrize("name, says", [("blocks.1.hook_residpre", "did you mean 'blocks."), ("<script>", "no hook point"), ("blocks.99.hook_resid_pre", "no hook point")])
def test_wrong_hook_names(name, says, config, subject, tmp_path):
    one_line(says, train, replace(config, saes=replace(config.saes, sae_positions=(name,))), subject=subject)
    assert not (tmp_path / "out").exists()


# The machine


@contextlib.contextmanager
def mounted(folder, size: str):
    "A small file system of its own, where this process may make one."
    folder.mkdir()
    if os.name == "nt" or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(config, subject, tmp_path):
    "The run stops with one line; with room again it goes on to the result of a run that met no such thing."
    undisturbed = train(replace(config, save_dir=tmp_path / "other"), subject=subject)
    with mounted(tmp_path / "small", "96k") as small:
        says = one_line("No space left", train, replace(config, save_dir=small), subject=subject)
        assert "--resume" in says and whole(small / "run")
        subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
        again = train(resume_from=small / "run", subject=subject)
        assert whole(small / "run") == whole(undisturbed.path)
        assert (again.path / "metrics.jsonl").read_text() == (undisturbed.path / "metrics.jsonl").read_text()
        assert all(torch.equal(p, q) for p, q in zip(again.saes[PLACE].parameters(), undisturbed.saes[PLACE].parameters(), strict=True))


def test_read_only_folder(config, subject, run, tmp_path):
    with mounted(tmp_path / "fixed", "8m") as fixed:
        shutil.copytree(run.path, fixed / "run")
        subprocess.run(["mount", "-o", "remount,ro", fixed], check=True)
        one_line("Read-only file system", train, replace(config, save_dir=fixed), subject=subject)
        one_line("Read-only file system", train, resume_from=fixed / "run", subject=subject)
        assert load_run(fixed / "run").summary == run.summary  # reading goes on


@pytest.mark.parametrize("every", [1, 1000])
def test_exploding_loss(every, config, subject, tmp_path):
    "Whether the log sees it first or the next checkpoint: no checkpoint holds what is not a number."
    wild = replace(config, lr=1e30, n_samples=400, log_every_n_grad_steps=every, save_every_n_samples=4, lr_schedule="linear", warmup_samples=40)
    says = one_line("no longer finite", train, wild, subject=subject)
    assert "lower lr" in says and "max_grad_norm" in says
    assert all(n < 400 for n in whole(tmp_path / "out" / "run"))


def test_out_of_memory_names_a_batch_that_fits(config, subject, tmp_path, monkeypatch):
    before = training_module.objective

    def small_machine(subject, original, *rest):
        if len(original.activations[PLACE]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return before(subject, original, *rest)

    for module in (training_module, memory_module):
        monkeypatch.setattr(module, "objective", small_machine)
    says = one_line("a batch_size of 4 fits", train, replace(config, batch_size=16, n_samples=48), subject=subject)
    assert "effective_batch_size 16" in says
    for module in (training_module, memory_module):
        monkeypatch.setattr(module, "objective", lambda *_: (_ for _ in ()).throw(MemoryError()))
    one_line("not even a batch_size of 1", train, replace(config, wandb_run_name="other"), subject=subject)
    for module in (training_module, memory_module):
        monkeypatch.setattr(module, "objective", lambda *_: (_ for _ in ()).throw(RuntimeError("a mistake in the code")))
    with pytest.raises(RuntimeError, match="a mistake"):
        train(replace(config, wandb_run_name="third"), subject=subject)


def test_two_writers_of_one_folder(config, subject, run):
    "The lock is the system's: it holds against this process, too, and a killed process leaves none."
    code = f"import time; from e2e_sae_nb.checkpoint import locked\nwith locked({str(run.path)!r}): print('held', flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        one_line("being written to by another run", train, resume_from=run.path, subject=subject)
    finally:
        other.kill()
        other.wait()
    assert train(resume_from=run.path, subject=subject).summary["kl"] == run.summary["kl"]
    with locked(run.path):
        one_line("being written to by another run", train, resume_from=run.path, subject=subject)


def test_what_a_killed_run_leaves_is_cleared_up(config, subject, run):
    "Half a checkpoint, half a line, lines of samples that will be trained on again, and an only copy that had stepped aside."
    log = (run.path / "metrics.jsonl").read_text()
    last = latest_checkpoint(run.path)
    (last.parent / ".samples_52.1.tmp").mkdir()
    (run.path / ".summary.json.1.tmp").write_text("{")
    last.rename(last.with_name(f".{last.name}.1.old"))
    with open(run.path / "metrics.jsonl", "a") as f:
        f.write('{"samples": 48, "lo')
    (run.path / "summary.json").unlink()
    again = train(resume_from=run.path, subject=subject)
    assert (run.path / "metrics.jsonl").read_text() == log and whole(run.path)[-1] == 48 and again.summary["kl"] == run.summary["kl"]


def test_a_run_without_a_checkpoint_begins_anew_in_its_folder(config, subject, run):
    t = begin(replace(config, wandb_run_name="early"), subject)
    (t.folder / "metrics.jsonl").write_text('{"samples": 4, "loss": 1}\n{"sam')
    again = train(resume_from=t.folder, subject=subject)
    assert (again.path / "metrics.jsonl").read_text() == (run.path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop(number, status, config, subject, tmp_path):
    "Through the command line: saved, said how to continue, and ended with the customary status."
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    values = yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(to_dict(config)))))
    values |= {"tlens_model_name": None, "tlens_model_path": str(tmp_path / "model"), "n_samples": 200_000, "save_every_n_samples": None}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    process = subprocess.Popen([*CLI, "train", str(tmp_path / "c.yaml")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.time() + 240
    while not (tmp_path / "out" / "run" / "metrics.jsonl").exists() and process.poll() is None and time.time() < until:
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=240)
    assert process.returncode == status, told[-2000:]
    assert "Traceback" not in told and f"e2e-sae train --resume {tmp_path / 'out' / 'run'}" in told
    assert len(whole(tmp_path / "out" / "run")) == 1


# Text


NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u202e\u2028\x00&quot;\U0001f600'\"`${x}"


def test_text_on_pages_is_escaped(config):
    latent = {"latent": 1, "contexts": [], "up": [], "down": [], "ablation": None}
    page = Dashboard([{"title": NASTY, "subtitle": NASTY, "provenance": NASTY, "latents": [latent], "words": {1: NASTY}}])
    plain = Dashboard([{"title": "", "subtitle": "", "provenance": "", "latents": [latent], "words": {1: ""}}])
    for tag in ("<script", "</script", "<img", "onerror=alert(1)>"):
        assert page.to_html().lower().count(tag) == plain.to_html().lower().count(tag)
    assert json.loads(page.to_html().split('id="data" type="application/json">')[1].split("</script>")[0])[0]["title"] == NASTY
    shown = Run(None, replace(config, wandb_run_name=NASTY), {}, {"positions": {NASTY: {"l0": 1.0, "alive": 1}}})._repr_html_()
    assert "<script" not in shown and "<img" not in shown
