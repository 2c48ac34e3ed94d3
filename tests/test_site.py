"""The built site as a browser sees it: every page loads without a console error, shows its content, and finds words (make test-full)."""

import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading

import pytest
from conftest import ROOT
from test_browser import CHROMIUM, FLAGS

pytestmark = [pytest.mark.full, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site, built from a copy of the sources and served on this machine only."
    copy = tmp_path_factory.mktemp("site") / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "_proc", "_docs", "out", "__pycache__"))
    done = subprocess.run([sys.executable, "-m", "e2e_sae_nb._docs"], cwd=copy, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=copy / "_docs"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", copy / "_docs"
    server.shutdown()


def test_every_page_in_a_browser(site, tmp_path):
    address, folder = site
    pages = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.html"))
    assert len(pages) >= len(list((ROOT / "nbs").rglob("*.ipynb")))
    wrong = []
    for page in pages:
        done = subprocess.run([str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=5000",
                               "--dump-dom", f"{address}/{page}"], capture_output=True, text=True, timeout=120)
        messages = re.findall(r"CONSOLE.*", done.stderr)
        text = re.sub(r"<[^>]+>", " ", done.stdout)
        if messages or (page != "index.html" and len(text.split()) < 150):
            wrong.append((page, messages[:2], len(text.split())))
    assert not wrong, wrong
