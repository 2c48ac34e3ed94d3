"""The package as a user gets it: built into a wheel, installed into a clean environment, used from another folder (make test-full)."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.full


def cells(notebook) -> str:
    "The code of a notebook as a script; cells are separated, so that a failure names its lines."
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in found if cell["cell_type"] == "code" and "nbdev_export(" not in "".join(cell["source"]))


def test_install_and_use_from_anywhere(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", ROOT], check=True, stderr=subprocess.DEVNULL)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*words):
        return subprocess.run(words, cwd=elsewhere, capture_output=True, text=True, check=True).stdout

    where = run(python, "-c", "import e2e_sae_nb; print(e2e_sae_nb.__file__)")
    assert str(tmp_path) in where, "the checkout was imported, not the installed package"
    assert "demo" in run(tmp_path / "env" / "bin" / "e2e-sae", "--help")
    found = run(python, "-c", "from e2e_sae_nb import load_subject; from e2e_sae_nb.core import data_path, repo_root; "
                              "print(repo_root(), data_path('docstrings-lm'), load_subject('docstrings', device='cpu'))")
    assert "Table 5" in run(python, "-c", "from e2e_sae_nb.pareto import paper; print(paper('norm_ratio')['source'])")
    assert found.startswith("None ") and "_data/docstrings-lm" in found and "6 blocks" in found
    (elsewhere / "tutorial.py").write_text(cells(ROOT / "nbs" / "tutorials" / "tutorial.ipynb"), encoding="utf-8")
    done = subprocess.run([python, "tutorial.py"], cwd=elsewhere, capture_output=True, text=True, timeout=900, env={**os.environ, "MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "largest change of a logit" in done.stdout
