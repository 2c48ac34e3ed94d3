"""Keep a finished demo as the stored one that pages show: `python tools/keep_demo.py [out/demo]`."""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(source: Path) -> None:
    kept = ROOT / "data" / "demo"
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "frontier.csv"):
        shutil.copy(source / name, kept / name)
    (ROOT / "nbs" / "images").mkdir(exist_ok=True)
    shutil.copy(source / "frontier.png", ROOT / "nbs" / "images" / "frontier.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "demo")
