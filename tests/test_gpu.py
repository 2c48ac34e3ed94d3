"""What only a CUDA device can show, and what has to hold there as on a CPU: kernels, steps, runs, memory, waits (make test-gpu).

Needs torch, transformers, numpy, triton, fastcore and pytest, and neither a network nor `datasets` nor transformer_lens.
With E2E_SAE_TEST_DEVICE=cpu the same cases run where there is no device: torch's twins stand in for the kernels, and the cases
marked `real` are skipped. Without a device and without that variable `pytest -m gpu` fails (see conftest.py).
"""

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from e2e_sae_nb import kernels, machine, sparse_step
from e2e_sae_nb.architectures import new_sae
from e2e_sae_nb.core import FORMAT_VERSION, UserError, write_json
from e2e_sae_nb.devices import first_largest
from e2e_sae_nb.linear_kl import linear_kl
from e2e_sae_nb.losses import dense_forward, downstream_positions, e2e_ds_loss, e2e_loss, local_loss, make_plan, objective, run_original
from e2e_sae_nb.models import Head, load_subject
from e2e_sae_nb.runs import RunConfig, load_run
from e2e_sae_nb.sae import SAE
from e2e_sae_nb.shards import tokenizer_facts

DEVICE = os.environ.get("E2E_SAE_TEST_DEVICE", "cuda")
REAL = DEVICE.startswith("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REAL and not torch.cuda.is_available(), reason="no CUDA device")]
real = pytest.mark.skipif(not REAL, reason="only a device can show it")
PLACE = "blocks.3.hook_resid_pre"
SPARSE = partial(sparse_step.sparse_forward, limit=1.0)
LOSSES = {
    "local": {"sparsity": {"coeff": 4.0}, "out_to_in": {"coeff": 1.0}},
    "e2e": {"sparsity": {"coeff": 0.8}, "logits_kl": {"coeff": 1.0}},
    "e2e+ds": {"sparsity": {"coeff": 12.0}, "logits_kl": {"coeff": 0.5},
               "in_to_orig": {"hook_positions": ["blocks.4.hook_resid_pre", "blocks.5.hook_resid_pre"], "total_coeff": 2.5}},
}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    "Norm of the difference, relative to what is expected; infinite for what is no number."
    a, b = found.detach().cpu().double(), expected.detach().cpu().double()
    value = float((a - b).norm() / b.norm().clamp_min(1e-300))
    return value if value == value else float("inf")


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    "Normally distributed numbers on the device, the same in every run."
    g = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=g).to(dtype).to(DEVICE)


# --- precision ------------------------------------------------------------------------------------------------------------------------------
@real
@pytest.mark.parametrize("batch", [4, 16])
def test_auto_is_bfloat16_at_the_size_of_gpt2_small(batch, monkeypatch):
    "Devices of capability 8.0 and more have 16-bit matrix units several times as fast as float32."
    if torch.cuda.get_device_capability(DEVICE) < (8, 0):
        pytest.skip("an older device")
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    machine.measured_rates.cache_clear()
    found = machine.choose_precision("auto", machine.products_of(batch * 512, 768, 50257), torch.device(DEVICE))
    assert found.value == "bfloat16", found


