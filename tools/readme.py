"""README.md from nbs/index.ipynb, without quarto: one landing page, two places. `--check` fails when they drift."""

import difflib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def render() -> str:
    parts = []
    for cell in json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(links(source))
        elif cell["cell_type"] == "code" and source and not re.search(r"^#\|\s*hide\b", source, re.M):
            if not re.search(r"^#\|\s*echo:\s*false", source, re.M):
                code = "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip()
                parts.append(f"```python\n{code}\n```")
            parts += [text for text in map(output, cell.get("outputs", [])) if text]
    return "\n\n".join(parts) + "\n"


def links(text: str) -> str:
    "Paths relative to nbs/ become relative to the root."
    return re.sub(r"(\]\()(?!https?://|#|mailto:)(\.\./)?([^)\s]+)", lambda m: m[1] + (m[3] if m[2] else f"nbs/{m[3]}"), text)


def output(out: dict) -> str:
    data = out.get("data", {})
    if "text/markdown" in data:
        return links("".join(data["text/markdown"]).strip())
    text = "".join(out.get("text", "")) or ("".join(data.get("text/plain", "")) if "image/png" not in data else "")
    return f"```\n{text.strip()}\n```" if text.strip() else ""


def main() -> int:
    target, text = ROOT / "README.md", render()
    if "--check" not in sys.argv:
        target.write_text(text, encoding="utf-8")
        return 0
    old = target.read_text(encoding="utf-8") if target.exists() else ""
    if old != text:
        print("README.md differs from nbs/index.ipynb (run: python tools/readme.py)")
        print("\n".join(difflib.unified_diff(old.splitlines(), text.splitlines(), "README.md", "from index.ipynb", lineterm="", n=1)))
        return 1
    print("README.md is in step with nbs/index.ipynb")
    return 0


if __name__ == "__main__":
    sys.exit(main())
