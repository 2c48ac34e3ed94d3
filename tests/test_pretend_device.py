"""Everything that trains, evaluates or reads SAEs, on a GPU that is not there: no tensors of two devices meet, and a step waits no oftener than stated.

The waits are an invariant of the code, not of a machine, so the bounds below are exact: a change that adds one has to say so here.
"""

import collections
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACE, LATER = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"
LOCAL = {"sparsity": {"coeff": 0.5}, "out_to_in": {"coeff": 1.0}}
E2E = {"sparsity": {"coeff": 0.5}, "logits_kl": {"coeff": 1.0}}
DS = {"sparsity": {"coeff": 0.5}, "logits_kl": {"coeff": 0.5}, "in_to_orig": {"hook_positions": [LATER], "total_coeff": 1.0}}
MASKED = {"exclude_first_position": True}
K = {"k": 3, "dead_after": 40}


def saes(architecture: str = "relu", **options) -> dict:
    return {"sae_positions": PLACE, "dict_size_to_input_ratio": 8, "architecture": architecture, **options}


# What a step waits for and why; with prefetching on CUDA the first line goes.
BATCH = {"the batch's copy to the device": 1, "transformers' test for packed sequences": 1}
LISTS = {"which latents have any pairs": 1}
SPARSE = BATCH | LISTS | {"which pairs pass the screen (for every 2**28 pre-activations)": 1, "which of them fire": 1}
SILENT = {"which pairs an architecture looked at and found silent": 1}
DEAD = {"which latents are dead, for the auxiliary loss": 1}
TOP = BATCH | LISTS | DEAD | {"which of the largest are positive": 1}
BATCH_TOP = TOP | {"which reach the border (for every 2**27 pre-activations)": 1}
BORDER = {"what is above and what at the border": 2}
MASK = {"tokens that count": 2, "their penalties, errors, hidden states of two networks, their activations": 7,
        "their pairs": 1}
CONTROL = {"two norms": 1, "the number of active latents": 1}
RESAMPLED = BATCH | {"which pairs pass the screen, of which there are too many": 1, "which latents are dead": 1, "weights to the host and draws back": 2}
TWICE = {"the same for the second batch": 5}
CASES: dict[str, tuple[dict, dict[str, int]]] = {
    "local": ({"loss": LOCAL}, SPARSE),
    "e2e": ({"loss": E2E}, SPARSE),
    "e2e+ds": ({"loss": DS}, SPARSE),
    "local, dense": ({"loss": LOCAL, "sparse_step": False}, BATCH),
    "e2e, dense": ({"loss": E2E, "sparse_step": False}, BATCH),
    "e2e+ds, dense": ({"loss": DS, "sparse_step": False}, BATCH),
    "topk": ({"loss": E2E, "saes": saes("topk", **K)}, TOP),
    "batchtopk": ({"loss": E2E, "saes": saes("batchtopk", **K)}, BATCH_TOP),
    "matryoshka": ({"loss": E2E, "saes": saes("matryoshka", **K)}, BATCH_TOP | SILENT),
    "jumprelu": ({"loss": E2E, "saes": saes("jumprelu")}, SPARSE | SILENT),
    "gated": ({"loss": E2E, "saes": saes("gated")}, SPARSE | SILENT),
    "batchtopk, dense": ({"loss": E2E, "saes": saes("batchtopk", **K), "sparse_step": False}, BATCH | DEAD | BORDER),
    "gated, dense": ({"loss": E2E, "saes": saes("gated"), "sparse_step": False}, BATCH),
    "transcoder": ({"loss": E2E, "saes": saes() | {"sae_positions": "blocks.1.hook_mlp_out", "input_positions": "blocks.1.hook_resid_pre"}}, SPARSE),
    "two SAEs": ({"loss": E2E, "saes": saes() | {"sae_positions": [PLACE, LATER]}}, SPARSE | {"which pairs of the second SAE pass the screen, of which there are too many": 1}),
    "masked": ({"loss": DS, **MASKED}, SPARSE | MASK),
    "a target and a sharper norm": ({"loss": {"sparsity": {"coeff": 0.5, "p_end": 0.6, "target_l0": 4.0}, "logits_kl": {"coeff": 1.0}}}, SPARSE | CONTROL),
    "unit norm": ({"loss": E2E, "saes": saes(activation_norm="unit")}, SPARSE),
    "clipped": ({"loss": E2E, "max_grad_norm": 1.0}, SPARSE),
    "accumulated": ({"loss": E2E, "effective_batch_size": 8}, SPARSE | TWICE),
    "resampled": ({"loss": E2E, "saes": saes(dead_after=40, resample_every_n_samples=8)}, RESAMPLED),
}


def main(folder: Path) -> None:
    "In a process of its own: every case and every scenario; what happened goes to folder/found.json."
    import pretend_device as pretend

    device = pretend.install()
    pretend.install_kernels()
    import torch

    from e2e_sae_nb.models import subject_from_model, tiny_model
    from e2e_sae_nb.runs import RunConfig
    from e2e_sae_nb.state import begin
    from e2e_sae_nb.training import train_step

    subject = subject_from_model(tiny_model("gpt2").to(device), name="tiny")
    found: dict[str, dict] = {}
    for name, (changes, _) in CASES.items():
        try:
            t = begin(RunConfig.from_dict(base(folder) | {"save_dir": None} | changes), subject)
            for sae in t.saes.values():
                with torch.no_grad():
                    sae.b_enc.sub_(2.0)  # few latents fire, as after some training
            for _ in range(3):
                train_step(t)
            with pretend.recorded() as record:
                train_step(t)
            assert all(isinstance(p, pretend.Pretend) or isinstance(p.data, pretend.Pretend) for sae in t.saes.values() for p in sae.parameters())
            found[name] = {"waits": record.waits, "operations": record.operations, "launches": record.launches}
        except Exception as error:
            found[name] = {"error": trace(error)}
    for name, scenario in SCENARIOS.items():
        try:
            scenario(subject, folder, pretend, torch)
            found[name] = {}
        except Exception as error:
            found[name] = {"error": trace(error)}
    (folder / "found.json").write_text(json.dumps(found))


