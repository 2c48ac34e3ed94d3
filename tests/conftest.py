import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("E2E_SAE_PROGRESS", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("E2E_SAE_COMPUTE_DTYPE", "float32")  # what is left to measurement is the same on every processor
if not torch.cuda.is_available():  # read when triton is first imported, whichever test does that
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(ROOT / "tools"))
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # threads of several processes that wait for each other on the same cores stand still
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start
    torch.set_num_threads(threads)


def pytest_configure(config: pytest.Config) -> None:
    "Asked for what needs a device, and having none, say so and fail: a run in which all was skipped would look like one that passed."
    if config.option.markexpr.strip() == "gpu" and not torch.cuda.is_available() and "E2E_SAE_TEST_DEVICE" not in os.environ:
        pytest.exit("no CUDA device here; E2E_SAE_TEST_DEVICE=cpu runs what needs none", returncode=1)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


RAN: set[str] = set()  # tests whose body ran to some end


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and (not report.skipped or hasattr(report, "wasxfail")):
        RAN.add(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    "A session in which no test ran, because all were skipped, does not pass: as if none had been found."
    asks = session.config.option.collectonly or hasattr(session.config, "workerinput")
    if exitstatus == 0 and not RAN and not asks:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
