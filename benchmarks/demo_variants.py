"""How does the comparison depend on layer and dictionary size? The demo's frontier, at half its length and with more points, again and again.

`python benchmarks/demo_variants.py` writes data/results/demo_variants.json (some twenty minutes on 2 cores). Variants that are in the file
are not run again; delete it to begin anew.
"""

import copy
import sys
from pathlib import Path

from e2e_sae_nb.core import Stopwatch, provenance, read_json, write_json
from e2e_sae_nb.demonstration import DEMO, summary_of
from e2e_sae_nb.frontiers import frontier
from e2e_sae_nb.members import FrontierConfig
from e2e_sae_nb.models import load_subject

VARIANTS = ((3, 16), (1, 16), (4, 16), (3, 4), (3, 40))  # (block whose input is reconstructed, dictionary size over width)
SAMPLES = 1000  # of 256 tokens; warm-up keeps its share
SPARSITY = {"local": [1.0, 2.0, 4.0, 8.0], "e2e": [0.15, 0.4, 1.0, 2.5], "e2e+ds": [3.0, 7.0, 15.0, 30.0]}
OUT = Path(__file__).resolve().parent.parent / "data" / "results" / "demo_variants.json"
KEPT = ("type", "lr", "sparsity_coeff", "l0", "ce_increase", "kl", "alive", "d_sae", "tokens", "seconds", "seconds_shared")


def main() -> None:
    subject = load_subject(DEMO["tlens_model_name"], device="cpu")
    done = read_json(OUT)["variants"] if OUT.is_file() else []
    for layer, ratio in VARIANTS:
        if (layer, ratio) in [(variant["layer"], variant["ratio"]) for variant in done]:
            continue
        clock, values = Stopwatch(), copy.deepcopy(DEMO)
        values |= {"save_dir": None, "n_samples": SAMPLES, "warmup_samples": SAMPLES * DEMO["warmup_samples"] // DEMO["n_samples"],
                   "saes": {"sae_positions": f"blocks.{layer}.hook_resid_pre", "dict_size_to_input_ratio": ratio}}
        for kind, spec in values["frontier"].items():
            spec["sparsity"] = SPARSITY[kind]
        runs = frontier(FrontierConfig.from_dict(values), subject=subject)
        origin = provenance(values, seed=0, tokens=sum(r.summary["tokens"] for r in runs), seconds=float(clock),
                            command="python benchmarks/demo_variants.py")
        summary = summary_of(runs, origin)
        done.append({"layer": layer, "ratio": ratio, "tokens": runs[0].summary["tokens"], "runs": [{k: r[k] for k in KEPT} for r in summary["runs"]],
                     "ce_increase_ratio_to_local": summary["ce_increase_ratio_to_local"],
                     "ce_increase_ratio_interval": summary["ce_increase_ratio_interval"], "provenance": origin})
        print(layer, ratio, done[-1]["ce_increase_ratio_to_local"], f"{float(clock):.0f} s", file=sys.stderr, flush=True)
        write_json(OUT, {"variants": done, "provenance": origin})


if __name__ == "__main__":
    main()
