"""Embed the alive directions of the kept middle local and e2e+ds SAEs in the plane: `python tools/umap_regions.py` (needs umap-learn)."""

import warnings
from collections import Counter
from typing import Any

import torch

from e2e_sae_nb.core import Stopwatch, provenance, repo_root, versions, write_json
from e2e_sae_nb.features import direct_effects
from e2e_sae_nb.geometry import regions
from e2e_sae_nb.kept import load_kept
from e2e_sae_nb.models import Subject, load_subject

SETTINGS: dict[str, Any] = {"n_neighbors": 15, "min_dist": 0.05, "metric": "cosine", "random_state": 0}
RULE = {"k": 20, "share": 0.75, "least": 20}
SHOWN = 12  # regions at most


def embed(rows: torch.Tensor) -> tuple[torch.Tensor, str]:
    "Two coordinates per row, and the package's version."
    try:
        import umap
    except ImportError:
        raise SystemExit("this tool needs UMAP: pip install umap-learn") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a fixed seed allows one thread only
        return torch.from_numpy(umap.UMAP(**SETTINGS).fit_transform(rows.numpy())).round(decimals=2), umap.__version__


def describe(subject: Subject, rows: torch.Tensor, is_ds: torch.Tensor, index: int) -> dict[str, Any]:
    "One region: its counts, and words its directions raise."
    word = lambda token: subject.tokenizer.decode([token])
    ds = int(is_ds.sum())
    majority = rows[is_ds if 2 * ds > len(rows) else ~is_ds]
    (mean,) = direct_effects(subject, torch.nn.functional.normalize(majority.mean(0), dim=-1)[None], k=5)
    first = Counter(word(effect["up"][0][0]) for effect in direct_effects(subject, rows, k=1))
    return {"name": "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[index], "ds": ds, "local": len(rows) - ds, "mean_raises": [word(token) for token, _ in mean["up"]],
            "commonest": sorted(first.items(), key=lambda pair: (-pair[1], pair[0]))[:4]}


def main() -> None:
    clock, subject = Stopwatch(), load_subject("docstrings", device="cpu")
    kept = {kind: k for kind, k in load_kept("middle").items() if kind != "e2e"}
    rows = torch.cat([k.sae.dictionary.detach() for k in kept.values()])
    kinds = [kind for kind, k in kept.items() for _ in range(k.sae.d_sae)]
    is_ds = torch.tensor([kind == "e2e+ds" for kind in kinds])
    points, version = embed(rows)
    label = regions(points, is_ds, **RULE)
    count = min(int(label.max()) + 1, SHOWN)
    record = provenance({"umap": SETTINGS, "rule": RULE, "runs": {kind: k.facts["run"] for kind, k in kept.items()}}, seed=SETTINGS["random_state"],
                        seconds=float(clock), command="python tools/umap_regions.py")
    record["versions"] = versions() | {"umap-learn": version}
    coordinates = {"x": [round(v, 2) for v in points[:, 0].tolist()], "y": [round(v, 2) for v in points[:, 1].tolist()]}
    print(write_json(repo_root() / "data" / "results" / "umap.json", {
        "rule": RULE, "regions": [describe(subject, rows[label == i], is_ds[label == i], i) for i in range(count)], "region_count": int(label.max()) + 1,
        **coordinates, "type": kinds, "provenance": record}).name, f"{count} regions")


if __name__ == "__main__":
    main()
