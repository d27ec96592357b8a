"""Wrong input, verb by verb: one line that says what to do, exit code 2, nothing overwritten."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from tests.checkpoints import tokenizer

BUDGET = ("--method", "longrope", "--population", 4, "--iterations", 1, "--samples", 1)


@pytest.fixture(scope="module")
def fitting(tmp_path_factory) -> Path:
    """A scaling that fits the test checkpoint."""
    path = tmp_path_factory.mktemp("fitting") / "scaling.json"
    geometry = RopeGeometry(rotary_dim=32, base=10000.0, original_length=64)
    RopeScaling.extended(geometry, 128, [1.0] * 8 + [2.0] * 8).save(path)
    return path


@pytest.fixture
def refused(cli):
    """Run, and check the form of the refusal; returns the message."""

    def call(*arguments: object) -> str:
        ran = cli(*arguments)
        assert ran.out == "" or arguments[0] == "extend"  # which inspects the model first
        return ran.refusal

    return call


def search(checkpoint, texts, tmp_path, **changes):
    options = {"model": checkpoint, "--target-length": 128, "--data": texts / "search.txt", "-o": tmp_path / "run"}
    options |= changes
    model = options.pop("model")
    return ("search", model, *(part for option in options.items() for part in option), *BUDGET)


@pytest.mark.parametrize("verb", ["inspect", "search", "export"])  # eval and extend open a model as search does
def test_unknown_model_folder(verb, refused, texts, fitting, tmp_path):
    more = {
        "inspect": (),
        "search": ("--target-length", 128, "-o", tmp_path / "run"),
        "export": ("--scaling", fitting, "-o", tmp_path / "run"),
    }
    assert "no model folder" in refused(verb, tmp_path / "nowhere", *more[verb])
    assert not (tmp_path / "run").exists()


def test_model_without_rope(refused, tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer().save_pretrained(tmp_path / "gpt2")
    assert "RoPE" in refused("inspect", tmp_path / "gpt2")
    assert "RoPE" in refused("eval", tmp_path / "gpt2", "--lengths", "64")


def test_target_lengths(refused, checkpoint, texts, tmp_path):
    assert "above the model's window of 64" in refused(*search(checkpoint, texts, tmp_path, **{"--target-length": 64}))
    for target in ("-4", "4g"):
        assert "a length must be" in refused(*search(checkpoint, texts, tmp_path, **{"--target-length": target}))
    assert "above the model's window" in refused(
        "extend", checkpoint, "--target-length", 64, "-o", tmp_path / "run", "--data", texts / "search.txt",
        "--eval-data", texts / "other.txt",
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_texts(refused, checkpoint, texts, tmp_path):
    cases = {"empty.txt": b"", "binary.txt": b"\x00\x01\x02" * 100, "latin.txt": "é".encode("latin-1") * 50}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        assert name in refused(*search(checkpoint, texts, tmp_path, **{"--data": tmp_path / name}))
    assert "no text" in refused(*search(checkpoint, texts, tmp_path, **{"--data": tmp_path / "missing.txt"}))
    (tmp_path / "short.txt").write_text("a few words")
    assert "tokens in 1 documents" in refused(
        *search(checkpoint, texts, tmp_path, **{"--data": tmp_path / "short.txt"})
    )
    assert "as --data, found none" in refused("search", checkpoint, "--target-length", 128, "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_search_texts_are_no_evaluation_texts(refused, checkpoint, texts, tmp_path):
    same = texts / "search.txt"
    data = ("--data", same, "--eval-data", same)
    assert "search.txt" in refused("extend", checkpoint, "--target-length", 128, *data, "-o", tmp_path / "run", *BUDGET)
    assert not (tmp_path / "run").exists()


def test_scaling_files(refused, checkpoint, texts, fitting, tmp_path):
    whole = json.loads(fitting.read_text())
    other_head = whole | {
        "rotary_dim": 64,
        "windows": [window | {"factors": [1.0] * 32} for window in whole["windows"]],
    }
    cases = {
        "head.json": (json.dumps(other_head), "rotary_dim 64"),
        "schema.json": (json.dumps(whole | {"schema": "longrope.scaling/99"}), "schema"),
        "cut.json": (fitting.read_text()[:100], "JSON"),
        "list.json": ("[1, 2]", "schema"),
    }
    for name, (content, expected) in cases.items():
        (tmp_path / name).write_text(content)
        assert expected in refused("export", checkpoint, "--scaling", tmp_path / name, "-o", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert "cannot read" in refused("export", checkpoint, "--scaling", tmp_path / "none.json", "-o", tmp_path / "out")


def test_output_folder_is_never_overwritten(refused, checkpoint, texts, fitting, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("keep me")
    assert "not empty" in refused(*search(checkpoint, texts, tmp_path, **{"-o": full}))
    assert "not empty" in refused("export", checkpoint, "--scaling", fitting, "-o", full)
    assert "not empty" in refused("extend", checkpoint, "-o", full)
    assert "found a file" in refused(*search(checkpoint, texts, tmp_path, **{"-o": full / "precious.txt"}))
    assert [path.name for path in full.iterdir()] == ["precious.txt"]
    assert (full / "precious.txt").read_text() == "keep me"


def test_output_folder_that_cannot_be_written(refused, checkpoint, texts, fitting, tmp_path, monkeypatch):
    def read_only(self, *_args, **_kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert "Read-only" in refused(*search(checkpoint, texts, tmp_path))
    assert "Read-only" in refused("export", checkpoint, "--scaling", fitting, "-o", tmp_path / "out")


def test_logs(refused, cli, checkpoint, texts, tmp_path):
    arguments = search(checkpoint, texts, tmp_path)
    assert "search.jsonl to resume; start without --resume" in refused(*arguments, "--resume")
    assert cli(*arguments).code == 0
    log = tmp_path / "run" / "search.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-7])
    assert cli(*arguments, "--resume").code == 0  # what was cut off is computed again
    assert log.read_bytes() == whole
    log.write_bytes(whole.replace(b'"loss": 5.', b'"loss": 6.', 1))
    assert "search.jsonl is damaged in line " in refused(*arguments, "--resume")
    log.write_bytes(whole)
    assert "another search" in refused(*arguments, "--resume", "--seed", 5)
    assert log.read_bytes() == whole


@pytest.mark.parametrize("limit", [pytest.param(1000, marks=pytest.mark.slow), 2200])
def test_no_space_left(checkpoint, texts, tmp_path, limit):
    """A file-size limit stands in for a full disk: writing fails in the middle of the run, in a real process."""
    arguments = [str(part) for part in search(checkpoint, texts, tmp_path)]
    code = "import sys; from longrope.cli.main import run; sys.exit(run(sys.argv[1:]))"
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        check=False,
    )
    assert ran.returncode == 2, ran.stderr
    assert "cannot write" in ran.stderr
    assert "Traceback" not in ran.stderr
    for path in (tmp_path / "run").glob("*"):
        assert path.read_bytes().endswith(b"\n") or path.stat().st_size == 0  # whole lines only


def test_options(refused, checkpoint, texts, tmp_path):
    assert "--attention-factor" in refused(*search(checkpoint, texts, tmp_path, **{"--attention-factor": "-1"}))
    assert "dtype" in refused(*search(checkpoint, texts, tmp_path, **{"--dtype": "int4"}))
    assert "suites" in refused("eval", checkpoint, "--lengths", "64", "--suite", "magic", "--data", texts)
    assert "'magic'" in refused("eval", checkpoint, "--lengths", "64", "--against", "magic", "--data", texts)
    assert "stride" in refused("eval", checkpoint, "--lengths", "64", "--stride", "64", "--data", texts)
