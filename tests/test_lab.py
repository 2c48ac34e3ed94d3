"""The tutorial in JupyterLab as a reader has it: opened in a browser, all cells run by the menu's command (make test-full)."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from browser import CHROMIUM, Browser
from conftest import ROOT

pytestmark = [pytest.mark.full, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
PAGE = "nbs/tutorials/tutorial.ipynb"
PANEL = "[...jupyterapp.shell.widgets('main')].find(w => w.context?.path.endsWith('tutorial.ipynb'))"
CELLS = f"({PANEL}?.content?.widgets || []).filter(w => w.model.type === 'code')"


@pytest.fixture
def lab(tmp_path):
    "A server on a copy of the checkout, since running a notebook writes it."
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "_proc", "_docs", "out", "__pycache__"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(copy), "E2E_SAE_PROGRESS": "1", "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_DATA_DIR": str(tmp_path / "data"),
                   "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
                               "--IdentityProvider.token=", f"--ServerApp.root_dir={copy}", "--LabApp.expose_app_in_browser=True"],
                              env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 90
    while True:
        try:
            urlopen(f"{address}/api", timeout=5).close()
            break
        except (URLError, ConnectionError):
            assert time.monotonic() < deadline and server.poll() is None, "JupyterLab did not start"
            time.sleep(0.2)
    yield address
    server.terminate()
    server.wait(timeout=30)


def test_tutorial_runs_in_jupyterlab(lab, tmp_path):
    with Browser(tmp_path) as browser:
        browser.size(1400, 1000)
        browser.open(f"{lab}/lab/tree/{PAGE}")
        browser.wait(f"window.jupyterapp && document.querySelector('.jp-Notebook .jp-CodeCell') !== null && {CELLS}.length > 0", seconds=120)
        browser.wait(f"{PANEL}.sessionContext?.session?.kernel?.status === 'idle'", seconds=120)
        browser.js(f"jupyterapp.shell.activateById({PANEL}.id); 0")
        browser.js(f"{CELLS}.forEach(w => w.model.clearExecution()); 0")
        browser.js("void jupyterapp.commands.execute('notebook:run-all-cells')")
        curves = 0  # how often a figure was seen while cells ran
        deadline = time.monotonic() + 600
        while True:
            state = browser.js(f"{CELLS}.map(w => [w.model.executionCount, w.model.outputs.toJSON().map(o => [o.output_type, o.ename || '', Object.keys(o.data || {{}})])])")
            counts, outputs = [count for count, _ in state], [output for _, found in state for output in found]
            assert [o for o in outputs if o[0] == "error"] == []
            curves += any({"image/png", "image/svg+xml"} & set(output[2]) for output in outputs)
            if all(count for count in counts) and browser.js(f"{PANEL}.sessionContext.session.kernel.status") == "idle":
                break
            assert time.monotonic() < deadline, counts
            time.sleep(0.5)
        assert [output for output in outputs if "text/html" in output[2]], outputs  # the frontier shows itself as a table
        assert curves > 0, outputs  # losses were drawn while training ran
        if folder := os.environ.get("E2E_SAE_PICTURES"):
            browser.js(f"{PANEL}.content.scrollToItem({len(state)} * 2 - 4); 0")
            time.sleep(2)
            browser.screenshot(Path(folder) / "lab.png")
