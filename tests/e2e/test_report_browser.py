"""The report in a real browser: it loads nothing, has no complaints, fits a phone, and can be read in both themes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from reporting import NASTY, episode, evaluate, rows, write_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip


def chromium() -> str | None:
    """``$RLGF_CHROMIUM``, or the first browser of the kind that there is."""
    return os.environ.get("RLGF_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="module")
def browser():
    if (path := chromium()) is None:
        pytest.skip("no Chromium was found: set RLGF_CHROMIUM, or install one, to open the report in it")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page_file(tmp_path: Path, run_cli) -> Path:
    """Two systems, one of two seeds, with long and hostile texts and words without an end."""
    some = [episode(NASTY, ("guide", NASTY), ("policy", "and " + "o" * 900))]
    arguments = []
    for name, seed, lift in (("a", 0, 0.02), ("b", 1, 0.018), ("c", 0, 0.01)):
        flags = {"kl": 0.5} if name == "c" else {}
        folder = write_run(
            tmp_path / name,
            metrics=rows(40, lift=lift, seed=seed, full=True),
            episodes={1: some},
            flags=flags,
            seed=seed,
        )
        evaluate(run_cli, folder / "eval", keep=lift * 40, texts=[NASTY, "שלום", "", "x" * 900])
        arguments.append(f"{'first' if name != 'c' else 'W' * 70}={folder}")
    done = run_cli("report", *arguments, "-o", tmp_path / "report.html", "--texts", 20)
    assert done.exit_code == 0, done.stderr
    return tmp_path / "report.html"


# Relative luminance and contrast are those of WCAG 2.2; the background is the nearest one that is not transparent.
CONTRAST = """() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const lum = c => { const [r, g, b] = parse(c).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const back = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor, p = parse(c);
    if (p.length < 4 || p[3] > 0) return c; } return 'rgb(255, 255, 255)'; };
  const low = []; let seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) { const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || ['title', 'desc', 'style'].includes(e.tagName.toLowerCase())) continue;
    const s = getComputedStyle(e), svg = e.closest('svg');
    const [a, b] = [lum(svg ? s.fill : s.color), lum(back(svg ? svg.parentElement : e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); seen++;
    if (ratio < 4.5) low.push(walker.currentNode.data.trim().slice(0, 40) + ' ' + ratio.toFixed(2)); }
  return [seen, low]; }"""


def test_it_opens_on_a_desk_and_on_a_phone_by_day_and_by_night(browser, page_file: Path) -> None:
    for width in (1280, 360):
        for theme in ("light", "dark"):
            _look(browser, page_file, width, theme)


def _look(browser: Any, page_file: Path, width: int, theme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    for details in ("closed", "open"):
        if details == "open":
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"scrolls to the side, details {details}"
    plots = page.locator("figure > svg")
    assert plots.count() >= 10
    for i in range(plots.count()):
        box = plots.nth(i).bounding_box()
        assert box is not None and box["width"] > 200 and box["height"] > 60
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    seen, low = page.evaluate(CONTRAST)
    assert seen > 300 and low == []
    assert (
        page.evaluate("getComputedStyle(document.body).backgroundColor")
        == {
            "light": "rgb(245, 246, 248)",
            "dark": "rgb(16, 20, 24)",
        }[theme]
    )
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height))"
    )
    assert smallest >= 7, "words in plots are too small to be read"
    assert said == []
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []
    assert len([url for url in asked if url.startswith("file://")]) == 1
    page.close()


def test_what_the_browser_test_would_see(browser, tmp_path: Path) -> None:
    """A page that asks for something, complains and is too wide is noticed by the same means."""
    file = tmp_path / "bad.html"
    file.write_text("<p style='width: 900px; color: #bbb; background: #fff'>x</p><img src='http://127.0.0.1:9/x.png'>")
    page = browser.new_page(viewport={"width": 360, "height": 800})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") > 360
    assert page.evaluate(CONTRAST)[1] and said and "http://127.0.0.1:9/x.png" in asked
    page.close()
