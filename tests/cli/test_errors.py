"""Errors as the command line prints them: the library's arguments as options, usage errors on one line."""

from __future__ import annotations

import pytest
from cyclopts import Argument

from longrope.cli import search
from longrope.cli.errors import in_options, options_by_name, shortened
from longrope.cli.main import options_of
from longrope.errors import LongRopeError


@pytest.fixture(scope="module")
def options() -> dict[str, Argument]:
    return options_by_name(options_of("search"))


@pytest.mark.parametrize(
    ("library", "printed"),
    [
        ("the folder is not empty; choose another `output_dir`", "the folder is not empty; choose another -o"),
        ("give `resume=True` to go on", "give --resume to go on"),
        ("expected `max_factor` of at least 1", "expected --max-factor of at least 1"),
        ("give `data`: a text file", "give --data: a text file"),
        ("set `method='cma'`", "set --method cma"),
        ("or `continuation=False`", "or --no-continuation"),
        ("`racing=True` drops candidates", "--racing on drops candidates"),
        ("`racing=False`", "--racing off"),
        ("`config.samples` is too high", "--samples is too high"),
        ("expected `ruler_tasks.0` to be", "expected ruler_tasks.0 to be"),  # an option of another verb
        ("run `pip install ray`", "run pip install ray"),
        ("add --allow-lossy, or leave it; a lone ` stays", "add --allow-lossy, or leave it; a lone ` stays"),
    ],
)
def test_arguments_become_options(options: dict[str, Argument], library: str, printed: str) -> None:
    assert in_options(library, options) == printed


def test_a_list_and_a_renamed_setting() -> None:
    evaluation = options_by_name(options_of("eval"))
    assert in_options("`ruler_tasks.0`, `suites`, `baselines`, `output`", evaluation) == (
        "--ruler-tasks, --suite, --against, -o"
    )
    assert in_options("`output_dir`, `config.trials`", evaluation) == "-o, --trials"
    extend = options_by_name(options_of("extend"))
    assert in_options("`search_data` and `evaluation_data`", extend) == "--data and --eval-data"
    export = options_by_name(options_of("export"))
    assert in_options("`target`, `allow_lossy=True`, `output_dir`", export) == "--to, --allow-lossy, -o"


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (("magic",), 'Unknown command "magic"'),
        (("search", "tiny", "-o", "run"), "expected --target-length, found none: see longrope search --help"),
        (("search", "tiny", "-o", "run", "--target-lenght", "4k"), "did you mean --target-length instead of"),
        (("search", "--target-length", "4k", "-o", "run"), "expected MODEL, found none"),
        (("search", "tiny", "-o", "run", "--target-length"), "expected a value after --target-length"),
        (("search", "tiny", "two", "-o", "run", "--target-length", "4k"), "expected nothing more, found two"),
        (("search", "tiny", "-o", "run", "--target-length", "4k", "--sampels", 2), "Did you mean --samples?"),
        (
            ("search", "tiny", "-o", "run", "--target-length", "4k", "--workers", "x"),
            "expected a whole number for --workers",
        ),
        (("search", "tiny", "-o", "run", "--target-length", "4k", "--workers", 0), "--workers"),
        (("search", "tiny", "-o", "run", "--target-length", "4k", "--racing", "maybe"), '"maybe" for --racing'),
        (("search", "tiny", "-o", "run", "--target-length", "4k", "--eval-data", "x"), "search has no --eval-data"),
        (("eval", "tiny", "--below=ramp"), "eval has no --below; search and extend have it"),
        (("search", "tiny\udcff"), "expected printable text"),
        (("search", "tiny\x1b[31m"), "expected printable text"),
        (("inspect", "no\u3000such"), "there is no model folder at no"),
        (("inspect", "no\u00a0such"), "there is no model folder at no"),
        (("inspect", "no\u200dsuch"), "there is no model folder at no\u200dsuch"),
    ],
)
def test_usage_errors_are_one_line(cli, arguments: tuple[object, ...], printed: str) -> None:
    ran = cli(*arguments)
    assert ran.out == ""
    assert printed in ran.refusal


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (
            LongRopeError("too long", hint="give `resume=True`\nnow"),
            2,
            "longrope: error: too long; give --resume now\n",
        ),
        (
            PermissionError(13, "Permission denied"),
            2,
            "longrope: error: PermissionError: [Errno 13] Permission denied\n",
        ),
        (KeyError("x"), 1, "longrope: unexpected error: KeyError: 'x'; --verbose shows where it happened\n"),
        (KeyboardInterrupt(), 130, "longrope: interrupted\n"),
    ],
)
def test_errors_of_the_library(cli, monkeypatch, error: BaseException, code: int, printed: str) -> None:
    def fails(_folder: object) -> None:
        raise error

    monkeypatch.setattr(search, "check_output_folder", fails)
    ran = cli("search", "tiny", "--target-length", "4k", "-o", "run")
    assert (ran.code, ran.err) == (code, printed)


def test_verbose_shows_the_traceback_of_an_unexpected_error(cli, monkeypatch) -> None:
    monkeypatch.setattr(search, "check_output_folder", lambda _folder: {}["x"])
    ran = cli("search", "tiny", "--target-length", "4k", "-o", "run", "--verbose")
    assert ran.code == 1
    assert "Traceback" in ran.err.splitlines()[1]  # after a line of the log
    assert "test_errors.py" in ran.err


def test_an_error_is_at_most_three_lines(cli, monkeypatch):
    """Also where another library's message has thousands of letters, as torch's for a device it was not built for."""
    monkeypatch.setenv("COLUMNS", "80")
    ran = cli("search", "tiny", "--target-length", "1k", "-o", "never", "--device", "vulkan")
    assert len(ran.refusal) <= 3 * 80 + 1
    assert "the device 'vulkan' cannot be used here" in ran.refusal
    assert "there are cpu" in ran.refusal


def test_a_long_message_keeps_its_beginning_and_its_end(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = " ".join(f"word{number}" for number in range(200))
    cut = shortened(f"expected {words}; do this")
    assert len(cut) <= 240
    assert cut.startswith("expected word0 word1 ")
    assert " … " in cut
    assert cut.endswith("word199; do this")
    assert shortened("a short one") == "a short one"
    command = f" python -c 'print({words!r})'"
    assert shortened(f"expected {words}; do this:{command}").endswith(f"word199; do this:{command}")


def test_missing_texts_are_named_by_their_option(cli, checkpoint, texts, tmp_path):
    search = cli("extend", checkpoint, "-o", tmp_path / "a", "--target-length", 128)
    assert "as --data and as --eval-data to measure on, found none" in search.err
    measure = cli("extend", checkpoint, "-o", tmp_path / "a", "--target-length", 128, "--data", texts / "search.txt")
    assert "as --eval-data to measure on, found none" in measure.err
    assert "as --data to measure on, found none" in cli("eval", checkpoint).refusal
