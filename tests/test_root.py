"""The other root modules: lengths as people write them, one-line errors, provenance, light imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.errors import LongRopeError, one_line
from longrope.provenance import command_line
from longrope.units import format_length, parse_length, parse_lengths

# lengths


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("4096", 4096),
        (4096, 4096),
        ("128k", 131_072),
        ("128K", 131_072),
        ("2M", 2_097_152),
        ("2m", 2_097_152),
        (" 8k ", 8192),
        ("1", 1),
    ],
)
def test_a_length_is_parsed(text: str | int, tokens: int) -> None:
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "0k", "-4096", "1.5k", "k", "4096 tokens", "1e5", "128kk", "0x10", -1, 0])
def test_what_is_no_length_is_refused_in_one_line(text: str | int) -> None:
    with pytest.raises(LongRopeError, match="positive whole number of tokens") as caught:
        parse_length(text)
    assert repr(str(text)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(1000, "1000"), (1024, "1k"), (4096, "4k"), (131_072, "128k"), (2_097_152, "2M"), (1_572_864, "1536k")],
)
def test_a_length_is_written_in_its_shortest_exact_form(tokens: int, text: str) -> None:
    assert format_length(tokens) == text


@given(st.integers(1, 2**40))
def test_what_is_written_is_read_back(tokens: int) -> None:
    assert parse_length(format_length(tokens)) == tokens


def test_a_list_of_lengths_keeps_its_order() -> None:
    assert parse_lengths("2k, 256,1k") == [2048, 256, 1024]


@pytest.mark.parametrize("text", ["", ",", "256,x"])
def test_a_list_without_lengths_is_refused(text: str) -> None:
    with pytest.raises(LongRopeError, match="positive whole number of tokens"):
        parse_lengths(text)


# errors


def test_an_error_is_put_on_one_line() -> None:
    assert one_line(LongRopeError("expected a\n  folder")) == "expected a folder"


def test_an_error_of_another_library_keeps_its_type() -> None:
    assert one_line(KeyError("rope_theta")) == "KeyError: 'rope_theta'"
    assert one_line(ValueError("two\nlines")) == "ValueError: two lines"


def test_an_error_without_a_message_still_says_something() -> None:
    assert one_line(ValueError()) == "ValueError"
    assert one_line(LongRopeError()) == "LongRopeError"


def test_nothing_needs_a_module_that_windows_lacks() -> None:
    """An import that a missing module does not end is no need."""
    missing = "fcntl", "resource", "pwd", "grp", "termios"
    for path in (Path(__file__).parent.parent / "src").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        tried = [
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.Try) and "ImportError" in {ast.unparse(h.type) for h in node.handlers if h.type}
            for part in node.body
            for inner in ast.walk(part)
        ]
        for node in ast.walk(tree):
            if node in tried:
                continue
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & set(missing), path
            if isinstance(node, ast.ImportFrom):
                assert node.module not in missing, path


# provenance


def test_the_command_line_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/longrope", "search", "tiny", "--data", "my book.txt"])
    assert command_line() == "longrope search tiny --data 'my book.txt'"
    monkeypatch.setattr("sys.argv", ["/lib/longrope/__main__.py", "plan"])
    assert command_line() == "python -m longrope plan"


def test_the_command_line_imports_light() -> None:
    code = "import sys, longrope, longrope.cli.main; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
