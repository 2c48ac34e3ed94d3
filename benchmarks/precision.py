"""Is bfloat16 computing safe? Errors against float64 on trained SAEs, and where training ends, over three seeds.

`python benchmarks/precision.py` writes data/results/precision.json: KL and gradients of trained SAEs, as long as the demo's, in float64 arithmetic,
by the fast path in bfloat16 and by plain autocast of the definition (with transformers' own attention); final L0 and CE increase of e2e and e2e+ds
runs in both precisions, three seeds each.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch

from e2e_sae_nb.core import Stopwatch, provenance, write_json
from e2e_sae_nb.demonstration import DEMO
from e2e_sae_nb.frontiers import frontier
from e2e_sae_nb.losses import e2e_loss, make_plan, objective, run_original
from e2e_sae_nb.members import FrontierConfig
from e2e_sae_nb.models import Subject, load_subject
from e2e_sae_nb.sae import SAE
from e2e_sae_nb.sparse_step import sparse_forward
from e2e_sae_nb.state import begin

SEQUENCES = 32  # in the batch whose gradient is compared
OUT = Path(__file__).resolve().parent.parent / "data" / "results" / "precision.json"
PLACE = DEMO["saes"]["sae_positions"]


def gradients(subject: Subject, sae: SAE, tokens: torch.Tensor, way: str) -> tuple[float, dict[str, torch.Tensor]]:
    "KL and its gradients; `way`: float64, fast (our bfloat16 mode), autocast (of the definition, SAE included)."
    loss, sae = e2e_loss(0.0), copy.deepcopy(sae).requires_grad_(True)
    plan = make_plan(subject, [PLACE], loss)
    forward = sparse_forward if way == "fast" else lambda sae, x: sae(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=way != "float64"):
        value = objective(subject, run_original(subject, tokens, plan), {PLACE: sae}, loss, plan, forward=forward).total
    value.backward()
    return value.item(), {name: p.grad.double() for name, p in sae.named_parameters() if p.grad is not None}


def errors(subject: Subject, sae: SAE, tokens: torch.Tensor) -> dict[str, Any]:
    exact_subject = load_subject("docstrings", dtype="float64", device="cpu")
    plain = load_subject("docstrings", device="cpu")
    plain.model.set_attn_implementation("sdpa")
    exact, exact_grads = gradients(exact_subject, copy.deepcopy(sae).double(), tokens, "float64")
    found: dict[str, Any] = {"kl": exact}
    for way in ("fast", "autocast"):
        value, grads = gradients(subject if way == "fast" else plain, sae, tokens, way)
        found[way] = {"kl_relative_error": abs(value / exact - 1), "gradient_cosine": {
            name: torch.nn.functional.cosine_similarity(g.flatten(), exact_grads[name].flatten(), dim=0).item() for name, g in grads.items()}}
    return found


def main() -> None:
    subject, clock, rows = load_subject("docstrings", device="cpu"), Stopwatch(), []
    for seed in range(3):
        for precision in ("float32", "bfloat16"):
            values = copy.deepcopy(DEMO) | {"save_dir": None, "seed": seed, "n_samples": 500, "warmup_samples": 250, "eval_n_samples": 100,
                                            "compute_dtype": precision}
            values["train_data"] = {k: v for k, v in values["train_data"].items() if k != "seed"}
            values["frontier"] = {k: {**DEMO["frontier"][k], "sparsity": DEMO["frontier"][k]["sparsity"][1:2]} for k in ("e2e", "e2e+ds")}
            config = FrontierConfig.from_dict(values)
            for run in frontier(config, subject=subject):
                rows.append({"type": run.summary["type"], "seed": seed, "precision": precision, "l0": run.summary["positions"][PLACE]["l0"],
                             "ce_increase": run.summary["ce_increase"], "tokens": run.summary["tokens"]})
                print(rows[-1], file=sys.stderr, flush=True)
    values = copy.deepcopy(DEMO) | {"save_dir": None, "eval_n_samples": 100}
    values["frontier"] = {k: {**DEMO["frontier"][k], "sparsity": DEMO["frontier"][k]["sparsity"][:2]} for k in ("e2e", "e2e+ds")}
    long = frontier(FrontierConfig.from_dict(values), subject=subject)
    stream = begin(long[0].config, subject).stream
    tokens = torch.cat([next(stream) for _ in range(SEQUENCES // long[0].config.batch_size)])
    found = [{"type": run.summary["type"], "l0": run.summary["positions"][PLACE]["l0"], "tokens": run.summary["tokens"]}
             | errors(subject, run.saes[PLACE], tokens) for run in long]
    write_json(OUT, {"runs": rows, "errors": found, "sequences": SEQUENCES, "provenance": provenance(
        values, seed=0, tokens=sum(r["tokens"] for r in rows) + sum(run.summary["tokens"] for run in long), seconds=float(clock), command="python benchmarks/precision.py")})


if __name__ == "__main__":
    main()
