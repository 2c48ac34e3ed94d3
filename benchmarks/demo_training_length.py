"""How does the comparison depend on training length, at denser codes than the demo's? One frontier again and again, with more and more tokens.

`python benchmarks/demo_training_length.py` writes data/results/demo_training_length.json (some seventeen minutes on 2 cores). Lengths that are
in the file are not run again; delete it to begin anew.
"""

import copy
import sys
from pathlib import Path

from e2e_sae_nb.core import Stopwatch, provenance, read_json, write_json
from e2e_sae_nb.demonstration import DEMO, summary_of
from e2e_sae_nb.frontiers import frontier
from e2e_sae_nb.members import FrontierConfig
from e2e_sae_nb.models import load_subject

LENGTHS = (500, 1000, 4000)  # training samples of 256 tokens; warm-up keeps its share
SPARSITY = {"local": [1.0, 2.0, 3.5], "e2e": [0.1, 0.25, 0.6], "e2e+ds": [2.5, 5.0, 10.0]}
OUT = Path(__file__).resolve().parent.parent / "data" / "results" / "demo_training_length.json"
KEPT = ("type", "lr", "sparsity_coeff", "l0", "ce_increase", "kl", "alive", "tokens", "seconds", "seconds_shared")


def main() -> None:
    subject = load_subject(DEMO["tlens_model_name"], device="cpu")
    lengths = read_json(OUT)["lengths"] if OUT.is_file() else []
    for n in LENGTHS:
        if n in [done["samples"] for done in lengths]:
            continue
        clock, values = Stopwatch(), copy.deepcopy(DEMO)
        values |= {"save_dir": None, "n_samples": n, "warmup_samples": n * DEMO["warmup_samples"] // DEMO["n_samples"]}
        for kind, spec in values["frontier"].items():
            spec["sparsity"] = SPARSITY[kind]
        runs = frontier(FrontierConfig.from_dict(values), subject=subject)
        origin = provenance(values, seed=0, tokens=sum(r.summary["tokens"] for r in runs), seconds=float(clock),
                            command="python benchmarks/demo_training_length.py")
        summary = summary_of(runs, origin)
        lengths.append({"samples": n, "tokens": runs[0].summary["tokens"], "runs": [{k: r[k] for k in KEPT} for r in summary["runs"]],
                        "ce_increase_ratio_to_local": summary["ce_increase_ratio_to_local"],
                        "ce_increase_ratio_interval": summary["ce_increase_ratio_interval"], "provenance": origin})
        print(n, lengths[-1]["ce_increase_ratio_to_local"], f"{float(clock):.0f} s", file=sys.stderr, flush=True)
        write_json(OUT, {"lengths": sorted(lengths, key=lambda done: done["samples"]), "provenance": origin})


if __name__ == "__main__":
    main()
