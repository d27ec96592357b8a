"""The model card shows text from strangers' files and lets none of it become HTML, a link, a table or a heading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from longrope.evaluation.results import EvalResults, EvalRow
from longrope.export.export import export_checkpoint
from longrope.export.markdown import code_block, code_span, plain
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "x\n\n# A heading\n\n| a | b |\n|---|---|\n| 1 | 2 |",
    "`</code>` ``` x",
    "```\n<b>out</b>\n```",
    "[a link](javascript:alert(1))",
    "![](http://host/pixel.png) <http://host> http://host/page",
    "**bold** _a_ ~~b~~ \\` \\",
    "---\nlicense: mit\n---",
    "&lt;b&gt; &#60;i>",
    "a\r\u2028\u0085b\x00\x1b[31m",
    "- item\n1. item\n> quote",
    "$\\href{javascript:alert(1)}{x}$",
    "x" * 5000,
)


def shapes(markdown: str) -> list[str]:
    """The kinds of all tokens of a card, but for text: what it would be rendered to."""
    kinds: list[str] = []
    for token in MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown):
        kinds += [token.type, *(child.type for child in token.children or ())]
    return [kind for kind in kinds if kind not in ("text", "softbreak", "code_inline")]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_stays_text(text: str) -> None:
    assert shapes(f"begin {plain(text)} end") == ["paragraph_open", "inline", "paragraph_close"]
    assert shapes(f"begin {code_span(text)} end") == ["paragraph_open", "inline", "paragraph_close"]
    assert shapes(f"{code_block([text, text])}\n\nend") == ["fence", "paragraph_open", "inline", "paragraph_close"]
    row = f"| a | b |\n|---|---|\n| {plain(text)} | 2 |\n"
    assert shapes(row) == shapes("| a | b |\n|---|---|\n| text | 2 |\n")
    assert "<" not in plain(text)


def test_names_as_they_are() -> None:
    assert plain("second-ntk-critical, exact_match of Qwen2.5-7B") == "second-ntk-critical, exact_match of Qwen2.5-7B"
    assert code_span("longrope export 'a b' | tee x") == "`longrope export 'a b' | tee x`"


def test_a_run_from_a_stranger(checkpoint: Path, tmp_path: Path) -> None:
    """A card of a run whose every name is hostile has the shape of a card of a run with plain names."""
    geometry = RopeGeometry(rotary_dim=32, base=10000.0, original_length=64)
    cards = []
    for number, text in enumerate(("plain", "</td><script>alert(1)</script>\n\n# H\n\n| a |\n|---|\n`| **x** ```")):
        run = tmp_path / f"run{number}"
        run.mkdir()
        (run / f"model{number}").symlink_to(checkpoint)
        scaling = RopeScaling.extended(geometry, 128, [1.0] * 8 + [2.0] * 8)
        document = json.loads(scaling.to_json()) | {
            "provenance": {"model": str(run / f"model{number}"), "method": text, "command": text, "versions": text}
        }
        (run / "scaling.json").write_text(json.dumps(document))
        rows = tuple(EvalRow(text, text, length, text, 1.5, 0.5, 3) for length in (64, 128))
        EvalResults(rows, {"model": text}).save(run / "eval.json")
        export_checkpoint(run, output_dir=tmp_path / f"out{number}")
        cards.append((tmp_path / f"out{number}/README.md").read_text())
    assert "1.50" in cards[1]
    assert shapes(cards[0]) == shapes(cards[1])
    assert not any(kind.startswith("html") for kind in shapes(cards[1]))


def test_a_hostile_name_of_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a`b<img src=x>|**c**"
    shutil.copytree(checkpoint, folder)
    geometry = RopeGeometry(rotary_dim=32, base=10000.0, original_length=64)
    scaling = RopeScaling.extended(geometry, 128, [1.0] * 8 + [2.0] * 8)
    export_checkpoint(folder, scaling, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert not any(kind.startswith("html") for kind in shapes(card))
    assert "base_model" not in card