# --- kernels, against float64 ---------------------------------------------------------------------------------------------------------------
def exact_kl(z: torch.Tensor, dz: torch.Tensor, scale: float, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    "Sum over rows and its gradient, up to the factor `scale`."
    def shaped(x: torch.Tensor) -> torch.Tensor:
        return x * scale if softcap is None else softcap * torch.tanh(x * scale / softcap)

    new = (z.double() + dz.double()).requires_grad_()
    log_p = shaped(z.double()).log_softmax(-1)
    kl = (log_p.exp() * (log_p - shaped(new).log_softmax(-1))).sum()
    return kl.detach(), torch.autograd.grad(kl, new)[0] / scale


@pytest.mark.parametrize("width", [1, 5, 64, 4095, 4096, 4097, 50257, 262144])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 2e-5), (torch.bfloat16, 5e-3), (torch.float16, 5e-2)], ids=["float32", "bfloat16", "float16"])
def test_rows_of_logits(width, dtype, near, draw):
    "Around a block's width, GPT-2's odd vocabulary, Gemma's large one; plain, scaled, capped. (Small probabilities are subnormal in float16.)"
    for scale, softcap in ((1.0, None), (0.5, None), (1.0, 30.0), (2.0, 5.0)):
        z, dz = 3 * draw(7, width, dtype=dtype), draw(7, width, dtype=dtype) / 2
        before, (kl, gradient) = z.clone(), exact_kl(z, dz, scale, softcap)
        found, slope = kernels.kl_rows(z, dz.clone(), scale, softcap, 1.0)
        assert torch.equal(z, before) and bool(slope.isfinite().all())  # the original's logits may be needed again
        if width > 1:  # a single entry has probability one in both
            assert abs(found.item() / kl.item() - 1) < 3e-5 and distance(slope, gradient) < near
        assert kernels.kl_rows(z, dz.clone(), scale, softcap)[1] is None


@pytest.mark.parametrize("width", [37, 4090, 50257])
def test_padded_rows(width, draw):
    "What lies in the padding counts for nothing; its gradient is zero."
    z, dz = 3 * draw(5, width), draw(5, width)
    kl, slope = kernels.kl_rows(z, dz.clone(), 1.0, 30.0, 1.0)
    wide = [torch.nn.functional.pad(x, (0, -width % 128), value=float("inf")) for x in (z, dz)]
    found, gradient = kernels.kl_rows(*wide, 1.0, 30.0, 1.0, width=width)
    assert abs(found.item() / kl.item() - 1) < 1e-5 and distance(gradient[:, :width], slope) < 1e-5 and not gradient[:, width:].any()


@pytest.mark.parametrize("size, near", [(1e-1, 1e-4), (1e-2, 1e-3)])
def test_the_gradient_of_a_good_sae(size, near, draw):
    "Small divergences do not drown in rounding."
    z, dz = 3 * draw(64, 50257), size * draw(64, 50257)
    assert distance(kernels.kl_rows(z, dz.clone(), factor=1.0)[1], exact_kl(z, dz, 1.0, None)[1]) < near


@real
def test_rows_behind_two_to_the_31():
    "Offsets have 64 bits: the last rows of more than 4 GB give what they give alone."
    rows = 2**31 // 50257 + 9
    z, dz = (torch.empty(rows, 50257, dtype=torch.bfloat16, device=DEVICE).normal_() for _ in range(2))
    alone = kernels.kl_rows(z[-8:].clone(), dz[-8:].clone(), factor=1.0)[1]
    assert torch.equal(kernels.kl_rows(z, dz, factor=1.0)[1][-8:], alone)


@pytest.mark.parametrize("width", [1, 3, 64, 70, 768, 1025, 2304])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=["float32", "bfloat16"])
def test_pairs_and_bags(width, dtype, near, draw):
    "Bags of none, of one, at the length where they are cut, of thousands; sums are of float32 and rounded once; weights anywhere in memory."
    if dtype == torch.bfloat16 and not REAL:
        pytest.skip("torch's sampled product on a CPU has no bfloat16")
    rows, x = draw(300, width, dtype=dtype), draw(200, width, dtype=dtype)
    sizes = torch.tensor([0, 1, 255, 256, 257, 5000, 0, 33, 1, 0])
    pairs = torch.randperm(300 * 200, generator=torch.Generator().manual_seed(1))[: int(sizes.sum())].sort().values.to(DEVICE)
    row, token = pairs // 200, pairs % 200
    starts = torch.searchsorted(row, torch.arange(301, device=DEVICE))
    assert distance(kernels.pair_products(row, token, starts, rows, x), (rows[row].double() * x[token].double()).sum(-1)) < near
    weights, bags = draw(len(row), dtype=dtype), torch.arange(len(sizes)).repeat_interleave(sizes).to(DEVICE)
    sizes = sizes.to(DEVICE)
    offsets = sizes.cumsum(0) - sizes
    expected = torch.zeros(len(sizes), width, dtype=torch.float64, device=DEVICE).index_add(0, bags, weights.double()[:, None] * rows[row].double())
    found = kernels.bag_sums(row, rows, offsets, weights)
    assert distance(found, expected) < near and not found[sizes == 0].any()
    assert torch.equal(kernels.bag_sums(row, rows, offsets, weights), found)  # the same bits again
    assert distance(kernels.bag_sums(row, rows, offsets, weights.repeat_interleave(2)[::2]), expected) < near


