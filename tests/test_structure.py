"""The house rules: imports point downward, cells and modules stay small, notebooks are light, navigation is complete."""

import ast
import json
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from notebooks import all_notebooks

from e2e_sae_nb import _modidx

PACKAGE = ROOT / "e2e_sae_nb"
MODULES = sorted(p for p in PACKAGE.glob("*.py") if not p.stem.startswith("_"))
EXPORTS, FLAGS = {"export", "exports", "exporti"}, {"notest", "slow", "cuda"}
IMPORTS = (ast.Import, ast.ImportFrom)
TRAINING_PATH = ["core", "config", "documents", "data", "layouts", "models", "sae", "splicing", "losses", "metrics", "evaluation", "checkpoint", "runs", "state", "training"]


def number(path) -> tuple[int, str]:
    "A module's place in the book, from the header nbdev writes."
    found = re.search(r"File to edit: \.\./nbs/((\d+)([a-z]*)_\w+\.ipynb)", path.read_text(encoding="utf-8"))
    assert found, f"{path.name} was not exported from a numbered notebook"
    # nbdev_export never deletes: a renamed notebook leaves its old module behind
    assert (ROOT / "nbs" / found[1]).is_file(), f"{path.name} comes from {found[1]}, which is gone"
    return int(found[2]), found[3]


def directives(source: str) -> set[str]:
    return set(re.findall(r"^\s*#\s*\|\s*(\w+)", source, re.M))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_point_downward(path):
    numbers = {p.stem: number(p) for p in MODULES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 1 or module.startswith("e2e_sae_nb"):
                names = [module.removeprefix("e2e_sae_nb").lstrip(".").split(".")[0]]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith("e2e_sae_nb.")]
        for name in filter(None, names):
            assert numbers[name] < numbers[path.stem], f"{path.stem} imports {name}, which comes later in the book"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_every_public_symbol_has_its_place_in_the_index(path):
    "From which the site takes its source links; nbdev passes over notebooks with `auto` in their names."
    public = {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body
              if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")}
    index = {name.rpartition(".")[2] for name in _modidx.d["syms"][f"e2e_sae_nb.{path.stem}"]}
    assert public <= index


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_module_size(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_keywords_are_told_in_the_docstring(path):
    "A comment beside **kwargs would stand beside the return value on the site."
    told = re.findall(r"^ +\*\*\w+: .*,? +#.*$", path.read_text(encoding="utf-8"), re.M)
    assert not told, f"say it in the docstring: {told[0].strip()}"


@pytest.mark.parametrize("path", all_notebooks(), ids=lambda p: p.stem)
def test_notebook(path):
    assert path.stat().st_size <= 400_000, "outputs are too heavy"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = "".join(cells[0]["source"])
    assert first.startswith("# ") and re.search(r"^> ", first, re.M), "a page begins with a title and a line that says what it is about"
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    if any(re.search(r"^#\|\s*default_exp", s, re.M) for s in sources):
        assert "nbdev_export()" in sources[-1] and directives(sources[-1]) >= {"hide"}, "the last cell exports and is hidden"
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            assert not any(o["output_type"] == "error" for o in cell["outputs"])
            assert all(o["metadata"].get("image/png", {}).get("alt") for o in cell["outputs"] if "image/png" in o.get("data", {})), f"a figure without alt_text: {source[:80]}"
            if "new_axes(" in source and not directives(source) & {"export", "exports", "exporti", "hide"}:
                assert any("image/png" in o.get("data", {}) for o in cell["outputs"]), f"a cell draws a figure that is not shown: {source[:80]}"
            if directives(source) & EXPORTS:
                assert len(source.splitlines()) <= 40, f"an exported cell of {len(source.splitlines())} lines: {source[:80]}"
                # such a cell would be in the module, but its name undefined when the page is built
                assert not directives(source) & {"eval", *FLAGS}, f"an exported cell always runs: {source[:80]}"


@pytest.mark.parametrize("path", all_notebooks(), ids=lambda p: p.stem)
def test_imports_have_their_own_cells(path):
    "Where a page documents a module, the site's builder executes every cell that holds an import, without the cells before it."
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    if not any(directives("".join(c["source"])) & EXPORTS for c in cells):
        return
    for cell in cells:
        source = "".join(cell["source"])
        if directives(source) & {"eval", *EXPORTS} or "nbdev_export()" in source:
            continue
        tree = ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M))
        if any(isinstance(node, IMPORTS) for node in ast.walk(tree)):
            rest = [node for node in tree.body if not isinstance(node, IMPORTS)]
            assert not rest, f"cell {cell['id']} holds an import and other code: {ast.unparse(rest[0])[:80]}"


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())

    def pages(entries):
        for entry in entries:
            if isinstance(entry, str):
                yield entry
            else:
                yield from pages(entry.get("contents", []))

    listed = sorted(pages(config["website"]["sidebar"]["contents"]))
    navbar = {entry["href"] for entry in config["website"]["navbar"]["left"] if entry["href"].endswith(".ipynb")}
    assert navbar <= set(listed)
    assert listed == sorted(str(p.relative_to(ROOT)) for p in all_notebooks())
    settings = (ROOT / "settings.ini").read_text()
    assert f"doc_path = {config['project']['output-dir']}\n" in settings
    assert config["website"]["sidebar"]["style"] in ("docked", "floating") and isinstance(config["format"]["html"]["toc"], bool)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_transformer_lens_is_met_in_one_place(path):
    if path.stem != "models":
        assert "transformer_lens" not in re.sub(r'"[^"\n]*"', "", path.read_text(encoding="utf-8"))


def imported(code: str) -> set[str]:
    "Modules loaded after running code in a fresh interpreter, from a folder that is not the checkout."
    show = "; import sys; print('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code + show], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_training_path_imports_no_heavy_extras():
    loaded = imported("import " + ", ".join(f"e2e_sae_nb.{name}" for name in TRAINING_PATH))
    assert "e2e_sae_nb.training" in loaded
    assert not loaded & {"transformer_lens", "datasets", "wandb", "tensorboard", "umap", "jupyterlab", "nbdev"}


def test_import_is_light():
    loaded = imported("import e2e_sae_nb, e2e_sae_nb.cli")
    assert "e2e_sae_nb.cli" in loaded and not loaded & {"torch", "transformers", "transformer_lens", "datasets", "pandas", "matplotlib"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_module_imports_alone(path):
    if path.stem == "triton_kernels":
        pytest.importorskip("triton")
    assert f"e2e_sae_nb.{path.stem}" in imported(f"import e2e_sae_nb.{path.stem}")


def test_public_names_are_what_they_say():
    import types

    import e2e_sae_nb
    import e2e_sae_nb.demonstration  # after everything is loaded, no name may have become a module

    assert set(e2e_sae_nb.__all__) == {name for names in e2e_sae_nb._WHERE.values() for name in names}
    for name in e2e_sae_nb.__all__:
        assert not isinstance(getattr(e2e_sae_nb, name), types.ModuleType), name


def tracked() -> list[str]:
    out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if out.returncode:
        pytest.skip("not a git checkout")
    return [name for name in out.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_tracked_tree_is_small():
    assert sum((ROOT / name).stat().st_size for name in tracked()) < 45e6


def test_no_machine_paths():
    for name in tracked():
        if not name.endswith((".safetensors", ".png", ".bin")):
            text = (ROOT / name).read_text(encoding="utf-8", errors="ignore")
            assert not re.search(r"(?<![\w.])/(?:work|root|home/\w+)/\w", text), f"{name} holds a path of some machine"
