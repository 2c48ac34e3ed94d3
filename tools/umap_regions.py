"""Lay the kept dictionaries out in the plane, for the page on geometry: `python tools/umap_regions.py` writes data/results/umap.json.

UMAP (cosine distance) of the local and e2e+ds directions that fire, of the triple of similar CE increase; regions by HDBSCAN of the plane. Needs the
extra `umap`; the page itself only reads the file.
"""

import warnings
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from e2e_sae_nb.checkpoint import load_saes
from e2e_sae_nb.core import Stopwatch, load_result, provenance, write_json

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"n_neighbors": 15, "min_dist": 0.1, "metric": "cosine"}
REGION = {"min_cluster_size": 20}


def main() -> None:
    import umap
    from sklearn.cluster import HDBSCAN

    clock, kept = Stopwatch(), load_result(ROOT / "data" / "saes" / "index.json")["saes"]
    rows, points = [], []
    for name, row in kept.items():
        if "ce" in row["groups"] and row["type"] in ("local", "e2e+ds"):
            directions = F.normalize(load_saes(ROOT / "data" / "saes" / name)[row["position"]].W_dec.detach().float(), dim=-1)[row["fired"]]
            rows.append(directions.numpy())
            points += [{"type": row["type"], "sae": name, "latent": latent} for latent in row["fired"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one seed means one thread, as umap tells
        plane = umap.UMAP(random_state=0, **SETTINGS).fit_transform(np.concatenate(rows))  # pyright: ignore[reportArgumentType]
    plane = np.asarray(plane)
    region = HDBSCAN(**REGION).fit_predict(plane)  # pyright: ignore[reportArgumentType]
    for point, (x, y), label in zip(points, plane.tolist(), region.tolist(), strict=True):
        point |= {"x": round(x, 3), "y": round(y, 3), "region": label}
    write_json(ROOT / "data" / "results" / "umap.json", {"points": points, "provenance": provenance(
        {"umap": SETTINGS, "hdbscan": REGION}, seed=0, seconds=float(clock), command="python tools/umap_regions.py")})


if __name__ == "__main__":
    main()