def test_segments(draw):
    sizes = torch.tensor([0, 1, 7, 255, 256, 257, 9000, 0])
    segment = torch.arange(len(sizes)).repeat_interleave(sizes).to(DEVICE)
    values, starts = draw(len(segment)), torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).to(DEVICE)
    expected = torch.zeros(len(sizes), dtype=torch.float64, device=DEVICE).index_add(0, segment, values.double())
    found = kernels.segment_sums(values, segment, starts)
    assert distance(found, expected) < 1e-5 and torch.equal(found, kernels.segment_sums(values, segment, starts))


@real
def test_as_many_pairs_as_a_long_batch_has(draw):
    n, rows, x, g = 2**22 + 3, draw(46080, 768), draw(8192, 768), torch.Generator().manual_seed(2)
    row, token = torch.randint(46080, (n,), generator=g).sort().values.to(DEVICE), torch.randint(8192, (n,), generator=g).to(DEVICE)
    last = slice(n - 10_000, n)
    assert distance(kernels.pair_products(row, token, torch.empty(0), rows, x)[last], (rows[row[last]] * x[token[last]]).sum(-1)) < 1e-5


# --- finding who fires ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width, latents", [(64, 400), (96, 20_000), (768, 1024)])
def test_the_screen_loses_nobody(width, latents, draw):
    "Rounded products only screen: the same pairs as without, at thresholds with many pre-activations near zero."
    sae = SAE(width, latents).to(DEVICE)
    with torch.no_grad():
        sae.W_enc *= torch.exp(draw(latents))
    x = draw(300, width) * torch.exp(draw(300, 1))
    for bias in (-1.0, 0.0):
        sae.b_enc.data.fill_(bias)
        plain, screened = (sparse_step.find_active(sae, x, 1.0, screen) for screen in (False, True))
        assert plain is not None and screened is not None
        codes = [torch.zeros(latents, 300, device=DEVICE).index_put((a.latent, a.token), a.values) for a in (plain, screened)]
        near = 1e-5 * float(x.norm(dim=1).max() * sae.W_enc.norm(dim=0).max())
        assert float((codes[0] - codes[1]).abs().max()) < near  # one that only one of them has is zero within rounding


@real
def test_a_device_with_tensor_cores_screens():
    assert sparse_step.can_screen(torch.zeros(1, device=DEVICE)) == (torch.cuda.get_device_capability() >= (8, 0))


@pytest.mark.parametrize("n", [0, 1, 999, 30_000, 60_000])
def test_the_largest_of_a_batch(n):
    "Equal values at the border: the first of them."
    values = torch.randint(500, (50_000,), generator=torch.Generator().manual_seed(3)).float()
    expected = values.sort(descending=True, stable=True).indices[:n].sort().values
    assert torch.equal(first_largest(values.to(DEVICE), n).cpu(), expected)


# --- the loss straight from hidden states ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("vocab", [501, 50257])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_linear_kl(vocab, softcap, draw):
    "Padded vocabularies, chunks of several sizes, kept logits: value and gradient of the slow definition in float64."
    head = Head(torch.nn.Linear(48, vocab).to(DEVICE).requires_grad_(False), 0.5, softcap)
    orig, new = draw(333, 48), draw(333, 48).requires_grad_()
    logits = [(h.double() @ head.linear.weight.double().T + head.linear.bias.double()) for h in (orig, new)]
    kl, slope = exact_kl(logits[0].detach(), (logits[1] - logits[0]).detach(), 0.5, softcap)
    gradient = slope @ head.linear.weight.double() * 0.5 / 333
    kept: Any = []
    for chunk, shared in ((None, None), (100, None), (128, kept), (128, kept)):
        found = linear_kl(head, orig, new, chunk, shared)
        assert abs(found.item() / (kl.item() / 333) - 1) < 1e-4
        assert distance(torch.autograd.grad(found, new)[0], gradient) < 1e-4


