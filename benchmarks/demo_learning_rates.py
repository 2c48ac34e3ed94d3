"""Which learning rate suits which objective? The ends of the demo's frontier at each rate of one common grid, for every type, after a
quarter of the demo's training.

`python benchmarks/demo_learning_rates.py` writes data/results/demo_learning_rates.json (some five minutes on 2 cores). A rate is judged
by the CE increase it reaches with *at most* x active latents: its frontier, interpolated as a power law between its two ends (linear in
log-log), which above its largest L0 stays where it is and below its smallest is unreachable. The best rate has the lowest geometric mean of
that over x from the first value all rates reach up to BUDGET, the region the demo shows.
"""

import copy
import sys
from pathlib import Path

import numpy as np

from e2e_sae_nb.core import Stopwatch, provenance, read_json, write_json
from e2e_sae_nb.demonstration import DEMO
from e2e_sae_nb.frontiers import frontier
from e2e_sae_nb.members import TYPES, FrontierConfig
from e2e_sae_nb.models import load_subject

GRID = (3e-3, 1e-2, 3e-2)
BUDGET = 75.0
OUT = Path(__file__).resolve().parent.parent / "data" / "results" / "demo_learning_rates.json"


def best(rows: list[dict]) -> dict[str, float]:
    chosen = {}
    for kind in TYPES:
        curves = {lr: sorted((r["l0"], r["ce_increase"]) for r in rows if r["type"] == kind and r["lr"] == lr) for lr in GRID}
        budgets = np.linspace(max(c[0][0] for c in curves.values()), BUDGET, 20)
        score = {lr: float(np.interp(np.log(budgets), *np.log(list(zip(*c, strict=True)))).mean()) for lr, c in curves.items()}
        chosen[kind] = min(score, key=lambda lr: score[lr])
    return chosen


def main() -> None:
    subject, clock = load_subject(DEMO["tlens_model_name"], device="cpu"), Stopwatch()
    rows = read_json(OUT)["runs"] if OUT.is_file() else []  # rates that are done are not run again; delete the file to begin anew
    for lr in sorted(set(GRID) - {r["lr"] for r in rows}):
        values = copy.deepcopy(DEMO) | {"save_dir": None} | {key: DEMO[key] // 4 for key in ("n_samples", "warmup_samples")}
        for spec in values["frontier"].values():
            spec["lr"], spec["sparsity"] = lr, [spec["sparsity"][0], spec["sparsity"][-1]]
        for r in frontier(FrontierConfig.from_dict(values), subject=subject).frame.to_dict("records"):
            rows.append({key: r[key] for key in ("type", "lr", "sparsity_coeff", "l0", "ce_increase", "kl", "alive", "tokens", "seconds")})
            print(rows[-1], file=sys.stderr, flush=True)
        record = provenance({k: v for k, v in DEMO.items()}, seed=0, tokens=sum(r["tokens"] for r in rows), seconds=float(clock),
                            command="python benchmarks/demo_learning_rates.py")
        finished = len({r["lr"] for r in rows}) == len(GRID)
        write_json(OUT, {"grid": GRID, "budget": BUDGET, "runs": rows, "best": best(rows) if finished else None, "provenance": record})


if __name__ == "__main__":
    main()
