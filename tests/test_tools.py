"""The tools around the notebooks: landing page, link checker, documentation glue, and what the wheel carries."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys

import check_site
import pytest
import readme
import yaml
from conftest import ROOT

from e2e_sae_nb import _docs, _modidx, _signatures, cli
from e2e_sae_nb.core import UserError

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


def test_what_quarto_writes_becomes_offline(tmp_path):
    "The step that `_quarto.yml` names, on a page like Quarto's: its own files and text stay, what is loaded from elsewhere goes."
    site = tmp_path / "site"
    shutil.copytree(ROOT / "tests" / "golden" / "quarto", site)
    page, sheet = site / "nbs" / "page.html", site / "site_libs" / "bootstrap" / "bootstrap.min.css"
    before, found = page.read_text(), check_site.problems(site)
    for what in ("require.js", "jquery", "mathjax", "polyfill", "katex", "fonts.gstatic", "Source+Sans", "Lato", "Roboto"):
        assert any(what in problem for problem in found), what
    step = yaml.safe_load((ROOT / "_quarto.yml").read_text())["project"]["post-render"].split()
    assert step[0] == "python"
    for _ in range(2):  # the second time there is nothing left to do
        done = subprocess.run([sys.executable, *step[1:]], cwd=ROOT, env={**os.environ, "QUARTO_PROJECT_OUTPUT_DIR": str(site)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert check_site.problems(site) == []
        text = page.read_text()
        assert text.count("<math") == 3 and "<mfrac>" in text and "define(" not in text
        assert "typesetMath" in text and text[text.index("<pre"):] == before[before.index("<pre"):] and "site_libs/quarto-html/quarto.js" in text
        assert sheet.read_text() == '@charset "UTF-8";:root{--bs-blue: #2780e3}@import"./local.css";body{color:#373a3c}'


def test_the_step_after_rendering_fails_with_a_formula(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.html").write_text(r'<span class="math inline">\(\nosuchmacro x\)</span>')
    monkeypatch.setenv("QUARTO_PROJECT_OUTPUT_DIR", str(tmp_path))
    assert _docs.offline() == 1 and "nosuchmacro" in capsys.readouterr().out


def test_the_renderer_from_pypi_knows_every_key():
    config = pytest.importorskip("smalldocs.config")
    assert [w for w in config.load(ROOT).warnings if not any(known in w for known in _docs.QUARTO_ONLY)] == []


@pytest.mark.parametrize("text, expected", [
    ("### f\n\n```python\ndef f(\n    a:__main__.A | None, # As in [`g`](/nbs/g.ipynb#g)\n)->__main__.A:\n```\n\n*See [`g`](/nbs/g.ipynb#g)*",
     "### f\n\n```python\ndef f(\n    a:A | None, # As in `g`\n)->A:\n```\n\n*See [`g`](/nbs/g.ipynb#g)*"),
    ("`__main__.py` [`g`](g.ipynb)", "`__main__.py` [`g`](g.ipynb)"),
    # where the module is known, from its source: a dataclass with the comments of its fields, types in full
    ("[source](x/e2e_sae_nb/losses.py#L9)\n\n### InToOrigConfig\n\n```python\ndef InToOrigConfig(\n    hook_positions:tuple, total_coeff:float\n)->None:\n```\n\n*D*",
     "[source](x/e2e_sae_nb/losses.py#L9)\n\n### InToOrigConfig\n\n```python\nclass InToOrigConfig(\n"
     "    hook_positions: tuple[str, ...],  # later hook points, exact names or substrings\n"
     "    total_coeff: float,  # beta, split evenly over the positions\n):\n```\n\n*D*"),
    ("[source](x/e2e_sae_nb/sae.py#L9)\n\n### SAE\n\n```python\ndef SAE(\n    d_in:int\n)->None:\n```",
     "[source](x/e2e_sae_nb/sae.py#L9)\n\n### SAE\n\n```python\nclass SAE(\n    d_in: int,\n    d_sae: int,\n    *,\n    seed: int = 0,\n    orthogonal: bool = True,\n"
     "    dtype: torch.dtype = torch.float32,\n    d_out: int | None = None,\n    reads: str | None = None,\n):\n```"),
    ("[source](x/e2e_sae_nb/sae.py#L9)\n\n### SAE.encode\n\n```python\ndef encode(\n    x\n)->jaxtyping.Float:\n```",
     "[source](x/e2e_sae_nb/sae.py#L9)\n\n### SAE.encode\n\n```python\ndef encode(self, x: Float[Tensor, \"*batch d_in\"]) -> Float[Tensor, \"*batch d_sae\"]:\n```"),
])
def test_signatures_read_like_the_module(text, expected):
    assert _docs._signature(text) == expected


def test_every_signature_on_the_site_is_that_of_the_object():
    "Held to `inspect`, and every form it can be broken into too."
    seen = 0
    for module, symbols in _modidx.d["syms"].items():
        for name in (symbol.removeprefix(f"{module}.") for symbol in symbols):
            about = _signatures._object(module.rpartition(".")[2], name)
            header = _signatures._header(about)
            made = not isinstance(about, type) or "__init__" in vars(about) or hasattr(about, "_fields")
            if header is None or not made or any(part.startswith("_") for part in name.split(".")):
                continue
            expected = list(inspect.signature(about).parameters)
            for form in {header, header if "\n" in header else _signatures._broken(header)}:
                node = ast.parse(re.sub("^class", "def", form) + "\n    pass").body[0]
                a = node.args
                assert [arg.arg for arg in (*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg]))] == expected, name
                assert node.name == name.rpartition(".")[2]
            seen += 1
    assert seen > 500
    assert _signatures._header(UserError) == "class UserError(ValueError):"


def test_a_signature_is_that_of_the_page():
    "`bench` is a function and a command; nbdev links both to the function."
    text = "[source](x/e2e_sae_nb/bench.py#L9)\n\n### bench\n\n```python\ndef bench(\n    a\n)->None:\n```"
    function, command = _docs._signature(text), _docs._signature(text, "cli")
    line = inspect.getsourcelines(cli.bench)[1]
    assert "bench.py#L9" in function and "on_result" in function
    assert f"/cli.py#L{line})" in command and "typer.Option" in command and _docs._signature(text, "sae") == function


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
    assert _docs._local(f"[{text.split(' and ')[0].replace('[x]', '[`x`]')}](06_sae.ipynb)") == f"[`x`]({page}{anchor})", "a link within a link"
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
