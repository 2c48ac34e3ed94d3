"""What are the remedies for dead latents worth? None, aux-k where the architecture has it, resampling, and both, on the embedded model.

`python benchmarks/dead_latents.py` writes data/results/dead_latents.json (some minutes on a CPU). All runs of a seed see the same tokens in
one pass; seeds that are in the file are not run again. `--samples 20 --out FILE` is a quick look.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from e2e_sae_nb.core import Stopwatch, provenance, read_json, write_json
from e2e_sae_nb.frontiers import frontier
from e2e_sae_nb.models import load_subject
from e2e_sae_nb.runs import RunConfig

PLACE, SEEDS, SAMPLES, EVALUATED = "blocks.3.hook_resid_pre", (0, 1, 2), 600, 200
DEAD_AFTER = 20_000  # tokens
OUT = Path(__file__).resolve().parent.parent / "data" / "results" / "dead_latents.json"
BASES: dict[str, tuple[dict[str, Any], float]] = {"relu": ({}, 3.0), "topk": ({"architecture": "topk", "k": 30, "aux_coeff": 0.0}, 0.0)}  # SAE, sparsity coefficient
LOSSES: dict[str, dict[str, Any]] = {"local": {"out_to_in": {"coeff": 1.0}}, "e2e": {"logits_kl": {"coeff": 1.0}}}


def handlings(architecture: str, samples: int) -> dict[str, dict[str, Any]]:
    "The remedies an architecture can have."
    again = {"resample_every_n_samples": samples // 5, "resample_until_n_samples": 3 * samples // 5}
    found = {"none": {}, "resampling": again}
    return found if architecture == "relu" else found | {"aux-k": {"aux_coeff": 1 / 32}, "both": again | {"aux_coeff": 1 / 32}}


def config(architecture: str, kind: str, handling: dict[str, Any], seed: int, samples: int) -> RunConfig:
    sae, coeff = BASES[architecture]
    coeff = coeff * (0.25 if kind == "e2e" else 1.0)  # coefficients mean different things; these give a similar L0
    return RunConfig.from_dict({
        "tlens_model_name": "docstrings", "seed": seed, "lr": 1e-2, "batch_size": 4, "n_samples": samples, "warmup_samples": samples // 4, "min_lr_factor": 0.1,
        "max_grad_norm": 10.0, "compute_dtype": "auto", "eval_n_samples": min(EVALUATED, samples), "collect_act_frequency_every_n_samples": 0, "save_dir": None,
        "loss": {"sparsity": {"coeff": coeff}, **LOSSES[kind]}, "train_data": {"dataset_name": "docstrings", "n_ctx": 256, "seed": seed},
        "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 16, "dead_after": min(DEAD_AFTER, 64 * samples), **sae, **handling}})


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--samples", type=int, default=SAMPLES)
    options.add_argument("--out", type=Path, default=OUT)
    chosen = options.parse_args()
    subject = load_subject("docstrings", device="cpu")
    parts = read_json(chosen.out)["parts"] if chosen.out.is_file() else {}
    for seed in SEEDS:
        if str(seed) in parts:
            continue
        clock = Stopwatch()
        cells = [(a, kind, name, handling) for a in BASES for kind in LOSSES for name, handling in handlings(a, chosen.samples).items()]
        configs = [config(a, kind, handling, seed, chosen.samples) for a, kind, _, handling in cells]
        rows = []
        for (architecture, kind, name, _), run in zip(cells, frontier(configs, subject=subject), strict=True):
            s, position = run.summary, run.summary["positions"][PLACE]
            rows.append({"architecture": architecture, "type": kind, "handling": name, "seed": seed, "dead": s["dead"][PLACE], "resampled": s["resampled"].get(PLACE, 0),
                         **{key: position[key] for key in ("l0", "alive", "d_sae", "explained_variance")}, "ce_increase": s["ce_increase"], "kl": s["kl"], "seconds": s["seconds"]})
        origin = provenance({"samples": chosen.samples, "dead_after": configs[0].saes.dead_after}, seed=seed, tokens=len(rows) * configs[0].n_samples * 256, seconds=float(clock),
                            command="python benchmarks/dead_latents.py")
        parts[str(seed)] = {"rows": rows, "provenance": origin}
        write_json(chosen.out, {"dead_after": configs[0].saes.dead_after, "tokens": chosen.samples * 256, "eval_tokens": min(EVALUATED, chosen.samples) * 256, "parts": parts, "provenance": origin})
        print(seed, f"{float(clock):.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
