"""Which SAEs of a sweep are kept, and under which names."""

import itertools

from keep_saes import wanted

from e2e_sae_nb.kept import TYPES, choose


def rows(seeds=(0, 1)) -> list[dict]:
    "A sweep's rows: CE increases that fall with L0; types differ by a factor."
    return [{"type": kind, "seed": seed, "sparsity_coeff": coeff, "l0": 60 / coeff + i + seed, "ce_increase": (0.1 + 0.02 * i) * coeff}
            for seed in seeds for i, kind in enumerate(TYPES) for coeff in (1, 2, 4)]


def test_one_triple_for_an_outer_depth():
    found = wanted("late", rows())
    assert list(found) == [f"late_{kind}_ce_s0" for kind in ("local", "e2e", "e2e_ds")]
    assert all(row["seed"] == 0 and matches == ["ce"] for row, matches in found.values())


def test_the_middle_has_a_second_seed_and_a_triple_alike_in_l0():
    found = wanted("middle", rows())
    names = [f"middle_{kind}" for kind in ("local", "e2e", "e2e_ds")]
    for name in names:
        first, second = found[f"{name}_ce_s0"][0], found[f"{name}_ce_s1"][0]
        assert (first["seed"], second["seed"]) == (0, 1) and first["sparsity_coeff"] == second["sparsity_coeff"]
        assert ("l0" in found[f"{name}_ce_s0"][1]) != (f"{name}_l0_s0" in found), "stored once, under one of the names"


def test_choice_is_the_closest_of_all_triples():
    own = rows(seeds=(0,))
    spread = lambda triple: max(r["l0"] for r in triple) / min(r["l0"] for r in triple)
    every = itertools.product(*([r for r in own if r["type"] == kind and r["ce_increase"] <= 1] for kind in TYPES))
    assert spread(choose(own, "l0").values()) == min(map(spread, every))