# --- one step ---------------------------------------------------------------------------------------------------------------------------------
def one_step(loss: str, dtype: torch.dtype, device: str, forward: Any, autocast: bool = False, architecture: str = "relu", **options: Any):
    "Loss and gradients of one batch of the embedded model."
    subject = load_subject("docstrings", dtype=str(dtype).removeprefix("torch."), device=device)
    sae = new_sae(architecture, 192, 768, seed=3, orthogonal=False, dtype=dtype, **options).to(device)
    with torch.no_grad():
        sae.b_enc.sub_(0.4)  # few latents fire
    wanted = {"local": lambda: local_loss(4.0), "e2e": lambda: e2e_loss(0.8), "e2e+ds": lambda: e2e_ds_loss(12.0, downstream_positions(subject, PLACE))}[loss]()
    tokens, plan = torch.randint(4096, (2, 64), generator=torch.Generator().manual_seed(1)).to(device), make_plan(subject, [PLACE], wanted)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
        result = objective(subject, run_original(subject, tokens, plan), {PLACE: sae}, wanted, plan, forward=forward)
    result.total.backward()
    return result.total.item(), {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}


WAYS = {"float64": (torch.float64, False, 1e-10, 1e-8), "float32": (torch.float32, False, 3e-5, 1e-4), "bfloat16": (torch.float32, True, 2e-2, 0.15)}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_that_of_a_cpu_in_float64(loss, way):
    dtype, autocast, close, near = WAYS[way]
    value, expected = one_step(loss, torch.float64, "cpu", dense_forward)
    for forward in (SPARSE, dense_forward):
        found, gradients = one_step(loss, dtype, DEVICE, forward, autocast)
        assert abs(found / value - 1) < close
        assert gradients.keys() == expected.keys() and max(distance(gradients[name], expected[name]) for name in expected) < near


OPTIONS: dict[str, dict[str, Any]] = {"topk": {"k": 8}, "batchtopk": {"k": 8}, "matryoshka": {"k": 8}, "jumprelu": {}, "gated": {}}


@pytest.mark.parametrize("architecture", OPTIONS)
def test_architectures(architecture):
    value, expected = one_step("e2e", torch.float64, "cpu", dense_forward, architecture=architecture, **OPTIONS[architecture])
    for forward in (SPARSE, dense_forward):
        found, gradients = one_step("e2e", torch.float32, DEVICE, forward, architecture=architecture, **OPTIONS[architecture])
        assert abs(found / value - 1) < 1e-4 and max(distance(gradients[name], expected[name]) for name in gradients) < 2e-3


# --- runs -------------------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    "Made-up tokens, of which small ids are frequent."
    folder, rng, sides = tmp_path_factory.mktemp("shards"), np.random.default_rng(0), {}
    for side, n in (("train", 60_000), ("held_out", 4_000)):
        np.save(folder / f"{side}.npy", (4096 * rng.random(n) ** 3).astype(np.uint16))
        sides[side] = [{"file": f"{side}.npy", "tokens": n, "sha256": ""}]
    facts = tokenizer_facts(load_subject("docstrings", device="cpu").tokenizer)
    write_json(folder / "shards.json", {"format_version": FORMAT_VERSION, "dtype": "uint16", "held_out_share": None, "tokenizer": facts, "sides": sides})
    return folder


