"""Against the real sae-bench and sae-probes: in their own environment (make test-full), and what they computed, stored (make test).

`python tests/test_suites.py PYTHON` renews data/results/suites.json with an interpreter that has both packages.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from e2e_sae_nb import load_subject, splice
from e2e_sae_nb.architectures import ARCHITECTURES, BatchTopK, TopK
from e2e_sae_nb.checkpoint import save_checkpoint
from e2e_sae_nb.core import Stopwatch, data_path, load_result, provenance, write_json
from e2e_sae_nb.data import open_stream
from e2e_sae_nb.documents import DataConfig
from e2e_sae_nb.evaluation import evaluate_saes
from e2e_sae_nb.metrics import compare_logits
from e2e_sae_nb.saelens import to_saelens
from e2e_sae_nb.splicing import original_pass
from e2e_sae_nb.suites import saebench_explained_variance

HERE = Path(__file__).resolve().parent
RESULT = HERE.parent / "data" / "results" / "suites.json"
PLACE, D = "blocks.3.hook_resid_pre", 192
CUT = 0.25  # below this a coordinate is left out, in units of the activations


def made(name):
    "An SAE by rule: the directions of an orthonormal basis and their opposites, so that codes are the coordinates, split by sign."
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64))[0].float()
    sae = ARCHITECTURES[name](D, 2 * D, **({"k": 60} if issubclass(ARCHITECTURES[name], TopK) else {})).eval()
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([basis, -basis]) * torch.linspace(0.5, 2, 2 * D)[:, None])  # the norms do not count
        sae.W_enc.copy_(torch.cat([basis, -basis]).T)
        sae.b_enc.fill_(-CUT if name in ("relu", "gated") else 0.0)
        sae.b_dec.zero_()
        if isinstance(sae, BatchTopK):
            sae.cut.fill_(CUT)
        if name == "gated":
            sae.r_mag.zero_()
            sae.b_mag.zero_()
        if name == "jumprelu":
            sae.log_threshold.fill_(torch.tensor(CUT).log())
    return sae


def prepare(folder: Path, tokens: torch.Tensor) -> None:
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    for name in ARCHITECTURES:
        save_checkpoint(folder / "saes" / name, {PLACE: made(name)}, {})
        cfg, weights = to_saelens(made(name), PLACE, model_name="docstrings", model_class_name="HookedTransformer")
        target = folder / "saelens" / name
        target.mkdir(parents=True)
        save_file(weights, target / "sae_weights.safetensors")
        write_json(target / "cfg.json", cfg)


def ask(python: str, folder: Path) -> dict:
    "What the real packages say; offline, so that they cannot fetch anything."
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([python, str(HERE / "peers" / "suites_side.py"), str(folder), str(data_path("docstrings-lm"))], capture_output=True, text=True, timeout=1200, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "theirs.json").read_text())


@torch.no_grad()
def here(tokens: torch.Tensor) -> dict[str, dict[str, float]]:
    "Our evaluation, and the numbers that theirs define otherwise."
    subject, found = load_subject("docstrings", device="cpu"), {}
    x = original_pass(subject, tokens, [PLACE], stop=True).activations[PLACE].flatten(0, 1)
    for name in ARCHITECTURES:
        sae = made(name)
        result = evaluate_saes(subject, {PLACE: sae}, [tokens])
        with splice(subject, {PLACE: sae}):
            spliced = subject(tokens)
        values = result.to_dict()
        found[name] = {key: values[key] for key in ("kl", "ce_orig", "ce_new", "ce_zero", "ce_recovered")} | values["positions"][PLACE] | {
            "kl_all_positions": compare_logits(subject(tokens), spliced, tokens).kl.mean().item(),
            "explained_variance_saebench": saebench_explained_variance(sae(x).output, x)}
    return found


SAME = {"kl_all_positions": "kl_div_with_sae", "ce_orig": "ce_loss_without_sae", "ce_new": "ce_loss_with_sae", "ce_zero": "ce_loss_with_ablation",
        "ce_recovered": "ce_loss_score", "l0": "l0", "explained_variance_per_token_mean": "explained_variance_legacy", "explained_variance_saebench": "explained_variance"}


def check(theirs: dict, ours: dict, tokens: torch.Tensor) -> float:
    "The largest relative difference between their numbers and ours; the adapter and SAELens' own object must agree too."
    assert set(theirs) == set(ours) == set(ARCHITECTURES)
    worst = 0.0
    for name, sides in theirs.items():
        core = sides["adapter"]["core"]
        pairs = [(core[their], ours[name][our]) for our, their in SAME.items()] + [(core["mse"] * tokens.numel() / D, ours[name]["mse"])]
        pairs += [(core[key], sides["sae_lens"]["core"][key]) for key in core]
        worst = max(worst, *(abs(a - b) / max(abs(b), 1e-6) for a, b in pairs))
        for a, b in zip(sides["adapter"].get("probes", []), sides["sae_lens"].get("probes", []), strict=True):
            assert a.pop("indices") == b.pop("indices") and a == pytest.approx(b, rel=1e-4)
            assert 0.3 < a["test_auc"] <= 1
    return worst


def test_stored_result():
    "What the real packages computed, against our evaluation of the same SAEs on the same tokens now."
    stored = load_result(RESULT)
    tokens = torch.tensor(stored["tokens"])
    now = here(tokens)
    assert check(stored["theirs"], now, tokens) < 1e-3
    assert 0.2 < now["relu"]["explained_variance"] < 0.999 and now["relu"]["kl"] > 1e-3  # neither trivial nor broken
    assert abs(now["relu"]["kl"] / now["relu"]["kl_all_positions"] - 1) > 1e-4  # so that the positions make a difference


@pytest.mark.full
def test_real_packages(tmp_path):
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    install = [python, "-m", "pip", "install", "-q", f"torch=={torch.__version__.partition('+')[0]}", "sae-bench==0.6.0", "sae-probes==0.4.2", "fastcore"]  # the last for our side
    done = subprocess.run(install, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr[-2000:]
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "torchvision"], check=True)  # PyPI's is built for CUDA's torch and fails beside this one
    tokens = torch.tensor(load_result(RESULT)["tokens"])
    prepare(tmp_path, tokens)
    assert check(ask(str(python), tmp_path)["theirs"], here(tokens), tokens) < 1e-3


if __name__ == "__main__":
    clock, subject = Stopwatch(), load_subject("docstrings", device="cpu")
    stream = open_stream(DataConfig("docstrings:networkx", n_ctx=64, seed=0), batch_size=8, tokenizer=subject.tokenizer, vocab_size=subject.vocab_size,
                         max_ctx=subject.n_ctx, role="eval", repeat=False)
    tokens = next(iter(stream))
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), tokens)
        found = ask(sys.argv[1], Path(name))
    ours = here(tokens)
    record = provenance({"place": PLACE, "cut": CUT, "architectures": list(ARCHITECTURES)}, tokens=tokens.numel(), seconds=float(clock),
                        command="python tests/test_suites.py suites/bin/python")
    write_json(RESULT, {"d_in": D, "tokens_total": tokens.numel(), **found, "ours": ours, "tokens": tokens.tolist(), "provenance": record})
    print(f"largest relative difference {check(found['theirs'], ours, tokens):.1e}")
