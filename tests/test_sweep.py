"""The stored figures of a small sweep, trained again."""

import pytest
from conftest import ROOT

from e2e_sae_nb.core import load_result, read_json
from e2e_sae_nb.sweeps import run_sweep


def test_a_small_sweep_gives_the_stored_figures(tmp_path):
    "Rounding differs between processors and grows in training; L0 and losses agree to a hundredth all the same, on the same text."
    stored = {row["type"]: row for row in load_result(ROOT / "data" / "results" / "small.json")["rows"]}
    again = {row["type"]: row for row in read_json(run_sweep(ROOT / "data" / "sweeps" / "small.yaml", tmp_path / "out"))["rows"]}
    assert set(again) == set(stored) == {"local", "e2e", "e2e+ds"}
    for kind, row in again.items():
        assert row["tokens"] == stored[kind]["tokens"]
        for key in ("l0", "ce_increase", "kl", "explained_variance", "ce_orig"):
            assert row[key] == pytest.approx(stored[kind][key], rel=0.02, abs=0.005), (kind, key)
