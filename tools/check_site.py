"""Check a built site: every local link and anchor resolves, and no page loads anything from the network."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str | None] = set()
        self.references: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values.get("id"), values.get("name")}
        self.references += [(tag, values[key]) for key in ("href", "src") if values.get(key)]


def problems(root: Path) -> list[str]:
    pages = {path: Page(path) for path in root.rglob("*.html")}
    found = [] if pages else [f"no pages in {root}"]
    for path, page in pages.items():
        for tag, reference in page.references:
            url = urlsplit(reference)
            if url.scheme or url.netloc:
                if tag != "a" and url.scheme != "data":
                    found.append(f"{path.name}: <{tag}> loads {reference[:80]}")
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                found.append(f"{path.name}: broken link {reference}")
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].anchors:
                found.append(f"{path.name}: no such anchor {reference}")
    for sheet in root.rglob("*.css"):
        found += [f"{sheet.name}: loads {m[:80]}" for m in re.findall(r"@import[^;]*https?:[^;]*|url\([\"']?https?:[^)]*", sheet.read_text(encoding="utf-8"))]
    return found


if __name__ == "__main__":
    bad = problems(Path(sys.argv[1]).resolve())
    print("\n".join(sorted(set(bad))) or "site: all links resolve, nothing is loaded from the network")
    sys.exit(bool(bad))
