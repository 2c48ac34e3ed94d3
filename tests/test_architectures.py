"""Every architecture with every loss: trained on a tiny model, saved, taken up again, evaluated. The table is the parametrisation."""

import json
import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from e2e_sae_nb import RunConfig, evaluate, load_run, train
from e2e_sae_nb.architectures import ARCHITECTURES
from e2e_sae_nb.checkpoint import latest_checkpoint
from e2e_sae_nb.core import UserError, read_json, write_json
from e2e_sae_nb.finetuning import finetune, finetune_config
from e2e_sae_nb.losses import run_original
from e2e_sae_nb.models import subject_from_model, tiny_model, tiny_subject
from e2e_sae_nb.sae import TAKE_K
from e2e_sae_nb.sparse_step import sparse_forward
from e2e_sae_nb.state import begin, resume, save
from e2e_sae_nb.training import train_step

PLACE, LATER = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"
LOSSES = {
    "local": {"out_to_in": {"coeff": 1.0}},
    "e2e": {"logits_kl": {"coeff": 1.0}},
    "e2e+ds": {"logits_kl": {"coeff": 0.5}, "in_to_orig": {"hook_positions": [LATER], "total_coeff": 1.0}},
    "mixed": {"logits_kl": {"coeff": 0.5}, "out_to_orig": {"coeff": 0.5}},
}


@pytest.fixture(scope="module")
def subject():
    return tiny_subject("gpt2")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "tokens.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [rng.randrange(37) for _ in range(8)]}) for _ in range(2000)))
    return path


def config(architecture, kind, tokens, folder=None, **changes):
    k = {"k": 4, "dead_after": 400} if "topk" in architecture or architecture == "matryoshka" else {}
    return RunConfig.from_dict({
        "tlens_model_name": "tiny", "lr": 3e-3, "batch_size": 4, "n_samples": 240, "seed": 1, "save_dir": folder, "eval_n_samples": 40,
        "loss": {"sparsity": {"coeff": 0.0 if k else 0.05}, **LOSSES[kind]}, "log_every_n_grad_steps": 1,
        "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 16, "architecture": architecture, **k},
        "train_data": {"dataset_name": str(tokens), "n_ctx": 8, "tokenizer_name": None, "is_tokenized": True, "seed": 0, "column_name": "input_ids"}} | changes)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "annealed"])
def test_trains(architecture, loss, subject, tokens, tmp_path):
    annealed, architecture = architecture == "annealed", "relu" if architecture == "annealed" else architecture
    c = config(architecture, loss, tokens, tmp_path)
    if annealed:
        c = replace(c, loss=replace(c.loss, sparsity=replace(c.loss.sparsity, p_end=0.5)))
    run = train(c, subject=subject)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    key = next(k for k in lines[0] if k.startswith("loss/") and k.split("/")[1] in ("out_to_in", "logits_kl"))
    course = [line[key] for line in lines if key in line]
    assert sum(course[-10:]) < 0.9 * sum(course[:10]), course
    active = [line[f"l0/{PLACE}"] for line in lines if f"l0/{PLACE}" in line]
    assert architecture in TAKE_K or active[-1] < active[0], active
    again = load_run(run.path)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    assert type(again.saes[PLACE]) is ARCHITECTURES[architecture]
    assert torch.equal(again.saes[PLACE](x).output, run.saes[PLACE](x).output)
    assert evaluate(again, subject=subject).kl == pytest.approx(run.summary["kl"], rel=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "jumprelu", "gated"])