def trace(error: Exception) -> str:
    import traceback

    return "".join(traceback.format_exception(error)[-8:])[:6000]


def base(folder: Path) -> dict:
    return {"tlens_model_name": "tiny", "train_data": {"dataset_name": str(folder / "tokens.jsonl"), "is_tokenized": True, "n_ctx": 8, "seed": 0},
            "saes": saes(), "loss": E2E, "lr": 1e-2, "batch_size": 4, "n_samples": 48, "eval_n_samples": 8, "warmup_samples": 8, "save_dir": str(folder / "runs"),
            "log_every_n_grad_steps": 1000, "collect_act_frequency_every_n_samples": 8, "act_frequency_n_tokens": 640}


def run_and_read(subject, folder, pretend, torch):
    "Trained, saved, resumed; read from its folder, evaluated, spliced; its latents' firings."
    from e2e_sae_nb import load_run, splice
    from e2e_sae_nb.evaluation import evaluate_saes
    from e2e_sae_nb.features import firings
    from e2e_sae_nb.runs import RunConfig
    from e2e_sae_nb.splicing import original_pass
    from e2e_sae_nb.training import train

    run = train(RunConfig.from_dict(base(folder) | {"loss": DS, "save_every_n_samples": 24, "eval_every_n_samples": 24, "log_every_n_grad_steps": 1}), subject=subject)
    (run.path / "checkpoints" / "samples_48").rename(folder / "taken_away")
    resumed = train(resume_from=run.path, subject=subject)
    for name, sae in run.saes.items():
        for (key, p), q in zip(sae.named_parameters(), resumed.saes[name].parameters(), strict=True):
            assert torch.equal(p.cpu(), q.cpu()), key
    kept = load_run(run.path)  # on the CPU, where files are read
    tokens = torch.randint(37, (2, 8))
    with torch.no_grad(), splice(subject, kept.saes):
        assert bool(subject(tokens).cpu().isfinite().all())
    result = evaluate_saes(subject, load_run(run.path).saes, [tokens])
    assert result.kl > 0
    sae = load_run(run.path).saes[PLACE]
    found = firings(subject, PLACE, sae, [tokens])
    with torch.no_grad():
        code = sae(original_pass(subject, tokens.to(subject.device), [PLACE]).activations[PLACE]).c
    assert 0 < found.count.sum() == len(found.value) and found.count.tolist() == (code.cpu() > 0).sum((0, 1)).tolist()


def frontier_and_resume(subject, folder, pretend, torch):
    from e2e_sae_nb.frontiers import frontier
    from e2e_sae_nb.members import FrontierConfig

    whole = base(folder) | {"save_dir": str(folder / "frontier"), "save_every_n_samples": 24, "n_samples": 48}
    del whole["loss"], whole["lr"]
    sides = {"local": {"lr": 1e-2, "sparsity": [0.5, 1.0]}, "e2e": {"lr": 1e-2, "sparsity": [0.5]}, "e2e+ds": {"lr": 1e-2, "sparsity": [0.5]}}
    config = FrontierConfig.from_dict(whole | {"frontier": sides})
    runs = frontier(config, subject=subject)
    assert len(runs) == 4 and all(run.summary["kl"] > 0 for run in runs)


def whole_evaluation(subject, folder, pretend, torch):
    from e2e_sae_nb import evaluate, train
    from e2e_sae_nb.runs import RunConfig

    run = train(RunConfig.from_dict(base(folder) | {"save_dir": str(folder / "evaluated"), **MASKED}), subject=subject)
    assert evaluate(run.path, subject=subject).kl > 0


def memory_runs_out(subject, folder, pretend, torch):
    from e2e_sae_nb.core import UserError
    from e2e_sae_nb.memory import advice_on_memory
    from e2e_sae_nb.runs import RunConfig
    from e2e_sae_nb.state import begin

    t = begin(RunConfig.from_dict(base(folder) | {"save_dir": None}), subject)
    try:
        with advice_on_memory([t]):
            raise torch.OutOfMemoryError("pretend: out of memory")
    except UserError as error:
        assert "a batch_size of 2 fits" in str(error)
    else:
        raise AssertionError("no advice")


SCENARIOS = {f.__name__: f for f in (run_and_read, frontier_and_resume, whole_evaluation, memory_runs_out)}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder, draw = tmp_path_factory.mktemp("pretend"), random.Random(0)
    (folder / "tokens.jsonl").write_text("\n".join(json.dumps({"input_ids": [draw.randrange(37) for _ in range(8)]}) for _ in range(400)))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_step(found, name):
    "No mixed devices; as many waits as stated, or fewer."
    assert "error" not in found[name], found[name]["error"]
    waits, stated = collections.Counter(found[name]["waits"]), CASES[name][1]
    assert found[name]["operations"] > 50
    if "dense" not in name and name != "resampled":  # the step was a sparse one, with the kernels for CUDA
        assert found[name]["launches"]["bag_sums"] >= 3
    assert sum(waits.values()) <= sum(stated.values()), json.dumps(waits, indent=1)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(found, name):
    assert "error" not in found[name], found[name]["error"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
