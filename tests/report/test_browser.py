"""The page as a browser shows it, in headless Chromium; skipped where there is none."""

from __future__ import annotations

import pytest

from longrope.report.styles import TONES
from tests.report.browser import chromium

PHONE, DESKTOP, PAPER = 390, 1200, 794
SIDEWAYS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
SIZES = "[...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect()).map(r => [r.width, r.height])"
# What is wider than the page may only be inside what scrolls by itself.
OVERFLOW = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll('figure svg text')].map(
  e => parseFloat(getComputedStyle(e).fontSize) * Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b)))"""
# Words of a figure that stand outside it, by more than a pixel.
CUT = """[...document.querySelectorAll('figure svg')].flatMap(s => { const f = s.getBoundingClientRect();
  return [...s.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();
    return r.left < f.left - 1 || r.right > f.right + 1 || r.top < f.top - 1 || r.bottom > f.bottom + 1; })
    .map(t => t.textContent); })"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module", params=["full", "several"])
def page(request):
    return request.getfixturevalue(f"{request.param}_page")


def rgb(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgb({red}, {green}, {blue})"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_it_can_be_read(browser, page, width, dark):
    browser.read(page, width, dark=dark)
    assert browser.complaints() == []
    assert browser.ask(SIDEWAYS) == 0
    assert browser.ask(OVERFLOW) == []
    sizes = browser.ask(SIZES)
    assert len(sizes) == page.read_text("utf-8").count("<figure>")
    assert all(wide > 300 and high > 150 for wide, high in sizes)
    assert browser.ask(SMALLEST_TEXT) >= 7
    assert browser.ask(CUT) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_both_colour_schemes_reach_page_and_figures(browser, full_page, dark):
    browser.read(full_page, DESKTOP, dark=dark)
    ground, ink = (rgb(TONES[name][dark]) for name in ("paper", "ink"))
    assert browser.ask("getComputedStyle(document.documentElement).backgroundColor") == ground
    fills = browser.ask("[...document.querySelectorAll('#perplexity svg text')].map(e => getComputedStyle(e).fill)")
    assert ink in fills
    own = rgb(TONES["vermilion"][dark])
    strokes = browser.ask("[...document.querySelectorAll('#perplexity svg path')].map(e => getComputedStyle(e).stroke)")
    assert own in strokes


def test_paper_shows_all_numbers_on_white(browser, full_page):
    """Print in the dark: still ink on paper, and no number stays folded away."""
    browser.read(full_page, PAPER, dark=True, paper=True)
    shown = "[...document.querySelectorAll('table')].every(e => e.checkVisibility({contentVisibilityAuto: true}))"
    assert browser.ask(shown)
    assert browser.ask("getComputedStyle(document.body).color") == rgb(TONES["ink"][0])
    assert browser.pdf().startswith(b"%PDF")


def test_folded_numbers_open(browser, full_page):
    browser.read(full_page, PHONE)
    heights = "[...document.querySelectorAll('details')].map(e => e.getBoundingClientRect().height)"
    closed = browser.ask(heights)
    browser.ask("document.querySelectorAll('summary').forEach(e => e.click())")
    assert all(after > before for before, after in zip(closed, browser.ask(heights), strict=True))
    assert browser.ask(SIDEWAYS) == 0