def test_resumes_to_the_bit(architecture, subject, tokens, tmp_path):
    "Counters, thresholds and drawn prefixes are part of the checkpoint."
    whole, cut = (begin(config(architecture, "e2e", tokens, tmp_path / name), subject) for name in ("whole", "cut"))
    for _ in range(12):
        train_step(whole)
    for _ in range(5):
        train_step(cut)
    save(cut)
    cut = resume(cut.folder, subject)
    for _ in range(7):
        train_step(cut)
    for (name, p), (_, q) in zip(whole.saes[PLACE].state_dict().items(), cut.saes[PLACE].state_dict().items(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sparse_and_dense_ways_agree(architecture, tokens, monkeypatch):
    "In float64, after ten steps; the sparse way is taken however dense the code."
    monkeypatch.setattr("e2e_sae_nb.state.sparse_forward", partial(sparse_forward, limit=1.0))
    subject = subject_from_model(tiny_model("gpt2").double(), name="tiny")
    runs = [begin(config(architecture, "e2e", tokens, sparse_step=sparse), subject) for sparse in (True, False)]
    for t in runs:
        for _ in range(10):
            train_step(t)
    for (name, p), (_, q) in zip(*(t.saes[PLACE].state_dict().items() for t in runs), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-9), (name, (p - q).abs().max())  # rounding, grown by ten steps of Adam


def test_a_target_is_kept_through_a_resume(subject, tokens, tmp_path):
    loss = {"sparsity": {"coeff": 0.05, "target_l0": 20, "p_end": 0.7}, **LOSSES["e2e"]}
    t = begin(config("relu", "e2e", tokens, tmp_path, loss=loss), subject)
    for _ in range(5):
        train_step(t)
    save(t)
    again = resume(t.folder, subject)
    assert again.control == t.control and t.control.scale != 1.0 and t.control.p < 1.0


def test_a_checkpoint_of_another_kind_is_refused(subject, tokens, tmp_path):
    run = train(config("topk", "local", tokens, tmp_path, n_samples=8), subject=subject)
    path = latest_checkpoint(run.path) / "cfg.json"
    cfg = read_json(path)
    cfg["positions"][PLACE] |= {"architecture": "relu", "options": {}}
    del cfg["sha256"]["cfg.json"]  # otherwise that checksum tells first
    write_json(path, cfg)
    with pytest.raises(UserError, match="does not hold a relu SAE: nothing missing, silent too much"):
        load_run(run.path)
    cfg["positions"][PLACE]["architecture"] = "octopus"
    write_json(path, cfg)
    with pytest.raises(UserError, match="unknown architecture 'octopus'"):
        load_run(run.path)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
@pytest.mark.parametrize("sparse", [True, False])
def test_excluded_tokens_decide_nothing(architecture, sparse, subject, tokens, monkeypatch):
    "What an excluded first position holds changes neither gradients nor counters."
    monkeypatch.setattr("e2e_sae_nb.state.sparse_forward", partial(sparse_forward, limit=1.0))
    runs = [begin(config(architecture, "local", tokens, exclude_first_position=True, sparse_step=sparse), subject) for _ in range(2)]
    original = run_original
    def loud(*args):
        found = original(*args)
        found.activations = {name: x * torch.where(torch.arange(x.shape[1]) == 0, 40.0, 1.0)[:, None] for name, x in found.activations.items()}
        return found
    for t, way in zip(runs, (original, loud), strict=True):
        monkeypatch.setattr("e2e_sae_nb.training.run_original", way)
        for sae in t.saes.values():
            sae.silent[::3] = 1000  # dead, so that the auxiliary loss is at work
        for _ in range(4):
            train_step(t)
    for (name, p), (_, q) in zip(*(t.saes[PLACE].state_dict().items() for t in runs), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name
    assert torch.equal(*(t.dead.silent[PLACE] for t in runs)) and torch.equal(*(t.saes[PLACE].silent for t in runs))


def test_matryoshka_counts_one_way(subject, tokens):
    "The SAE's own count of silent tokens and the run's are the same."
    t = begin(config("matryoshka", "local", tokens), subject)
    for _ in range(12):
        train_step(t)
    assert torch.equal(t.saes[PLACE].silent, t.dead.silent[PLACE])


@pytest.mark.parametrize("architecture", ["relu", "annealed", "jumprelu", "gated"])
def test_a_fine_tune_begins_where_the_penalty_ended(architecture, subject, tokens, tmp_path):
    "A coefficient that followed a target or an exponent is taken over as it was at the end; L0 is held."
    p_end, architecture = (0.5 if architecture == "annealed" else None), "relu" if architecture == "annealed" else architecture
    loss = {"sparsity": {"coeff": 2.0, "target_l0": 12, "control": 0.05, "p_end": p_end}, **LOSSES["local"]}
    run = train(config(architecture, "local", tokens, tmp_path, loss=loss, n_samples=1200), subject=subject)
    cfg = read_json(latest_checkpoint(run.path) / "training.json")
    made = finetune_config(run, 120, 1e-3)
    assert made.loss.sparsity.coeff == pytest.approx(2.0 * cfg["control"]["scale"]) and made.loss.sparsity.p_norm == (p_end or 1.0)
    tuned = finetune(run, 120, 1e-3, subject=subject)
    before, after = (r.summary["positions"][PLACE]["l0"] for r in (run, tuned))
    assert after == pytest.approx(before, rel=0.25)
