"""Norms, angles, principal directions and resample ablations for the kept SAEs: `python tools/activation_facts.py` (some minutes)."""

from typing import Any

import torch

from e2e_sae_nb.activations import InOut, by_position, correlations, cosine, input_output, norm_ratio, principal_directions, resample_kl
from e2e_sae_nb.core import Stopwatch, provenance, repo_root, write_json
from e2e_sae_nb.geometry import random_directions
from e2e_sae_nb.kept import DEPTHS, Kept, held_out, load_kept
from e2e_sae_nb.models import Subject, load_subject

SETTINGS = {"sequences": 100, "pca_sequences": 50, "resampled_sequences": 30, "directions": 30, "random_directions": 5, "bins": 80}


def shares(values: torch.Tensor, edges: torch.Tensor) -> list[float]:
    "Share of values per bin."
    return [round(v, 5) for v in (torch.histogram(values.flatten().float(), edges).hist / values.numel()).tolist()]


def means(values: torch.Tensor) -> dict[str, float]:
    return by_position(values)._asdict()


def type_facts(kept: Kept, both: InOut, edges: torch.Tensor) -> dict[str, Any]:
    "Length and angle of one SAE's outputs."
    return {"run": kept.facts["run"], "latents": kept.sae.d_sae, "ratio": means(norm_ratio(both)), "cosine": means(cosine(both)), "output_norm": means(both.output.norm(dim=-1)),
            "norm_share": shares(both.output[:, 1:].norm(dim=-1), edges), "cosine_share": shares(cosine(both)[:, 1:], torch.linspace(-1, 1, SETTINGS["bins"] + 1))}


def depth_facts(subject: Subject, triple: dict[str, Kept]) -> dict[str, Any]:
    "Everything about one depth."
    place = triple["local"].place
    tokens = held_out(triple["local"], subject, SETTINGS["sequences"])
    passed = {kind: input_output(subject, place, k.sae, tokens) for kind, k in triple.items()}
    x = passed["local"].input
    norms = torch.cat([x.norm(dim=-1)[:, 1:], *(both.output.norm(dim=-1)[:, 1:] for both in passed.values())]).clamp_min(1e-3)
    low, high = norms.flatten().quantile(torch.tensor([0.0005, 0.9995])).log10().tolist()
    edges = torch.logspace(low, high, SETTINGS["bins"] // 2 + 1)
    found = principal_directions(x[: SETTINGS["pca_sequences"]].flatten(0, 1), SETTINGS["directions"])
    follows = {kind: {"first": correlations(both.input[:, 0], both.output[:, 0], found.rows),
                      "later": correlations(both.input[:, 1:].flatten(0, 1), both.output[:, 1:].flatten(0, 1), found.rows)} for kind, both in passed.items()}
    some, others = tokens[: SETTINGS["resampled_sequences"]], random_directions(SETTINGS["random_directions"], x.shape[-1])
    kl = resample_kl(subject, place, some, torch.cat([found.rows, others]))
    count = len(found.rows)
    listed = [{"share": found.share[i].item(), "kl": kl[i].item(), "types": {kind: {where: round(c[i].item(), 4) for where, c in f.items()} for kind, f in follows.items()}}
              for i in range(count)]
    listed[0]["row"] = [round(v, 5) for v in found.rows[0].tolist()]
    return {"place": place, "input_norm": means(x.norm(dim=-1)), "norm_edges": [round(v, 4) for v in edges.tolist()],
            "input_norm_share": shares(x[:, 1:].norm(dim=-1), edges), "types": {kind: type_facts(k, passed[kind], edges) for kind, k in triple.items()},
            "directions": listed, "random_kl": kl[count:].mean().item()}


def main() -> None:
    clock, subject = Stopwatch(), load_subject("docstrings", device="cpu")
    triples = {depth: load_kept(depth) for depth in DEPTHS}
    facts = {}
    for depth, triple in triples.items():
        facts[depth] = depth_facts(subject, triple)
        print(f"{depth}: {float(clock):.0f} s", flush=True)
    runs = {depth: {kind: k.facts["run"] for kind, k in triple.items()} for depth, triple in triples.items()}
    write_json(repo_root() / "data" / "results" / "activations.json", {"depths": facts, "provenance": provenance(
        SETTINGS | {"runs": runs}, seed=0, tokens=len(DEPTHS) * SETTINGS["sequences"] * 256, seconds=float(clock), command="python tools/activation_facts.py")})


if __name__ == "__main__":
    main()
