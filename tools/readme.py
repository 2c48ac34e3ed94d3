"""README.md from nbs/index.ipynb, without quarto: one landing page, two places. `--check` fails when they drift."""

import difflib
import json
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "nbs"
CODE = re.compile(r"(^(`{3,}|~{3,})[^\n]*\n.*?^\2[^\n]*$|`[^`\n]+`)", re.M | re.S)  # fenced blocks and inline code
TARGET = re.compile(r"""(\]\(|\b(?:src|href)=["'])(?![a-z][a-z0-9+.-]*:|[#/])([^)\s"']+)""", re.I)


def render(cells: list[dict]) -> str:
    "Markdown of a notebook's cells; hidden cells are left out, figures are referenced by markdown and not taken from outputs."
    parts = []
    for cell in cells:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(links(source))
        elif cell["cell_type"] == "code" and source and not directive(source, r"(hide|default_exp|include:\s*false)"):
            code = "\n".join(line for line in source.splitlines() if not re.match(r"#\s*\|", line)).strip()
            if code and not directive(source, r"echo:\s*false"):
                parts.append(fenced(code, "python"))
            if not directive(source, r"output:\s*false"):
                parts += [text for text in map(output, cell.get("outputs", [])) if text]
    return "\n\n".join(parts) + "\n"


def directive(source: str, pattern: str) -> bool:
    return re.search(rf"^#\s*\|\s*{pattern}\b", source, re.M) is not None


def links(text: str) -> str:
    "Paths relative to the notebook's folder become relative to the root; code is left as it is."
    def moved(found: re.Match) -> str:
        return found[1] + posixpath.normpath(posixpath.join(FOLDER, found[2]))

    result, end = "", 0
    for code in CODE.finditer(text):
        result += TARGET.sub(moved, text[end : code.start()]) + code[0]
        end = code.end()
    return result + TARGET.sub(moved, text[end:])


def fenced(text: str, language: str = "") -> str:
    "A code block whose fence is longer than any inside it."
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def output(out: dict) -> str:
    if out.get("name") == "stderr":
        return ""
    data = out.get("data", {})
    if "text/markdown" in data:
        return links("".join(data["text/markdown"]).strip())
    text = "".join(out.get("text", "")) or ("".join(data.get("text/plain", "")) if "image/png" not in data else "")
    return fenced(text.strip("\n")) if text.strip() else ""


def main() -> int:
    target = ROOT / "README.md"
    text = render(json.loads((ROOT / FOLDER / "index.ipynb").read_text(encoding="utf-8"))["cells"])
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
