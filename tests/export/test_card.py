"""The model card shows text from strangers' files and lets none of it become HTML, a link, a table or a heading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from longrope.evaluation.results import EvalResults, EvalRow
from longrope.export.card import evidence_table
from longrope.export.export import export_checkpoint
from longrope.export.forms import express
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


SOURCE_CARD = "---\nlibrary_name: transformers\nlicense: {}\n---\n# A model\n"
GEOMETRY = RopeGeometry(rotary_dim=32, base=10000.0, original_length=64)


def scaling_of(**provenance: object) -> RopeScaling:
    return RopeScaling.extended(GEOMETRY, 128, [1.0] * 8 + [2.0] * 8, provenance=provenance)


@pytest.mark.parametrize(
    ("licence", "line", "says"),
    [
        ("apache-2.0", "license: apache-2.0\n", "states `apache-2.0`, which holds for these weights too"),
        ("[mit]\nevil: <b>", "", "state no licence: look it up before you pass these weights on"),
        ('"<script>"', "", "state no licence"),
    ],
)
def test_the_licence_of_the_base_model(checkpoint: Path, tmp_path: Path, licence: str, line: str, says: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    (source / "README.md").write_text(SOURCE_CARD.format(licence))
    export_checkpoint(source, scaling_of(), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert ("license:" in card.partition("\n# ")[0]) is bool(line)
    assert line in card
    assert says in card.partition("## Licence\n")[2].partition("##")[0]
    assert "Nothing was trained" in card
    assert "base_model" not in card


def test_a_licence_file_is_copied_and_named(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    (source / "LICENSE").write_text("as you like")
    export_checkpoint(source, scaling_of(), tmp_path / "out")
    assert (tmp_path / "out/LICENSE").read_text() == "as you like"
    assert "come with its licence" in (tmp_path / "out/README.md").read_text()


def test_a_fine_tuned_export_says_what_was_trained(checkpoint: Path, tmp_path: Path) -> None:
    settings = {"steps": 400, "length": 128, "mix": "short:0.3,long:0.7", "lora": None}
    training = {"model": "owner/base-7b", "settings": settings, "final_loss": 2.5, "command": "longrope finetune x"}
    scaling = scaling_of(method="gradient", command="longrope search owner/base-7b", training=[training])
    export_checkpoint(checkpoint, scaling, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: owner/base-7b\nbase_model_relation: finetune\n" in card
    assert "# owner/base-7b, fine-tuned, with a context window of 128 tokens" in card
    said = "400 steps of rows of 128 tokens, mix short:0.3,long:0.7, all weights, last loss 2.5000"
    assert said in card.replace("&#58;", ":")
    assert "`longrope finetune x`" in card
    assert "- search: `longrope search owner/base-7b`" in card
    assert "Nothing was trained" not in card


def test_a_card_says_that_rows_skipped_ahead(checkpoint: Path, tmp_path: Path) -> None:
    settings = {"steps": 400, "length": 64, "skip_to": 128, "mix": "long", "lora": None}
    training = {"model": "owner/base-7b", "settings": settings, "row_attention_factors": {"long": 1.0625}}
    export_checkpoint(checkpoint, scaling_of(training=[training]), tmp_path / "out")
    said = (
        "400 steps of rows of 64 tokens whose positions skip ahead, up to 128, attention factor 1.062 in long, mix long"
    )
    assert said in (tmp_path / "out/README.md").read_text()


def test_evidence_has_a_verdict_and_the_needles_of_all_depths() -> None:
    rows = [
        EvalRow("perplexity", name, 128, "perplexity", value, 0.1, 10) for name, value in (("none", 9.0), ("own", 5.0))
    ]
    rows += [EvalRow("needle", "own", 128, "accuracy", share, 0.1, 20, {"depth": share}) for share in (0.5, 1.0)]
    text = evidence_table(rows, express(scaling_of(), "hf"))
    assert "Best at 128 tokens" in text
    assert "own" in text
    assert "| own | 0.750 ± 0.069 |" in text


def test_measurements_that_come_after_the_export_can_be_put_in(cli, checkpoint, texts, tmp_path, monkeypatch) -> None:
    """The card says how; its commands work in the folder as they stand, and so does the run folder's eval.json."""
    run = tmp_path / "run"
    run.mkdir()
    scaling = scaling_of(model=str(checkpoint))
    scaling.save(run / "scaling.json")
    export_checkpoint(run, output_dir=tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    evidence = card.partition("## Evidence\n")[2].partition("\n## ")[0]
    assert "Nothing had been measured when this card was written" in evidence
    commands = [part for part in evidence.split("`")[1::2] if part.startswith("longrope ") and "RUN" not in part]
    assert [command.split()[1] for command in commands] == ["eval", "report"]
    monkeypatch.chdir(tmp_path / "out")
    given = iter(["64,128", str(texts / "other.txt")])
    for command in commands:
        words = [next(given) if word == "…" else word for word in command.split()[1:]]
        ran = cli(*words, *(["--samples", 1] if words[0] == "eval" else []))
        assert ran.code == 0, ran.err
    assert "perplexity" in Path("report.md").read_text("utf-8")

    words = ("--scaling", run / "scaling.json", "--lengths", "64,128", "--data", texts / "other.txt", "--samples", 1)
    assert cli("eval", checkpoint, *words, "-o", run / "eval.json").code == 0
    export_checkpoint(run, output_dir=tmp_path / "measured")
    card = (tmp_path / "measured/README.md").read_text()
    assert "Nothing had been measured" not in card
    assert "Perplexity, by length in tokens" in card


@pytest.mark.parametrize("form", ["hf", "hf-unified"])
def test_limits_agree_with_the_notes(checkpoint: Path, tmp_path: Path, form: str) -> None:
    done = export_checkpoint(checkpoint, scaling_of(), tmp_path / "out", target=form)
    limits = (tmp_path / "out/README.md").read_text().partition("## Limits and losses\n")[2].partition("\n## ")[0]
    lines = limits.strip().splitlines()
    assert sum(done.to_know.lower()[:60] in line.lower() for line in lines) == 1
    assert all(note in limits for note in done.notes)
    refusing = [serving for serving in done.servings if not serving.commands]
    assert all(f"- {serving.runtime}: " in limits for serving in refusing)
