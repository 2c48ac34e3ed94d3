"""Every notebook runs: in a fresh kernel as a reader runs it, and under nbdev's own runner as its developers do."""

import configparser

import pytest
from conftest import ROOT
from notebooks import all_notebooks, run

NOTEBOOKS = all_notebooks()
SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_run_all(path):
    notebook = run(path)
    executed = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert executed, "a notebook without code cells has nothing to run"


# The same cells under nbdev's runner: every tenth notebook shows that the runner works with these settings, and the full
# tests run it on all, since twice the notebooks would be half of what CI waits for.
SAMPLE = NOTEBOOKS[::10]
BOTH = [path if path in SAMPLE else pytest.param(path, marks=pytest.mark.full) for path in NOTEBOOKS]


@pytest.mark.parametrize("path", BOTH, ids=lambda p: p.stem)
def test_nbdev(path, monkeypatch):
    from nbdev.test import test_nb

    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("IN_TEST", "1")
    passed, _ = test_nb(path, skip_flags=SETTINGS["DEFAULT"]["tst_flags"].split())
    assert passed, f"a cell of {path.name} failed; see the captured output"
