"""The page as text: complete, self-contained, the same every time, and safe whatever names it is given."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from longrope.report.collect import collect
from longrope.report.page import build, render
from longrope.report.styles import TONES
from tests.report import runs

VOID = {"meta", "link", "br"}


class Tree(HTMLParser):
    """Reads a page and keeps its elements; fails on tags that do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module", params=["full", "several"])
def page(request):
    return request.getfixturevalue(f"{request.param}_page").read_text("utf-8")


def test_nothing_comes_from_elsewhere(page):
    tree = Tree(page)
    tags = {tag for tag, _ in tree.elements}
    assert not tags & {"script", "iframe", "object", "embed", "img", "image", "base", "form"}
    for tag, attributes in tree.elements:
        for name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert re.findall(r"url\((?!#)", page) == []
    assert "@import" not in page
    policy = next(a for tag, a in tree.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


def test_every_id_is_one_and_every_link_leads_to_one(page):
    tree = Tree(page)
    ids = [attributes["id"] for _, attributes in tree.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = [a[name][1:] for _, a in tree.elements for name in ("href", "xlink:href") if str(a.get(name))[:1] == "#"]
    assert set(links) <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_figures_follow_the_page(page):
    """No colour of the light theme is left in a figure: each is a variable that both themes give."""
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert figures
    for figure in figures:
        assert [light for light, _ in TONES.values() if light in figure.lower()] == []
        assert "font-family" not in figure
    style = page.partition("<style>")[2].partition("</style>")[0]
    for name, (light, dark) in TONES.items():
        assert f"--{name}: {light};" in style
        assert f"--{name}: {dark};" in style.partition("prefers-color-scheme: dark")[2]


def test_no_figure_without_its_numbers(full, several):
    for report in (full, several):
        for exhibit in report.exhibits:
            assert exhibit.tables
            assert all(table.lines for table in exhibit.tables)
            assert all(len(line.cells) + 1 == len(table.head) for table in exhibit.tables for line in table.lines)
            if exhibit.drawing is not None:
                assert exhibit.caption


def test_the_page_holds_what_was_measured(full, full_page):
    words = Tree(full_page.read_text("utf-8")).text
    names = [exhibit.name for exhibit in full.exhibits]
    assert names == ["factors", "search", "perplexity", "position", "passkey", "needle", "ruler", "retention"]
    for exhibit in full.exhibits:
        for table in exhibit.tables:
            for line in table.lines:
                assert line.label in words
                assert all(cell.text in words for cell in line.cells)
    for said in (
        "tiny: from 256 to 2,048 tokens",
        "found by LongRoPE's evolution (Algorithm 1), driven by perplexity, in 80 evaluations and 491,520 token passes",
        "longrope test",  # the command
        "python 3.11.7, longrope 0.1.0",
        "ff" * 32,  # the model
        "aa" * 32,  # the document searched on
        "dd" * 32,  # and the one measured on
        "Before you use it",
    ):
        assert said in words


def test_several_runs_are_compared_and_then_told(several, several_page):
    words = Tree(several_page.read_text("utf-8")).text
    assert [part.name for part in several.chapters] == ["The runs compared", "one", "two"]
    compared = several.chapters[0]
    assert [exhibit.name for exhibit in compared.exhibits] == [
        "compared",
        "compared-factors",
        "compared-search",
        "compared-perplexity",
        "compared-needle",
    ]
    perplexity = next(exhibit for exhibit in compared.exhibits if exhibit.name == "compared-perplexity")
    assert [line.label for line in perplexity.tables[0].lines][:2] == ["one", "two"]
    for said in ("one and two, side by side", "real critical dimension 10", "start tokens 8", "1.1234"):
        assert said in words
    # One colour per run, the same in its own part.
    assert [part.tone for part in several.chapters] == [None, "vermilion", "amber"]


def test_few_trials_are_marked_where_they_stand(several):
    one, two = several.chapters[1:]
    assert not any(exhibit.few for exhibit in one.exhibits)
    assert {exhibit.name for exhibit in two.exhibits if exhibit.few} == {"two-perplexity", "two-needle"}


def test_the_same_run_gives_the_same_page(full_page, tmp_path):
    again = build(collect([runs.write_run(tmp_path / "full")]))
    assert render(again, "0") == full_page.read_text("utf-8")


def test_names_are_text(tmp_path):
    """A method, a task or a command that looks like HTML stays text."""
    measured = runs.evaluation(["retention"], warnings=["<script>alert(1)</script>"])
    evil = '"><script>alert(2)</script>'
    measured.rows[:] = [
        row.__class__(row.suite, evil, row.length, row.metric, row.value, row.stderr, row.trials, {"task": evil})
        for row in measured.rows[:1]
    ]
    measured.provenance["command"] = "longrope <b>"
    page = render(build(collect([runs.write_evaluation(tmp_path / "eval.json", measured)])), "0")
    assert "<script" not in page
    assert "alert(2)" in Tree(page).text


def test_an_evaluation_alone(tmp_path):
    path = runs.write_evaluation(tmp_path / "needles.json", runs.evaluation(["needle"]))
    report = build(collect([path]))
    assert report.title == "tiny, measured"
    assert report.chapters[0].lede == "Measurements of tiny at 256 to 2,048 tokens."
    assert [exhibit.name for exhibit in report.exhibits] == ["needle"]
