"""The page as a person sees it in headless Chromium: on a phone, a desktop, in the dark, on paper; else skipped."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from longrope.report.styles import TONES

PHONE, DESKTOP, PAPER = 390, 1280, 794
SIDEWAYS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
SIZES = "[...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect()).map(r => [r.width, r.height])"
# Elements wider than the page may only be inside elements that scroll by themselves.
OVERFLOW = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll('figure svg text')].map(
  e => parseFloat(getComputedStyle(e).fontSize) * Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b)))"""
# Words of a figure that stand outside it, by more than a pixel.
CUT = """[...document.querySelectorAll('figure svg')].flatMap(s => { const f = s.getBoundingClientRect();
  return [...s.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();
    return r.left < f.left - 1 || r.right > f.right + 1 || r.top < f.top - 1 || r.bottom > f.bottom + 1; })
    .map(t => t.textContent); })"""


class Browser:
    """Drives Chromium through its WebDriver. Use `chromium()`."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def read(self, page: Path, width: int, *, dark: bool = False, paper: bool = False) -> None:
        """Open `page` in a window of `width` CSS pixels."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        media = {"media": "print" if paper else "screen", "features": [scheme]}
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self._driver.get(page.as_uri())

    def ask(self, script: str) -> Any:
        """The value of a piece of JavaScript on the page."""
        return self._driver.execute_script(f"return {script}")

    def complaints(self) -> list[str]:
        """The messages in the console since the last call."""
        return [entry["message"] for entry in self._driver.get_log("browser")]

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        width, height = self.ask("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self._driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        printed = self._driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
        return base64.b64decode(printed["data"])


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window; the test is skipped, with the reason, where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    service = shutil.which("chromedriver")
    if program is None or service is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(service))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


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
