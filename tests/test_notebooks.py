"""Every notebook runs: in a fresh kernel as a reader runs it, and under nbdev's own runner as its developers do."""

import pytest
from notebooks import all_notebooks, run

NOTEBOOKS = all_notebooks()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_run_all(path):
    notebook = run(path)
    executed = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert executed, "a notebook without code cells has nothing to run"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_nbdev(path, monkeypatch):
    from nbdev.test import test_nb

    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("IN_TEST", "1")
    passed, _ = test_nb(path, skip_flags=["notest", "slow", "cuda"])
    assert passed, f"a cell of {path.name} failed; see the captured output"