@pytest.fixture
def make(shards, tmp_path) -> Callable[..., RunConfig]:
    def config(name: str, loss: str = "e2e", **changes: Any) -> RunConfig:
        return RunConfig.from_dict({
            "tlens_model_name": "docstrings", "train_data": {"dataset_name": str(shards), "n_ctx": 64, "seed": 0}, "lr": 1e-3, "batch_size": 4, "n_samples": 32,
            "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 8}, "eval_n_samples": 8, "log_every_n_grad_steps": 1, "device": DEVICE,
            "max_grad_norm": 1.0, "loss": LOSSES[loss], "save_dir": str(tmp_path / name), "wandb_run_name": name} | changes)

    return config


def logged_losses(run: Any) -> torch.Tensor:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if "loss" in line])


@pytest.mark.parametrize("loss", LOSSES)
def test_training_follows_the_cpu(loss, make):
    "In float64 up to the weights, in float32 loss by loss."
    from e2e_sae_nb.training import train

    expected = train(make("cpu", loss, dtype="float64", device="cpu"))
    wide, run = train(make("wide", loss, dtype="float64")), train(make("run", loss))
    pairs = zip(wide.saes[PLACE].parameters(), expected.saes[PLACE].parameters(), strict=True)
    assert max(distance(p, q) for p, q in pairs) < 1e-6
    assert float((logged_losses(run) / logged_losses(expected) - 1).abs().max()) < 1e-3 and abs(run.summary["kl"] / expected.summary["kl"] - 1) < 1e-2
    if REAL:
        assert "NVIDIA" in run.summary["provenance"]["device"] and run.summary["peak_memory_bytes"] > 2**20


def kept_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "saes.safetensors") | load_file(folder / "training.safetensors")


def test_resume_brings_back_every_bit(make):
    "What is taken up is what was saved; what follows differs by rounding at most (sums on a device have no fixed order by default)."
    from e2e_sae_nb.state import resume, save
    from e2e_sae_nb.training import train

    whole = train(make("whole", save_every_n_samples=16))
    t = resume(whole.path, samples=16)
    t.folder = whole.path.parent / "again"
    again, saved = kept_tensors(save(t)), kept_tensors(whole.path / "checkpoints" / "samples_16")
    assert again.keys() == saved.keys() and all(torch.equal(again[key], saved[key]) for key in saved)
    (whole.path / "checkpoints" / "samples_32").rename(whole.path.parent / "samples_32")
    resumed = train(resume_from=whole.path)
    assert max(distance(p, q) for p, q in zip(resumed.saes[PLACE].parameters(), whole.saes[PLACE].parameters(), strict=True)) < 1e-3


def test_a_frontier_is_its_single_runs(make):
    "Kept logits and a shared pass change nothing; every member's seconds are its own."
    from e2e_sae_nb.frontiers import frontier
    from e2e_sae_nb.training import train

    runs = frontier([make("pass", loss) for loss in LOSSES])
    for run, loss in zip(runs, LOSSES, strict=True):
        alone = train(make(f"alone {loss}", loss))
        assert float((logged_losses(run) / logged_losses(alone) - 1).abs().max()) < 1e-3 and run.summary["seconds"] > 0


def test_prefetching_changes_no_batch(make):
    from e2e_sae_nb.prefetch import Prefetch
    from e2e_sae_nb.state import data_for

    config, subject = make("x"), load_subject("docstrings", device=DEVICE)
    plain, ahead = data_for(config, subject, "train"), Prefetch(data_for(config, subject, "train"), DEVICE)
    for _ in range(40):
        batch = next(ahead)
        assert batch.device.type == torch.device(DEVICE).type and torch.equal(batch.cpu(), next(plain)) and ahead.state_dict() == plain.state_dict()
    for stream in (ahead, plain):
        stream.load_state_dict({"epoch": 0, "row": 8})
    assert torch.equal(next(ahead).cpu(), next(plain))


def test_precisions_of_a_run(make):
    "Autocast, and a network loaded in 16 bit: the SAE stays float32, losses are near."
    from e2e_sae_nb.training import train

    expected = logged_losses(train(make("plain")))
    for name, changes, near in (("autocast", {"compute_dtype": "bfloat16"}, 0.02), ("loaded", {"dtype": "bfloat16"}, 0.05)):
        run = train(make(name, **changes))
        assert run.saes[PLACE].W_enc.dtype == torch.float32 and float((logged_losses(run) / expected - 1).abs().max()) < near


