"""No make target passes without a test having run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def make(folder: Path, *words: str, python: str) -> subprocess.CompletedProcess:
    "A target in a folder that holds nothing but the Makefile, with a Python of the test's making."
    shutil.copy(ROOT / "Makefile", folder)
    made = program(folder / "python", python)
    words = [shutil.which("make"), "--no-print-directory", *words, f"PYTHON={made}"]
    free = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}  # these tests may run under make
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60, env=free)


def test_gpu_without_torch(tmp_path):
    "One line, a failure, and nothing was installed."
    done = make(tmp_path, "test-gpu", python="exit 1")
    (said,) = (line for line in done.stderr.splitlines() if not line.startswith("make"))
    assert done.returncode != 0 and said.startswith("no test ran: neither .venv/bin/python nor ") and done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "python"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_gpu_without_a_device():
    "With a torch that finds none: one line, and a failure."
    words = [shutil.which("make"), "--no-print-directory", "test-gpu", "BIN=/nowhere", f"PYTHON={sys.executable}"]
    free = {key: value for key, value in os.environ.items() if key != "E2E_SAE_TEST_DEVICE" and not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240, env=free)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line and not line.startswith("make")]
    assert done.returncode != 0 and len(said) == 1 and "no CUDA device here" in said[0]


@pytest.mark.parametrize("status", [0, 1, 5])
def test_gpu_with_a_device(status, tmp_path):
    "The tests are run by the Python that has torch, with what ARGS says; no test, or a failing one, is a failure."
    python = f'if [ "$1" = -c ]; then exit 0; fi; echo "$@"; exit {status}'
    done = make(tmp_path, "test-gpu", "ARGS=-x", python=python)
    assert done.stdout.strip() == "-m pytest -m gpu tests/test_gpu.py -x" and (done.returncode == 0) == (status == 0)


@pytest.mark.parametrize("body, workers, status", [("pass", [], 0), ("pytest.skip('no device')", ["-n", "1"], 5)])
def test_only_skipped_tests_do_not_pass(body, workers, status, tmp_path):
    "With this project's conftest, pytest ends with 5 where nothing ran."
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    (tmp_path / "tests" / "test_it.py").write_text(f"import pytest\n\n\ndef test_it():\n    {body}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *workers, "tests"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == status, done.stdout


def test_what_faults_counts_as_passed():
    from faults import complaint

    good = {
        "kills": 5,
        "kills_during_a_write": 2,
        "kills_before_the_first_checkpoint": 0,
        "resumes": 5,
        "finished_runs": 1,
        "corrupt_checkpoints": 0,
        "failed_resumes": 0,
        "differing_results": 0,
    }
    assert complaint(good, 5) is None
    for key in ("corrupt_checkpoints", "failed_resumes", "differing_results"):
        assert "something was lost" in complaint(good | {key: 1}, 5)
    assert "nothing was shown" in complaint(good, 6) and "nothing was shown" in complaint(
        good | {"finished_runs": 0}, 5
    )
    assert "nothing was shown" in complaint(good | {"kills": 0, "resumes": 0}, 0)
    assert complaint(json.loads((ROOT / "data" / "results" / "faults.json").read_text())["eager"], 200) is None


def test_faults_without_a_kill(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "faults.py", "--kills", "0", "--out", tmp_path / "faults.json"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1 and "nothing was shown: 0 kills" in done.stderr


def test_a_site_without_pages(tmp_path):
    from check_site import problems

    assert problems(tmp_path) == [f"no pages in {tmp_path}"]
