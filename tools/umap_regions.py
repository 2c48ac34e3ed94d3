"""Embed the alive directions of the kept local and e2e+ds SAEs in the plane: `python tools/umap_regions.py` (needs umap-learn; a few minutes).

The map of the middle depth is stored whole; of other seeds of UMAP and of the other depths, the counts of their regions.
"""

import warnings
from collections import Counter
from typing import Any

import torch

from e2e_sae_nb.core import Stopwatch, provenance, repo_root, versions, write_json
from e2e_sae_nb.features import direct_effects
from e2e_sae_nb.geometry import regions
from e2e_sae_nb.kept import DEPTHS, held_out, load_kept
from e2e_sae_nb.models import Subject, load_subject
from e2e_sae_nb.token_texts import TokenTexts

SETTINGS: dict[str, Any] = {"n_neighbors": 15, "min_dist": 0.05, "metric": "cosine", "random_state": 0}
RULE = {"k": 20, "share": 0.75, "least": 20}
SHOWN = 12  # regions at most
SEEDS = {"early": 3, "middle": 5, "late": 3}  # how many seeds of UMAP, from random_state on


def embed(rows: torch.Tensor, seed: int) -> tuple[torch.Tensor, str]:
    "Two coordinates per row, and the package's version."
    try:
        import umap
    except ImportError:
        raise SystemExit("this tool needs UMAP: pip install umap-learn") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a fixed seed allows one thread only
        return torch.from_numpy(umap.UMAP(**SETTINGS | {"random_state": seed}).fit_transform(rows.numpy())).round(decimals=2), umap.__version__


def describe(subject: Subject, rows: torch.Tensor, is_ds: torch.Tensor, index: int, how: dict[str, Any]) -> dict[str, Any]:
    "One region: its counts, and words its directions raise."
    word = TokenTexts(subject.tokenizer).alone
    ds = int(is_ds.sum())
    majority = rows[is_ds if 2 * ds > len(rows) else ~is_ds]
    (mean,) = direct_effects(subject, torch.nn.functional.normalize(majority.mean(0), dim=-1)[None], k=5, **how)
    first = Counter(word(effect["up"][0][0]) for effect in direct_effects(subject, rows, k=1, **how))
    return {"name": "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[index], "ds": ds, "local": len(rows) - ds, "mean_raises": [word(token) for token, _ in mean["up"]],
            "commonest": sorted(first.items(), key=lambda pair: (-pair[1], pair[0]))[:4]}


def counted(label: torch.Tensor, is_ds: torch.Tensor) -> list[list[int]]:
    "e2e+ds and local directions of each region, largest region first."
    return [[int(is_ds[label == i].sum()), int((~is_ds[label == i]).sum())] for i in range(int(label.max()) + 1)]


def main() -> None:
    clock, subject, seeds, runs, stored = Stopwatch(), load_subject("docstrings", device="cpu"), [], {}, {}
    for depth in DEPTHS:
        kept = {kind: k for kind, k in load_kept(depth).items() if kind != "e2e"}
        rows = torch.cat([k.sae.dictionary.detach() for k in kept.values()])
        kinds = [kind for kind, k in kept.items() for _ in range(k.sae.d_sae)]
        is_ds, runs[depth] = torch.tensor([kind == "e2e+ds" for kind in kinds]), {kind: k.facts["run"] for kind, k in kept.items()}
        for seed in range(SETTINGS["random_state"], SETTINGS["random_state"] + SEEDS[depth]):
            points, version = embed(rows, seed)
            label = regions(points, is_ds, **RULE)
            seeds.append({"depth": depth, "seed": seed, "regions": counted(label, is_ds)})
            print(f"{depth}, seed {seed}: e2e+ds/local " + ", ".join(f"{ds}/{local}" for ds, local in seeds[-1]["regions"]) + f"; {float(clock):.0f} s", flush=True)
            if (depth, seed) == ("middle", SETTINGS["random_state"]):
                count = min(int(label.max()) + 1, SHOWN)
                one = kept["local"]
                how = {"place": one.place, "tokens": held_out(one, subject, 8)[:, :64]}
                stored = {"rule": RULE, "regions": [describe(subject, rows[label == i], is_ds[label == i], i, how) for i in range(count)],
                          "region_count": int(label.max()) + 1, "x": [round(v, 2) for v in points[:, 0].tolist()],
                          "y": [round(v, 2) for v in points[:, 1].tolist()], "type": kinds}
    record = provenance({"umap": SETTINGS, "rule": RULE, "seeds": SEEDS, "runs": runs}, seed=SETTINGS["random_state"], seconds=float(clock),
                        command="python tools/umap_regions.py")
    record["versions"] = versions() | {"umap-learn": version}
    print(write_json(repo_root() / "data" / "results" / "umap.json", stored | {"seeds": seeds, "provenance": record}).name)


if __name__ == "__main__":
    main()
