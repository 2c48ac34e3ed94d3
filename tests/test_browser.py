"""The feature page as a browser and assistive technology see it: axe-core in headless Chromium (make test-full)."""

import html
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from e2e_sae_nb.core import data_path
from e2e_sae_nb.dashboard import Dashboard, pane
from e2e_sae_nb.features import describe
from e2e_sae_nb.models import load_subject
from e2e_sae_nb.sae import SAE

pytestmark = pytest.mark.full
AXE = "axe-core@4.14.1"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    "The checker's source, from npm."
    if CHROMIUM is None or shutil.which("npm") is None:
        pytest.skip("needs Chromium and npm")
    folder = tmp_path_factory.mktemp("axe")
    subprocess.run(["npm", "pack", "--silent", AXE], cwd=folder, check=True, capture_output=True, timeout=120)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        source = archive.extractfile("package/axe.min.js")
        assert source is not None
        return source.read().decode()


def in_browser(page: str, script: str, folder: Path) -> dict:
    "What a script, run at the end of a page, leaves behind."
    before, _, after = page.rpartition("</body>")
    ending = ("<script>addEventListener('load', async () => { const found = await (async () => {" + script + "})();"
              "const pre = document.createElement('pre'); pre.id = 'found'; pre.textContent = JSON.stringify(found); document.body.append(pre); })</script>")
    path = folder / "page.html"
    path.write_text(before + ending + "</body>" + after, encoding="utf-8")
    done = subprocess.run([str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1280,900", "--virtual-time-budget=60000",
                           "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=300)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert match, done.stderr[-1000:]
    return json.loads(html.unescape(match.group(1)))


@pytest.fixture(scope="module")
def dashboard() -> Dashboard:
    "Two small panes on the embedded model; a latent's context holds markup."
    subject = load_subject(data_path("docstrings-lm"), device="cpu")
    ids = subject.tokenizer(["Returns <script>alert(1)</script> the mean of x & y. " * 20] * 4, return_tensors="pt")["input_ids"]
    panes = []
    for seed in (0, 1):
        sae = SAE(192, 32, seed=seed)
        facts = describe(subject, "blocks.3.hook_resid_pre", sae, [ids[:, :64]])
        panes.append(pane(facts, subject, f"run {seed}", "a test", "made by a test"))
    return Dashboard(panes)


def test_no_violations(axe, dashboard, tmp_path):
    "WCAG 2 A and AA, on the page as it opens and with a latent shown."
    script = axe + """;
    const options = {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']};
    const first = await axe.run(document, options);
    return {violations: first.violations.map(v => [v.id, v.impact, v.nodes.slice(0, 5).map(n => n.html.slice(0, 200))]), passes: first.passes.length};"""
    found = in_browser(dashboard.to_html(), script, tmp_path)
    assert found["passes"] > 10
    assert found["violations"] == []


def test_untrusted_text_is_shown_not_run(dashboard, tmp_path):
    script = "return {text: document.body.innerText.includes('<script>alert'), scripts: document.querySelectorAll('main script').length};"
    assert in_browser(dashboard.to_html(), script, tmp_path) == {"text": True, "scripts": 0}
