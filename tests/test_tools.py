"""The tools around the notebooks: landing page, link checker, documentation glue, and what the wheel carries."""

import re
import shutil
import subprocess
import sys

import check_site
import pytest
import readme
from conftest import ROOT

from e2e_sae_nb import _docs

MODEL = ROOT / "data" / "docstrings-lm"


@pytest.mark.parametrize("text, expected", [
    ("[core](00_core.ipynb#seed)", "[core](nbs/00_core.ipynb#seed)"),
    ("![figure](images/x.png)", "![figure](nbs/images/x.png)"),
    ("[licence](../LICENSE)", "[licence](LICENSE)"),
    ('<img src="../data/x.png">', '<img src="data/x.png">'),
    ("[a](https://example.org) [b](#below) [c](mailto:x@example.org)", "[a](https://example.org) [b](#below) [c](mailto:x@example.org)"),
    ("`f[0](x)` [y](y.md)", "`f[0](x)` [y](nbs/y.md)"),
    ("```python\nf[0](x)\n```\n[y](y.md)", "```python\nf[0](x)\n```\n[y](nbs/y.md)"),
])
def test_readme_links(text, expected):
    assert readme.links(text) == expected


@pytest.mark.parametrize("source, outputs, expected", [
    ("1 + 1", [{"data": {"text/plain": ["2"]}}], "```python\n1 + 1\n```\n\n```\n2\n```\n"),
    ("#| echo: false\nprint(3)", [{"name": "stdout", "text": ["3\n"]}], "```\n3\n```\n"),
    ("#| output: false\nx", [{"data": {"text/plain": ["5"]}}], "```python\nx\n```\n"),
    ("#| hide\nimport os", [], "\n"),
    ("x", [{"name": "stderr", "text": ["noise"]}], "```python\nx\n```\n"),
    ("plot()", [{"data": {"image/png": "..", "text/plain": ["<Figure>"]}}], "```python\nplot()\n```\n"),
    ("show()", [{"data": {"text/markdown": ["[y](y.md)"], "text/plain": ["<obj>"]}}], "```python\nshow()\n```\n\n[y](nbs/y.md)\n"),
])
def test_readme_cells(source, outputs, expected):
    assert readme.render([{"cell_type": "code", "source": source, "outputs": outputs}]) == expected


def test_readme_fence_survives_fences_inside():
    assert readme.fenced("```\nx\n```").startswith("````\n")


@pytest.mark.parametrize("body, says", [
    ('<a href="b.html#here">ok</a>', None),
    ('<a href="https://example.org">a link may leave</a>', None),
    ('<a href="missing.html">x</a>', "broken link"),
    ('<a href="b.html#nowhere">x</a>', "no such anchor"),
    ('<script src="https://example.org/x.js"></script>', "loads"),
])
def test_check_site(tmp_path, body, says):
    (tmp_path / "a.html").write_text(body)
    (tmp_path / "b.html").write_text('<p id="here">')
    found = check_site.problems(tmp_path)
    assert (not found) if says is None else (len(found) == 1 and says in found[0])


def test_check_site_wants_pages(tmp_path):
    assert check_site.problems(tmp_path)


def test_docs_make_pages_load_nothing(tmp_path):
    page = '<link href="https://example.org/katex.css"><span class="math inline">\\(\\frac{a}{b}\\)</span>'
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "a.css").write_text("@import url(https://example.org/font.css);p{}")
    assert _docs._offline(tmp_path) == []
    assert "<mfrac>" in (tmp_path / "a.html").read_text() and check_site.problems(tmp_path) == []


@pytest.mark.parametrize("formula, says", [(r"\left( x", "formula"), (r"\nosuchmacro x", "unknown macro")])
def test_docs_name_the_formula_that_fails(tmp_path, formula, says):
    (tmp_path / "a.html").write_text(f'<span class="math inline">\\({formula}\\)</span>')
    (wrong,) = _docs._offline(tmp_path)
    assert "a.html" in wrong and says in wrong


@pytest.mark.parametrize("symbol, anchor", [("sae", "#sae"), ("sae.encode", "#sae"), ("_private", ""), (None, "")])
def test_docs_link_to_what_a_page_shows(symbol, anchor, monkeypatch):
    page = "/nbs/06_sae.ipynb"
    monkeypatch.setattr(_docs, "_pages", lambda: {"https://site.example/sae.html": page})
    text = f"[x](https://site.example/sae.html{'#' + symbol if symbol else ''}) and [y](https://elsewhere.example/sae.html#z)"
    assert _docs._local(text) == f"[x]({page}{anchor}) and [y](https://elsewhere.example/sae.html#z)"


@pytest.fixture
def checkout(tmp_path):
    "What a build reads, in a copy: setuptools leaves traces where it runs."
    ours = tmp_path / "checkout"
    shutil.copytree(ROOT / "e2e_sae_nb", ours / "e2e_sae_nb", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(MODEL, ours / "data" / MODEL.name)
    shutil.copy(ROOT / "data" / "paper.json", ours / "data" / "paper.json")
    for name in ("setup.py", "settings.ini", "README.md"):
        shutil.copy(ROOT / name, ours / name)
    return ours


def build(checkout):
    pytest.importorskip("setuptools")
    return subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", "lib"], cwd=checkout, capture_output=True, text=True)


def test_wheel_carries_the_model(checkout):
    (checkout / "data" / "other").mkdir()
    (checkout / "lib" / "e2e_sae_nb").mkdir(parents=True)
    (checkout / "lib" / "e2e_sae_nb" / "renamed.py").touch()
    result = build(checkout)
    assert result.returncode == 0, result.stderr
    package = checkout / "lib" / "e2e_sae_nb"
    assert {p.name for p in (package / "_data").iterdir()} == {MODEL.name, "paper.json"}
    assert {p.name for p in (package / "_data" / MODEL.name).iterdir()} == {p.name for p in MODEL.iterdir()}
    assert (package / "py.typed").is_file() and not (package / "renamed.py").exists()
    assert {p.name for p in package.glob("*.py")} == {p.name for p in (ROOT / "e2e_sae_nb").glob("*.py")}
    assert not (checkout / "e2e_sae_nb" / "_data").exists()


def test_wheel_without_weights_is_refused(checkout):
    (checkout / "data" / MODEL.name / "model.safetensors").unlink(missing_ok=True)
    result = build(checkout)
    assert result.returncode != 0 and "model.safetensors is missing" in result.stderr


def test_versions_agree():
    version = re.search(r"^version = (\S+)$", (ROOT / "settings.ini").read_text(), re.M)
    assert version
    assert f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## \[?{re.escape(version[1])}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)


@pytest.mark.full
def test_site_builds(tmp_path):
    "The whole site by the renderer from PyPI, in a copy, with every link and anchor checked."
    copy = tmp_path / "site"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "_docs", "_proc", "out", "build", "*.egg-info", "__pycache__"))
    result = subprocess.run([sys.executable, "-m", "e2e_sae_nb._docs"], cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert check_site.problems(copy / "_docs") == []
