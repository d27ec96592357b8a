"""The page as text: complete, self-contained, the same every time, and safe whatever names it is given."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from longrope.report.collect import collect
from longrope.report.markdown import render_markdown
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
    assert names == ["perplexity", "position", "passkey", "needle", "ruler", "retention", "search", "factors"]
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
        "compared-perplexity",
        "compared-needle",
        "compared-search",
        "compared-factors",
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


def test_the_verdict_is_the_first_sentence(full, full_page):
    (chapter,) = full.chapters
    assert chapter.verdict[0].startswith("Best at 2k tokens: this scaling, perplexity 131.44")
    assert chapter.verdict[1].startswith("this scaling against the original model (original): ")
    assert "72.5% of the passkeys" in chapter.verdict[2]
    words = Tree(full_page.read_text("utf-8")).text
    assert words.index(chapter.verdict[0]) < words.index(chapter.lede) < words.index("Perplexity by length")


def test_a_search_alone_has_its_own_verdict(tmp_path):
    folder = runs.write_run(tmp_path / "run")
    for name in ("eval.json", "extend.json"):
        (folder / name).unlink()
    (chapter,) = build(collect([folder])).chapters
    assert chapter.verdict == (
        "On the texts of the search: 0.059 nats per token better than YaRN, which is the best baseline. "
        "Nothing was measured on other texts.",
    )


def test_the_head_says_when_how_long_on_what_and_with_which_code(tmp_path):
    folder = runs.write_run(tmp_path / "run", suites=["perplexity"])
    machine = {"processor": "AMD EPYC", "gpu": "1 × NVIDIA H100", "commit": "0123456789abcdef" * 2}
    changes = {
        "search.json": {"finished": "2026-11-27T05:00:00+00:00", "seconds": 4000.0} | machine,
        "eval.json": {"finished": "2026-11-27T06:00:00+00:00", "seconds": 75.0, "versions": {"longrope": "0.1.0"}}
        | machine,
    }
    for name, more in changes.items():
        document = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(document | more), "utf-8")
    (chapter,) = build(collect([folder])).chapters
    found = {fact.term: "; ".join(fact.lines) for fact in chapter.about}
    assert found["Date"] == "2026-11-27 06:00:00 UTC"
    assert found["Time"] == "search 67 min, evaluation 1 min 15 s"
    assert found["Computed on"] == "1 × NVIDIA H100"
    assert "longrope 0.1.0, commit 0123456789ab" in found["Code"]
    assert found["Tokens"] == (
        "491,520 token passes of the search (a backward counts two); 81,920 tokens of held-out text (40 × 2,048)"
    )


def test_a_server_is_what_computed_its_numbers(tmp_path):
    measured = runs.evaluation(["perplexity"], server="http://box:8000/v1")
    measured.provenance.update(processor="Laptop CPU", gpu="1 × small")
    path = runs.write_evaluation(tmp_path / "eval.json", measured)
    (chapter,) = build(collect([path])).chapters
    assert {fact.term: fact.lines for fact in chapter.about}["Computed on"] == ("http://box:8000/v1",)
    assert not {"Machine", "Processor", "GPU"} & {fact.term for fact in chapter.facts}


def test_a_browser_shows_the_value_of_a_point(full_page):
    figure = re.search(r'id="perplexity".*?<svg.*?</svg>', full_page.read_text("utf-8"), re.DOTALL)[0]
    titles = re.findall(r"<title>(.*?)</title>", figure)
    assert "this scaling, 2,048 tokens: 131.4 ± 8.8" in titles
    assert len(titles) == len(runs.METHODS) * len(runs.LENGTHS)
    for name, says in (
        ("needle", "this scaling, 256 tokens, depth 0 %"),
        ("factors", "this scaling, pair 31: λ "),
        ("search", "best loss"),
    ):
        part = re.search(rf'<section id="{name}".*?</section>', full_page.read_text("utf-8"), re.DOTALL)[0]
        assert any(says in title for title in re.findall(r"<title>(.*?)</title>", part)), name


def test_every_table_is_a_csv_file_in_the_page(full, full_page):
    found = re.findall(
        r'download="([^"]+)" href="data:text/csv;charset=utf-8;base64,([^"]+)"', full_page.read_text("utf-8")
    )
    names = [name for exhibit in full.exhibits for name in exhibit.csv_files]
    assert [name for name, _ in found] == names
    assert len(set(names)) == len(names)
    table = list(csv.reader(io.StringIO(base64.b64decode(dict(found)["perplexity.csv"]).decode())))
    assert table[0] == ["scaling", "256", "256 error", "512", "512 error", "1k", "1k error", "2k", "2k error"]
    own = next(line for line in table if line[0] == "this scaling")
    assert [float(value) for value in own[-2:]] == [131.44, 8.76]
    for exhibit in full.exhibits:
        for text in exhibit.csv_files.values():
            rows = list(csv.reader(io.StringIO(text)))
            assert len({len(row) for row in rows}) == 1
            assert "−" not in text


def test_markdown_says_the_same(full, several):
    text = render_markdown(full, "0", Path("report_figures"))
    assert text.startswith("# tiny: from 256 to 2,048 tokens")
    assert (
        text.index("**Best at 2k tokens") < text.index("## Before you use it") < text.index("## Perplexity by length")
    )
    assert "![Perplexity by length](report_figures/perplexity.png)" in text
    row = "| **this scaling** | 55.03 ★ ± 3.67 | 55.41 ★ ± 3.69 | 61.46 ★ ± 4.10 | 131.44 ★ ± 8.76 |"
    assert row in text.splitlines()
    assert text.count("<details>") == text.count("</details>") > 0
    assert "`longrope test`" in text
    both = render_markdown(several, "0", Path("figures"))
    assert [line for line in both.splitlines() if line.startswith("## ")] == [
        "## The runs compared",
        "## one",
        "## two",
    ]
