"""Run notebooks from top to bottom in a fresh kernel.

`python tools/notebooks.py [PATHS]` refreshes stored outputs in place (all notebooks if none are named) and cleans them;
`run` is what the tests call. Kernels do not know `#| eval: false` and an export cell would export, so both are skipped.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
SKIP = re.compile(r"^#\s*\|\s*eval:\s*false", re.M)


def all_notebooks() -> list[Path]:
    return sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts))


def volatile(output: nbformat.NotebookNode) -> bool:
    "What libraries say on stderr, and their progress bars: they differ from run to run and are not the page's story."
    return (output.output_type == "stream" and output.name == "stderr") or "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    "Neighbouring pieces of one stream as one: where a kernel flushes is a matter of time."
    found: list[nbformat.NotebookNode] = []
    for output in outputs:
        if found and output.output_type == found[-1].output_type == "stream" and output.name == found[-1].name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def run(path: Path, timeout: int = 600) -> nbformat.NotebookNode:
    "Execute a notebook in a fresh kernel in its own folder; raises at the first failing cell; nothing is saved."
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code" and (SKIP.search(cell.source) or "nbdev_export(" in cell.source):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "skip-execution"]
    os.environ["E2E_SAE_PROGRESS"] = "0"  # the kernel inherits it
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined([o for o in cell.outputs if not volatile(o)])
        cell.metadata.pop("execution", None)
        if "skip-execution" in cell.metadata.get("tags", []):
            cell.metadata["tags"].remove("skip-execution")
            if not cell.metadata["tags"]:
                del cell.metadata["tags"]
    notebook.metadata.pop("widgets", None)  # the state of progress bars
    return notebook


def main(names: list[str]) -> None:
    for path in map(Path, names) if names else all_notebooks():
        nbformat.write(run(path.resolve()), path)
        print("ran", path)
    subprocess.run([str(Path(sys.executable).parent / "nbdev_clean")], cwd=ROOT, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
