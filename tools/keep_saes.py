"""Keep SAEs of a finished sweep as those that pages load: `python tools/keep_saes.py [out/paper]`.

Of every part whose table is there: the triple alike in CE increase (seed 0); in the middle also the same SAEs of seed 1, and the triple alike
in L0. Parts are called as depths. Parts that are not there keep what is stored of them.
"""

import itertools
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from e2e_sae_nb.config import to_dict
from e2e_sae_nb.core import read_json, repo_root
from e2e_sae_nb.evaluation import evaluate_many
from e2e_sae_nb.kept import DEPTHS, alive_latents, choose, folder_name, keep, prune
from e2e_sae_nb.models import Subject
from e2e_sae_nb.runs import load_run
from e2e_sae_nb.state import data_for, subject_for

CHECKED = 8  # sequences on which the kept SAE is compared with the whole one
COMMAND = "e2e-sae sweep data/sweeps/paper.yaml --out out/paper; python tools/keep_saes.py out/paper"


def wanted(depth: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Mapping[str, Any], list[str]]]:
    "Folder name -> (row, what it is matched in)."
    found: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    own = [row for row in rows if row["seed"] == 0]
    for kind, row in choose(own, "ce").items():
        found[folder_name(depth, kind, "ce", 0)] = (row, ["ce"])
        if depth == "middle":
            twin = [r for r in rows if r["seed"] == 1 and (r["type"], r["sparsity_coeff"]) == (kind, row["sparsity_coeff"])]
            found |= {folder_name(depth, kind, "ce", 1): (r, ["ce"]) for r in twin}
    if depth == "middle":
        for kind, row in choose(own, "l0").items():
            same = found[folder_name(depth, kind, "ce", 0)]
            if same[0] is row:
                same[1].append("l0")
            else:
                found[folder_name(depth, kind, "l0", 0)] = (row, ["l0"])
    return found


def keep_part(source: Path, target: Path, subject: Subject | None) -> Subject:
    "Keep the chosen SAEs of one part."
    table = read_json(source / "table.json")
    chosen = wanted(source.name, table["rows"])
    origin = {key: value for key, value in table["provenance"].items() if key != "config"} | {"command": COMMAND}
    for old in target.glob(f"{source.name}_*"):
        shutil.rmtree(old)
    for name, (row, matches) in chosen.items():
        run = load_run(source / row["run"])
        subject = subject or subject_for(run.config)
        batches = list(itertools.islice(data_for(run.config, subject, "eval"), row["eval_tokens"] // (run.config.batch_size * run.config.train_data.n_ctx)))
        alive = alive_latents(subject, run.saes, batches)
        small = {place: prune(sae, alive[place]).half().float() for place, sae in run.saes.items()}
        whole, kept = evaluate_many(subject, [run.saes, small], batches[: CHECKED // run.config.batch_size])
        facts = {key: value for key, value in row.items() if key not in ("ce_increase_per_sequence", "downstream")} | {
            "matches": matches, "check": {"sequences": CHECKED, "ce_increase_whole": whole.ce_increase, "ce_increase_kept": kept.ce_increase},
            "config": to_dict(replace(run.config, save_dir=None)), "provenance": origin}
        keep(run, target / name, facts, alive)
        print(f"{name}: L0 {row['l0']:.1f}, CE increase {row['ce_increase']:.3f}, {sum(int(a.sum()) for a in alive.values())} latents", flush=True)
    return subject


def main(source: Path) -> None:
    target, subject = repo_root() / "data" / "saes", None
    for depth in DEPTHS:
        if (source / depth / "table.json").is_file():
            subject = keep_part(source / depth, target, subject)
        else:
            print(f"{depth}: no table in {source / depth}, left as it is")
    print(f"{sum(path.stat().st_size for path in target.rglob('*') if path.is_file()) / 1e6:.1f} MB of at most 24")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("out/paper"))
