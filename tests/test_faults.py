"""A sample of `make faults`: five kills at random moments."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from e2e_sae_nb.core import load_result


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_five_kills(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tests" / "faults.py", "--kills", "5", "--seed", "1", "--out", tmp_path / "faults.json"], capture_output=True,
                          text=True, timeout=900, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    counts = json.loads((tmp_path / "faults.json").read_text())["eager"]
    # a kill before the first checkpoint leaves nothing to resume, so that another takes its place
    assert min(counts["kills"], counts["resumes"]) >= 5 and counts["finished_runs"] >= 1
    assert counts["corrupt_checkpoints"] == counts["failed_resumes"] == counts["differing_results"] == 0


def test_the_committed_count():
    counts = load_result(ROOT / "data" / "results" / "faults.json")["eager"]
    assert counts["kills"] >= 200 and counts["kills_during_a_write"] >= 50
    assert counts["corrupt_checkpoints"] == counts["failed_resumes"] == counts["differing_results"] == 0
