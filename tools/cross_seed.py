"""How far do SAEs of different seeds agree? `python tools/cross_seed.py out/architectures` writes data/results/cross_seed.json (some minutes).

For every pair of a sweep's runs that differ in nothing but their seed: the largest cosine of each alive direction of one with an alive
direction of the other, averaged (paper section 3.3.2), and the same for as many random directions.
"""

import sys
from collections import defaultdict
from itertools import islice, permutations
from pathlib import Path

import torch

from e2e_sae_nb.core import Stopwatch, UserError, provenance, read_json, repo_root, write_json
from e2e_sae_nb.geometry import max_cosine, random_directions
from e2e_sae_nb.metrics import fired
from e2e_sae_nb.models import load_subject
from e2e_sae_nb.runs import load_run
from e2e_sae_nb.sparse_step import sparse_forward
from e2e_sae_nb.splicing import original_pass
from e2e_sae_nb.state import data_for

SAME = ("part", "type", "architecture", "p_end", "target_l0", "sparsity_coeff", "lr", "position")
SEQUENCES = 200  # held-out ones, those of the sweep's evaluation


def main(folder: Path) -> None:
    clock, subject, groups = Stopwatch(), load_subject("docstrings", device="cpu"), defaultdict(list)
    paths = sorted(folder.glob("*/table.json"))
    if not paths:
        raise UserError(f"{folder} holds no part of a sweep (a folder with table.json)")
    for path in paths:
        for row in read_json(path)["rows"]:
            groups[tuple(row[key] if key != "sparsity_coeff" or row["target_l0"] is None else None for key in SAME)].append(row)
    inputs, found = {}, []
    for key, rows in groups.items():
        if len(rows) < 2:
            continue
        directions = {}
        for row in rows:
            run, place = load_run(folder / row["part"] / row["run"]), row["position"]
            if place not in inputs:
                inputs[place] = [original_pass(subject, tokens, [place], stop=True).activations[place] for tokens in islice(data_for(run.config, subject, "eval"), SEQUENCES // run.config.batch_size)]
            alive = sum(fired(sparse_forward(run.saes[place], x).c) for x in inputs[place]) > 0
            directions[row["seed"]] = run.saes[place].dictionary.detach()[alive]
        pairs = [{"seeds": [a, b], "mean": float(max_cosine(directions[a], directions[b]).mean()), "share_above_0.9": float((max_cosine(directions[a], directions[b]) > 0.9).float().mean())}
                 for a, b in permutations(directions, 2)]
        least = min(map(len, directions.values()))
        d = directions[rows[0]["seed"]].shape[1]
        chance = float(max_cosine(random_directions(least, d, 0), random_directions(least, d, 1)).mean())
        found.append(dict(zip(SAME, key, strict=True)) | {"alive": {seed: len(v) for seed, v in directions.items()}, "l0": sum(r["l0"] for r in rows) / len(rows), "pairs": pairs, "chance": chance})
        print(f"{found[-1]['type']} {found[-1]['architecture']} {found[-1]['target_l0']}: {sum(p['mean'] for p in pairs) / len(pairs):.3f} (chance {chance:.3f}), {float(clock):.0f} s", flush=True)
    origin = provenance({"sequences": SEQUENCES, "same": list(SAME)}, seed=0, tokens=sum(x.shape[:-1].numel() for xs in inputs.values() for x in xs), seconds=float(clock), command=f"python tools/cross_seed.py {folder}")
    write_json(repo_root() / "data" / "results" / "cross_seed.json", {"rows": found, "provenance": origin})


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/architectures"))
