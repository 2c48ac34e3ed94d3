"""The site, built by `make docs` and seen by a browser: fast, whole, offline, and it finds words (make test-full).

`python tests/test_site.py` does it on a fresh clone of the last commit and writes what it finds to data/results/site.json.
"""

import collections
import functools
import html
import http.server
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from check_site import problems  # noqa: E402

from e2e_sae_nb.core import load_result, provenance, write_json  # noqa: E402

RESULT = ROOT / "data" / "results" / "site.json"
LIMIT = 300  # seconds from clone to site, without installation
WIDTHS = (1200, 390)
pytestmark = [pytest.mark.full, pytest.mark.skipif(CHROMIUM is None or shutil.which("quarto") is not None, reason="needs Chromium; about the renderer from PyPI")]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def make_docs(checkout: Path) -> float:
    "Seconds of `make docs` where the packages are installed already."
    start, environment = time.monotonic(), {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(["make", "docs", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed"], cwd=checkout, env=environment,
                          capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return time.monotonic() - start


def words(page: Path) -> list[str]:
    "The words of a page's main part."
    main = re.search(r"<main.*</main>", page.read_text(encoding="utf-8"), re.S)
    return re.findall(r"[^\W\d_]+", html.unescape(re.sub(r"<[^>]+>", " ", main[0] if main else "")))


def names(folder: Path) -> list[str]:
    return sorted(page.relative_to(folder).as_posix() for page in folder.rglob("*.html"))


def look(browser: Browser, address: str, name: str) -> dict:
    "What a page complains about, asks of other machines, and how far it is too wide."
    browser.size(WIDTHS[0])
    browser.open(f"{address}/{name}")
    found = {"messages": list(browser.messages), "elsewhere": browser.elsewhere(), "overflow": {}}
    for width in WIDTHS:
        browser.size(width)
        found["overflow"][width] = browser.js("document.documentElement.scrollWidth - innerWidth")
    return found | browser.js("""({broken: [...document.images].filter(i => i.getClientRects().length && !i.naturalWidth).map(i => i.src),
        silent: [...document.images].filter(i => !i.alt).map(i => i.src), formulas: document.querySelectorAll('math').length, wrong: document.querySelectorAll('merror').length,
        raw: (document.querySelector('main')?.innerText.match(/__main__\\.\\w+|\\]\\(\\/nbs|:::/g) || [])})""")


def seldom(folder: Path, how_many: int) -> dict[str, str]:
    "Long words, each with the one page that has it, no two of the same page."
    counts = {name: collections.Counter(word.lower() for word in words(folder / name)) for name in names(folder) if name.startswith("nbs/")}
    pages = collections.Counter(word for count in counts.values() for word in count)
    found = {}
    for name, count in counts.items():
        if mine := sorted(word for word, n in count.items() if n > 1 and pages[word] == 1 and len(word) >= 9 and word.isascii()):
            found[mine[0]] = name
    return dict(list(found.items())[::max(1, len(found) // how_many)][:how_many])


def search(browser: Browser, address: str, word: str) -> list[str]:
    "Type a word into the search field as a reader does; the pages it offers."
    browser.size(WIDTHS[0])
    browser.open(f"{address}/nbs/index.html")
    browser.type("/")
    assert browser.js("document.activeElement.type") == "search"
    browser.type(word)
    browser.wait("document.querySelector('.smalldocs-search-results.show') !== null")
    return browser.js("[...document.querySelectorAll('.search-result')].map(a => new URL(a.href).pathname.slice(1))")


class served:
    "A folder, served on this machine only."

    def __init__(self, folder: Path):
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The site of the sources as they are, built in a copy."
    copy = tmp_path_factory.mktemp("site") / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "_proc", "_docs", "out", "__pycache__"))
    assert make_docs(copy) < LIMIT
    return copy / "_docs"


@pytest.fixture(scope="module")
def address(site):
    with served(site) as where:
        yield where


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as running:
        yield running


def test_whole(site):
    pages = names(site)
    assert {f"nbs/{path.relative_to(ROOT / 'nbs').with_suffix('.html').as_posix()}" for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts} <= set(pages)
    assert problems(site) == []
    assert [page for page in pages if page != "index.html" and len(words(site / page)) < 100] == []


def test_every_page_in_a_browser(site, address, browser):
    found = {name: look(browser, address, name) for name in names(site)}
    for what in ("messages", "elsewhere", "broken", "silent", "wrong", "raw"):
        assert {name: page[what] for name, page in found.items() if page[what]} == {}, what
    assert {name: page["overflow"] for name, page in found.items() if max(page["overflow"].values()) > 0} == {}
    assert sum(page["formulas"] for page in found.values()) > 100


def test_search_finds_pages(site, address, browser):
    wanted = seldom(site, 5)
    assert len(wanted) == 5
    for word, page in wanted.items():
        hits = search(browser, address, word)
        assert page in hits, (word, hits)
        browser.press(*["ArrowDown"] * (hits.index(page) + 1), "Enter")
        browser.wait(f"location.pathname === '/{page}' && document.readyState === 'complete'")
        assert word in browser.js("document.querySelector('main').innerText").lower()
    assert search(browser, address, "qzxvkwjh") == []
    assert browser.js("document.querySelector('.smalldocs-search-results').innerText") == "No results"


def test_quarto_like_page_runs_offline(browser, tmp_path):
    "Nothing calls what the step after rendering has taken away."
    folder = tmp_path / "site"
    shutil.copytree(ROOT / "tests" / "golden" / "quarto", folder)
    subprocess.run([sys.executable, "-m", "e2e_sae_nb._docs", "offline"], cwd=ROOT, env={**os.environ, "QUARTO_PROJECT_OUTPUT_DIR": str(folder)}, check=True, capture_output=True)
    browser.open((folder / "nbs" / "page.html").as_uri())
    assert browser.messages == [] and browser.elsewhere() == []
    assert browser.js("document.documentElement.dataset.quarto") == "ran" and browser.js("document.querySelectorAll('math').length") == 3


@pytest.mark.parametrize("milliseconds", [0, 90, 110])
def test_driver_follows_a_page_that_goes_away(browser, tmp_path, milliseconds):
    (tmp_path / "next.html").write_text("<p>two</p>")
    (tmp_path / "first.html").write_text(f"<script>setTimeout(() => location.href = 'next.html', {milliseconds})</script>one")
    browser.open((tmp_path / "first.html").as_uri())
    assert browser.wait("document.querySelector('p')?.innerText") == "two"


def main() -> int:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, Browser(Path(temporary)) as browser:
        checkout = Path(temporary) / "checkout"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
        cloned = time.monotonic() - start
        before = os.times()
        folder, made = checkout / "_docs", make_docs(checkout)
        after, load = os.times(), os.getloadavg()[0]
        with served(folder) as address:
            pages = {name: look(browser, address, name) for name in names(folder)}
            found = {word: {"page": page, "offered": search(browser, address, word)} for word, page in seldom(folder, 5).items()}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True).stdout.strip()
        config = {"widths": list(WIDTHS), "cores": os.cpu_count(), "commit_built": commit}
        write_json(RESULT, {
            "seconds": {"clone": round(cloned, 1), "make docs": round(made, 1)}, "load_average": round(load, 1),  # above the number of cores, others were at work
            "processor_seconds": round(sum(after[2:4]) - sum(before[2:4]), 1), "pages": len(pages), "problems": problems(folder),
            "renderer": f"smalldocs {importlib.metadata.version('smalldocs')}", "browser": browser.version,
            "messages": {name: page["messages"] for name, page in pages.items()},
            "elsewhere": sorted({url for page in pages.values() for url in page["elsewhere"]}),
            "too_wide": {name: page["overflow"] for name, page in pages.items() if max(page["overflow"].values()) > 0},
            "formulas": sum(page["formulas"] for page in pages.values()), "search": found,
            "provenance": provenance(config, seconds=round(time.monotonic() - start, 1), command="python tests/test_site.py")})
    stored = load_result(RESULT)
    print(json.dumps({key: stored[key] for key in ("seconds", "load_average", "processor_seconds", "pages", "problems", "browser", "elsewhere", "too_wide")}, indent=1))
    return int(cloned + made >= LIMIT or bool(stored["problems"] or stored["elsewhere"] or stored["too_wide"] or any(stored["messages"].values())))


if __name__ == "__main__":
    sys.exit(main())