@real
def test_compiled_blocks():
    from e2e_sae_nb.compiling import compile_blocks, restore_blocks

    subject, tokens = load_subject("docstrings", device=DEVICE), torch.randint(4096, (8, 256), device=DEVICE)
    precision = partial(torch.autocast, "cuda", torch.bfloat16)
    assert compile_blocks(subject, tokens, precision)  # which compares output and gradient itself
    with precision(), torch.no_grad():
        compiled = subject(tokens)
        restore_blocks(subject)
        assert distance(compiled, subject(tokens)) < 1e-2


@real
def test_out_of_memory_names_a_batch_that_fits(make):
    "With real memory; the batch that is named then trains within the same limit."
    from e2e_sae_nb.training import train

    subject, total = load_subject("docstrings", device=DEVICE), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1.5 * 2**30) / total)
    sized = lambda name, size: replace(make(name), batch_size=size, n_samples=size, sparse_step=False, eval_n_samples=4)
    try:
        with pytest.raises(UserError, match=r"out of memory .* a batch_size of (\d+) fits") as caught:
            train(sized("large", 512), subject=subject)
        size = int(re.search(r"a batch_size of (\d+) fits", str(caught.value))[1])  # type: ignore[index]
        train(sized("fits", size), subject=subject)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= size < 512


@real
@pytest.mark.parametrize("loss", LOSSES)
def test_waits_per_step(loss, make):
    "As tests/test_pretend_device.py counts them, and the batch's copy, which is pinned, not among them."
    from e2e_sae_nb.state import begin
    from e2e_sae_nb.training import train_step

    t = begin(replace(make("waits", loss), save_dir=None, log_every_n_grad_steps=1000, collect_act_frequency_every_n_samples=0))
    with torch.no_grad():
        t.saes[PLACE].b_enc.sub_(0.4)
    for _ in range(3):
        train_step(t)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
    assert len(waits) <= 5, waits


@real
def test_same_bits_twice():
    "With torch's deterministic algorithms a step on the device repeats itself to the last bit, and so can a run be taken up."
    program = f"""
import sys, torch
sys.path.insert(0, {str(ROOT / "tests")!r})
torch.use_deterministic_algorithms(True)
from test_gpu import LOSSES, OPTIONS, SPARSE, one_step
for loss, kind in [(loss, "relu") for loss in LOSSES] + [("e2e", kind) for kind in OPTIONS]:
    (a, x), (b, y) = (one_step(loss, torch.float32, "cuda", SPARSE, architecture=kind, **OPTIONS.get(kind, {{}})) for _ in range(2))
    assert a == b and all(torch.equal(x[name], y[name]) for name in x), (loss, kind)
print("same")
"""
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=200, env=environment)
    assert done.stdout.strip() == "same", done.stderr[-1500:]


# --- files --------------------------------------------------------------------------------------------------------------------------------
def test_files_go_from_device_to_cpu_and_back(make):
    "An SAE of a run on the device: read from its folder, evaluated on the CPU and on the device, spliced as the README has it."
    from e2e_sae_nb.evaluation import evaluate_saes
    from e2e_sae_nb.splicing import splice
    from e2e_sae_nb.training import train

    run, tokens = train(make("run")), torch.randint(4096, (4, 64), generator=torch.Generator().manual_seed(5))
    here = evaluate_saes(load_subject("docstrings", device="cpu"), load_run(run.path).saes, [tokens])
    subject = load_subject("docstrings", device=DEVICE)
    there = evaluate_saes(subject, load_run(run.path).saes, [tokens])
    for key in ("ce_orig", "ce_increase", "kl"):
        assert abs(getattr(there, key) / getattr(here, key) - 1) < 1e-3
    assert abs(there.positions[PLACE].l0 / here.positions[PLACE].l0 - 1) < 1e-3
    with torch.no_grad(), splice(subject, load_run(run.path).saes):
        assert bool(subject(tokens).isfinite().all())
