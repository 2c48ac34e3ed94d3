"""The feature page in headless Chromium: used by keyboard and mouse, and judged by axe-core (make test-full)."""

import copy
import shutil
import subprocess
import tarfile

import pytest
from browser import CHROMIUM, Browser

from e2e_sae_nb.core import data_path
from e2e_sae_nb.dashboard import Dashboard, pane
from e2e_sae_nb.features import describe
from e2e_sae_nb.models import load_subject
from e2e_sae_nb.sae import SAE

pytestmark = [pytest.mark.full, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
AXE = "axe-core@4.14.1"
WINDOWS = {"light": (1280, "light"), "dark": (1280, "dark"), "narrow": (390, "light")}
ROWS = "[...document.querySelectorAll('section')[{n}].querySelectorAll('.list button')].map(row => Number(row.dataset.id))"


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    "The checker's source, from npm."
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    folder = tmp_path_factory.mktemp("axe")
    subprocess.run(["npm", "pack", "--silent", AXE], cwd=folder, check=True, capture_output=True, timeout=120)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        source = archive.extractfile("package/axe.min.js")
        assert source is not None
        return source.read().decode()


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


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture
def page(browser, dashboard, tmp_path):
    "The dashboard, freshly opened from a file."
    browser.size(1280)
    browser.open(dashboard.write(tmp_path / "features.html").as_uri())
    yield browser
    assert browser.messages == [] and browser.elsewhere() == []


def rows(page: Browser, number: int) -> list[int]:
    "The latents that a pane lists, in order."
    return page.js(ROWS.format(n=number))


def words(pane: dict, latent: dict) -> str:
    "What a search looks through."
    tokens = [c["tokens"][c["at"]] for c in latent["contexts"]] + [t for t, _ in latent["up"][:5]] + [t for t, _ in latent["ablation"]["up"][:5]]
    return "\0".join(pane["words"][token] for token in tokens).lower()


@pytest.mark.parametrize("window", WINDOWS)
def test_no_violations(axe, page, window, tmp_path):
    "WCAG 2 A and AA, with a latent shown and its activations as numbers."
    width, scheme = WINDOWS[window]
    page.size(width, scheme=scheme)
    page.js("document.querySelectorAll('.bar button:last-child').forEach(button => button.click())")
    page.js(axe)
    found = page.js("""axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']}).then(found => ({
        violations: found.violations.map(v => [v.id, v.impact, v.nodes.slice(0, 5).map(n => n.html.slice(0, 200))]), passes: found.passes.map(p => p.id)}))""")
    page.screenshot(tmp_path / f"{window}.png", full=True)
    assert found["violations"] == []
    assert len(found["passes"]) > 10 and "color-contrast" in found["passes"]


def test_untrusted_text_is_shown_not_run(page):
    assert page.js("document.body.innerText.includes('<script>alert') && document.querySelectorAll('main script').length === 0")


def test_search_finds_latents(page, dashboard):
    first = dashboard.panes[0]
    everything = [latent["id"] for latent in first["latents"]]
    texts = {latent["id"]: words(first, latent) for latent in first["latents"]}
    needle = next(w for text in texts.values() for w in text.split("\0") if len(w.strip()) > 3 and w.isascii() and sum(w in other for other in texts.values()) < len(texts))
    other = rows(page, 1)
    page.tab_to("e.id === 'search0'")
    page.type(needle)
    assert sorted(rows(page, 0)) == [n for n, text in texts.items() if needle in text] != everything
    assert rows(page, 1) == other, "a search is for one run"
    found = len(rows(page, 0))
    assert page.js("document.querySelector('[role=status]').textContent") == f"1 to {found} of {found} latents"
    page.js("document.activeElement.select()")
    page.type(f"#{everything[-1]}")
    assert rows(page, 0) == [everything[-1]]
    page.js("document.activeElement.select()")
    page.type("no such token anywhere")
    assert rows(page, 0) == [] and page.js("document.querySelector('[role=status]').textContent") == "no latent matches"


@pytest.mark.parametrize("column, key, down", [("latent", lambda latent: latent["id"], False), ("fires on", lambda latent: latent["density"], True),
                                               ("at most", lambda latent: latent["max"], True)])
def test_columns_sort_by_keyboard(page, dashboard, column, key, down):
    "Enter on a column's name sorts by it, Enter again turns the order round; the choice of orders follows, the focus stays."
    latents = dashboard.panes[0]["latents"]
    page.js("document.getElementById('order0').value = 'nearest neighbour'; document.getElementById('order0').dispatchEvent(new Event('change'))")
    page.tab_to(f"e.closest('.head') && e.textContent.startsWith('{column}')")
    for descending in (down, not down):
        page.press("Enter")
        assert rows(page, 0) == [latent["id"] for latent in sorted(latents, key=lambda latent: (-1 if descending else 1) * key(latent))]
        assert page.js("document.activeElement.getAttribute('aria-label')") == f"{column}, {'descending' if descending else 'ascending'}"
    assert page.js("[...document.querySelectorAll('section:first-child .head button')].filter(b => /[▴▾]/.test(b.textContent)).length") == 1


def test_arrows_walk_the_list(page):
    page.tab_to("e.closest('.list')")
    order, seen = rows(page, 0), []
    for key in ("ArrowDown", "ArrowDown", "ArrowUp"):
        page.press(key)
        seen.append(page.js("Number(document.activeElement.dataset.id)"))
        assert page.js("document.querySelector('article h2').textContent") == f"Latent {seen[-1]}"
        assert page.js("[...document.querySelectorAll('section:first-child .list [aria-pressed=true]')].map(row => Number(row.dataset.id))") == [seen[-1]]
    assert seen == [order[1], order[2], order[1]]


def test_focus_is_always_visible(page):
    "Tab meets every control of both runs once, each with an outline of at least 2 px, and leaves the page again."
    controls = page.js("[...document.querySelectorAll('button:enabled, input, select')].map((e, i) => e.dataset.control = i).length")
    seen = []
    for _ in range(controls):
        page.press("Tab")
        seen.append(page.js("""(e => { const style = getComputedStyle(e), box = e.getBoundingClientRect(); return {control: Number(e.dataset.control),
            ring: e.matches(':focus-visible') && style.outlineStyle === 'solid' && parseFloat(style.outlineWidth) >= 2, shown: box.width > 0 && box.top < innerHeight && box.bottom > 0}})(document.activeElement)"""))
    assert [s["control"] for s in seen] == list(range(controls)), "in the order of the page"
    assert all(s["ring"] and s["shown"] for s in seen)


def test_two_runs_stand_side_by_side(page, dashboard):
    boxes = "[...document.querySelectorAll('section')].map(s => { const b = s.getBoundingClientRect(); return [b.left, b.top, b.right] })"
    (left, top, right), (second_left, second_top, _) = page.js(boxes)
    assert top == second_top and right < second_left
    assert page.js("[...document.querySelectorAll('section > h2')].map(h => h.textContent)") == ["run 0", "run 1"]
    chosen = dashboard.panes[1]["latents"][-1]
    before = page.js("document.querySelectorAll('article')[0].innerText")
    page.js(f"document.querySelector('section:last-child .list [data-id=\"{chosen['id']}\"]').focus()")
    page.press("Enter")
    shown = page.js("document.querySelectorAll('article')[1].innerText")
    assert f"Latent {chosen['id']}\n" in shown and f"at most {chosen['max']:.2f}" in shown
    assert page.js("document.querySelectorAll('article')[0].innerText") == before
    page.size(390)
    (left, top, right), (second_left, second_top, _) = page.js(boxes)
    assert left == second_left and second_top > top and page.js("document.documentElement.scrollWidth <= innerWidth")


def test_strength_is_not_told_by_colour_alone(page, dashboard):
    "A line beneath each token that fires, thicker where it fires more; numbers at a key press (WCAG 1.4.1)."
    latent = next(latent for latent in dashboard.panes[0]["latents"] if latent["id"] == page.js("Number(document.querySelector('.list [aria-pressed=true]').dataset.id)"))
    read = """[...document.querySelectorAll('section:first-child .context')].map(line => [...line.querySelectorAll('span')].map(e => {
        const style = getComputedStyle(e), next = e.nextElementSibling, number = next && next.tagName === 'SUB' && next.getClientRects().length ? next.textContent : null;
        return {line: style.textDecorationLine, thick: parseFloat(style.textDecorationThickness), at: style.outlineStyle === 'solid' && Number(style.fontWeight) >= 700, number}}))"""
    for context, tokens in zip(latent["contexts"], page.js(read), strict=True):
        fires = [a > 0 for a in context["activation"]]
        assert [t["line"] == "underline" for t in tokens] == fires
        assert [i for i, t in enumerate(tokens) if t["at"]] == [context["at"]]
        assert all(t["number"] is None for t in tokens)
        on = sorted((a, t["thick"]) for a, t in zip(context["activation"], tokens, strict=True) if a > 0)
        assert [thick for _, thick in on] == sorted(thick for _, thick in on)
    assert max(t["thick"] for line in page.js(read) for t in line if t["line"] == "underline") == 5
    page.tab_to("e.textContent === 'numbers'")
    page.press(" ")
    assert page.js("document.activeElement.getAttribute('aria-pressed')") == "true"
    for context, tokens in zip(latent["contexts"], page.js(read), strict=True):
        assert [t["number"] for t in tokens] == [f"{a:.2f}" if a > 0 else None for a in context["activation"]]


def test_a_run_of_several_places_shows_one_by_choice(axe, browser, dashboard, tmp_path):
    "A labelled choice of places in the run's column, by keyboard; what was chosen stays while places change; no violations, also when narrow."
    other = copy.deepcopy(dashboard.panes[1]) | {"run": 0, "place": "blocks.3.hook_resid_post", "title": "run 0", "no_direct": "there is none"}
    for latent in other["latents"]:  # a token that the run leaves out, and one that is the beginning of a character
        for context in latent["contexts"]:
            left_out = 0 if context["at"] else 1
            context["activation"][left_out] = 0.0
            context |= {"excluded": [left_out], "texts": ["", *(other["words"][token] for token in context["tokens"][1:])]}
    panes = [dashboard.panes[0] | {"run": 0}, other, dashboard.panes[1] | {"run": 1}]
    browser.size(1280)
    browser.open(Dashboard(panes).write(tmp_path / "places.html").as_uri())
    assert browser.js("[...document.querySelectorAll('section > h2')].map(h => h.textContent)") == ["run 0", "run 1"]
    assert browser.js("document.title") == "run 0 | run 1" and browser.js("document.querySelectorAll('.places').length") == 1
    first, second = ([latent["id"] for latent in sorted(pane["latents"], key=lambda latent: -latent["density"])] for pane in panes[:2])
    assert rows(browser, 0) == first
    chosen = first[1]
    browser.js(f"document.querySelector('section .list [data-id=\"{chosen}\"]').click()")
    browser.tab_to("e.id === 'place0'")
    assert browser.js("document.activeElement.labels[0].firstChild.textContent") == "place (2 SAEs)"
    browser.press("ArrowDown")
    assert browser.js("document.activeElement.selectedOptions[0].textContent") == "blocks.3.hook_resid_post"
    assert rows(browser, 0) == second and browser.js("document.querySelectorAll('section:first-child .list').length") == 1
    assert browser.js("document.querySelector('section:first-child article').innerText.includes('no direct effects: there is none')")
    first_words = browser.js("[...document.querySelectorAll('section:first-child .context')].map(line => line.querySelector('span').textContent)")
    assert first_words and set(first_words) == {"·"} and browser.js("document.querySelectorAll('section:first-child .out').length > 0")
    browser.js(axe)
    found = browser.js("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']}).then(found => found.violations.map(v => [v.id, v.nodes.slice(0, 3).map(n => n.html.slice(0, 200))]))")
    assert found == []
    browser.press("ArrowUp")
    assert rows(browser, 0) == first
    assert browser.js("document.querySelector('article h2').textContent") == f"Latent {chosen}"
    browser.size(390)
    assert browser.js("document.documentElement.scrollWidth <= innerWidth")
    assert browser.messages == [] and browser.elsewhere() == []
