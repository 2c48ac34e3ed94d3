"""The reference implementation's float64 figures (tests/golden): loss terms, clipped gradients of step 1, weights after n steps.

Tolerances as they come with the figures: loss terms within 1e-9 relative, gradients and weights within 1e-7 of their largest element;
the processed-weights case within 1e-6, since TransformerLens 4 folds weights slightly differently from the version 2 of the reference.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from e2e_sae_nb.config import from_dict
from e2e_sae_nb.losses import LossConfig, dense_forward, make_plan, objective, run_original
from e2e_sae_nb.metrics import VarianceExplained, compare_logits, l0
from e2e_sae_nb.models import load_subject
from e2e_sae_nb.sae import SAE
from e2e_sae_nb.sparse_step import SAEAdam, sparse_forward

HERE = Path(__file__).parent / "golden"
CASES = json.loads((HERE / "golden.json").read_text())
TENSORS = load_file(HERE / "golden.safetensors")
PLACE = "blocks.2.hook_resid_pre"
NAMES = {"W_enc": "encoder.0.weight", "b_enc": "encoder.0.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}


def stored(case: str, kind: str) -> dict[str, torch.Tensor]:
    values = {ours: TENSORS[f"{case}|{kind}|{PLACE.replace('.', '-')}.{theirs}"] for ours, theirs in NAMES.items()}
    return {name: value.T if value.ndim == 2 else value for name, value in values.items()}


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


WAYS = {"dense": (dense_forward, torch.optim.Adam), "sparse": (partial(sparse_forward, limit=1.0, in_place=True), SAEAdam)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_reference_steps(case, way):
    "By the definition, and by the sparse step with its own optimizer."
    forward, adam = WAYS[way]
    expected = CASES[case]
    processed = expected["processed_weights"]
    close, near = (1e-6, 1e-6) if processed else (1e-9, 1e-7)
    subject = load_subject(HERE / "tiny-gpt2", dtype="float64", processed_weights=processed, device="cpu")
    sae = SAE(32, 96, dtype=torch.float64)
    with torch.no_grad():
        for name, value in stored(case, "init").items():
            getattr(sae, name).copy_(value)
    loss = from_dict(LossConfig, expected["loss"])
    plan = make_plan(subject, [PLACE], loss)
    assert plan.local == expected["local"]
    optimizer = adam(sae.parameters(), lr=expected["optimizer"]["lr"])
    assert len(expected["history"]) == expected["optimizer"]["steps"] > 0
    for step, figures in enumerate(expected["history"]):
        original = run_original(subject, TENSORS["tokens"], plan)
        result = objective(subject, original, {PLACE: sae}, loss, plan, forward=forward)
        assert result.total.item() == pytest.approx(figures["loss"], rel=close)
        for term, value in result.terms.items():
            assert value.item() == pytest.approx(figures[f"loss/train/{term}"], rel=close), term
        reported = {key for key in figures if key.startswith("loss/train/") and "explained_variance" not in key}
        assert reported <= {f"loss/train/{term}" for term in result.terms}  # no term of the reference is missing
        assert l0(result.acts[PLACE].c).double().mean().item() == pytest.approx(figures[f"sparsity/train/L_0/{PLACE}"], rel=1e-12)
        optimizer.zero_grad()
        result.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), expected["optimizer"]["max_grad_norm"])
        assert norm.item() == pytest.approx(figures["grad_norm"], rel=close)
        if step == 0:
            for name, value in stored(case, "clipped_grad_step1").items():
                assert far(getattr(sae, name).grad, value) < near, name
        optimizer.step()
    for name, value in stored(case, "final").items():
        assert far(getattr(sae, name), value) < near, name


@pytest.mark.parametrize("case", [case for case in CASES if not CASES[case]["local"]])
def test_reference_metrics(case):
    "Output metrics of step 1; the reference's difference of cross-entropies has the opposite sign of our CE increase."
    figures = CASES[case]["history"][0]
    subject = load_subject(HERE / "tiny-gpt2", dtype="float64", processed_weights=CASES[case]["processed_weights"], device="cpu")
    sae = SAE(32, 96, dtype=torch.float64)
    with torch.no_grad():
        for name, value in stored(case, "init").items():
            getattr(sae, name).copy_(value)
        loss = from_dict(LossConfig, CASES[case]["loss"])
        plan, tokens = make_plan(subject, [PLACE], loss), TENSORS["tokens"]
        original = run_original(subject, tokens, plan)
        result = objective(subject, original, {PLACE: sae}, loss, plan)
        compared = compare_logits(subject.logits(original.hidden)[:, :-1], subject.logits(result.hidden)[:, :-1], tokens[:, 1:])
        whole = compare_logits(subject.logits(original.hidden), subject.logits(result.hidden), tokens)
    rel = 1e-6 if CASES[case]["processed_weights"] else 1e-9
    assert compared.ce_orig.mean().item() == pytest.approx(figures["performance/train/orig_model_ce_loss"], rel=rel)
    assert (compared.ce_new - compared.ce_orig).mean().item() == pytest.approx(-figures["performance/train/difference_ce_loss"], rel=rel)
    assert whole.tv.mean().item() == pytest.approx(figures["performance/train/orig_vs_sae_statistical_distance"], rel=rel)
    assert whole.top1_same.mean().item() == pytest.approx(figures["performance/train/orig_vs_sae_top1_consistency"], abs=1e-12)


@pytest.mark.parametrize("layer_normed, key", [(False, "explained_variance"), (True, "explained_variance_ln")])
def test_reference_explained_variance(layer_normed, key):
    "The reference's mean of per-token ratios; its out_to_in has input and output swapped, so we swap to meet it."
    sae = SAE(32, 96, dtype=torch.float64)
    with torch.no_grad():
        for name, value in stored("local", "init").items():
            getattr(sae, name).copy_(value)
        subject = load_subject(HERE / "tiny-gpt2", dtype="float64", device="cpu")
        loss = from_dict(LossConfig, CASES["local"]["loss"])
        plan = make_plan(subject, [PLACE], loss)
        acts = objective(subject, run_original(subject, TENSORS["tokens"], plan), {PLACE: sae}, loss, plan).acts[PLACE]
    swapped, proper = VarianceExplained(layer_normed), VarianceExplained(layer_normed)
    swapped.add(acts.input.flatten(0, 1), acts.output.flatten(0, 1))
    proper.add(acts.output.flatten(0, 1), acts.input.flatten(0, 1))
    assert swapped.per_token_mean == pytest.approx(CASES["local"]["history"][0][f"loss/train/out_to_in/{key}/{PLACE}"], rel=1e-9)
    if not layer_normed:
        assert proper.per_token_mean == pytest.approx(-2.13, abs=0.005)  # as stated with the figures
