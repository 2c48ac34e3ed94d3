"""Check that notebooks are clean and modules are exported, by doing both in a copy and comparing. Exit status 1 with the names if not."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("nbs", "e2e_sae_nb", "settings.ini", "README.md", "pyproject.toml")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copy.mkdir()
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
            else:
                shutil.copy(source, copy / part)
        for command in ("nbdev_clean", "nbdev_export"):
            # nbdev_export does nothing where IN_TEST is set
            clean = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
            subprocess.run([str(Path(sys.executable).parent / command)], cwd=copy, check=True, env=clean)
        stale = []
        for folder_name in ("nbs", "e2e_sae_nb"):
            for path in sorted((copy / folder_name).rglob("*")):
                if path.suffix not in (".ipynb", ".py"):
                    continue
                original = ROOT / path.relative_to(copy)
                if not original.is_file() or original.read_bytes() != path.read_bytes():
                    stale.append(str(path.relative_to(copy)))
    if stale:
        print("not clean or not exported (run nbdev_clean and nbdev_export, then commit):", *stale, sep="\n  ")
        return 1
    print("notebooks are clean, modules are exported")
    return 0


if __name__ == "__main__":
    sys.exit(main())
