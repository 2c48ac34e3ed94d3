"""Measure how many latents the tasks of page 49 take, for every kept SAE: `python tools/faithfulness_results.py` (a few minutes)."""

from e2e_sae_nb.core import Stopwatch, provenance, repo_root, write_json
from e2e_sae_nb.faithfulness import curve, encode, summarise, tasks
from e2e_sae_nb.kept import DEPTHS, load_kept
from e2e_sae_nb.models import load_subject

SETTINGS = {"depths": list(DEPTHS), "match": "ce", "seed": 0, "pairs": 48, "share": 0.8, "resamples": 1000}


def rounded(value):
    "Four decimals are more than the intervals allow."
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    clock, subject, rows = Stopwatch(), load_subject("docstrings", device="cpu"), []
    prompts = {name: encode(task, subject) for name, task in tasks(SETTINGS["pairs"]).items()}
    for depth in DEPTHS:
        for kind, kept in load_kept(depth, SETTINGS["match"], SETTINGS["seed"]).items():
            for name, asked in prompts.items():
                found = summarise(curve(subject, kept.place, kept.sae, asked), SETTINGS["share"], resamples=SETTINGS["resamples"])
                facts = {"depth": depth, "type": kind, "task": name, "place": kept.place, "l0": kept.facts["l0"], "ce_increase": kept.facts["ce_increase"]}
                rows.append(facts | rounded(found))
                print(f"{depth} {kind} {name}: {found['all']:.2f} with all latents, {found['needed']} needed, {float(clock):.0f} s", flush=True)
    tokens = sum(int(p.last.sum()) + len(p.last) for p in prompts.values())
    origin = provenance(SETTINGS, seed=0, tokens=tokens, seconds=float(clock), command="python tools/faithfulness_results.py")
    write_json(repo_root() / "data" / "results" / "faithfulness.json", {"share": SETTINGS["share"], "rows": rows, "provenance": origin})


if __name__ == "__main__":
    main()
