"""Help: whole at 80 columns, a line for every option, no heavy library imported for it, and the page made from it."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys

import pytest
from rich.console import Console

from longrope.cli.errors import options_by_name
from longrope.cli.main import MODULES, VERBS, app, options_of
from longrope.search.config import SearchConfig
from scripts.option_tables import PAGE, page


def help_of(verb: str) -> str:
    screen = io.StringIO()
    app.help_print([verb], console=Console(file=screen, width=80, color_system=None))
    return screen.getvalue()


@pytest.mark.parametrize("verb", VERBS)
def test_help_at_80_columns(verb: str) -> None:
    shown = help_of(verb)
    assert max(map(len, shown.splitlines())) <= 80
    words = shown.replace("│", " ").split()
    for option in (option for option in options_of(verb) if option.names != ("*",)):
        for name in option.names:
            assert name in words, f"{name} is cut off"
        assert option.parameter.help, f"{option.name} has no help"
        assert option.parameter.help.split()[0] in words


@pytest.mark.parametrize("verb", ["search", "extend"])
def test_the_help_of_a_setting_of_some_methods_names_them(verb: str) -> None:
    options = options_by_name(options_of(verb))
    for name in SearchConfig.model_fields.keys() & options.keys():
        methods = SearchConfig.OF_METHODS.get(name)
        shown = options[name].parameter.help or ""
        assert shown.endswith(f" For {', '.join(methods)}.") if methods else " For " not in shown, name


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_in_its_function_too(verb: str) -> None:
    module = importlib.import_module(f"longrope.cli.{MODULES.get(verb, verb).replace('-', '_')}")
    assert module.command.__doc__ == VERBS[verb].partition("\n")[0]


def test_options_come_in_groups() -> None:
    titles = [line.split()[1] for line in help_of("search").splitlines() if line.startswith("╭─")]
    assert titles == ["Arguments", "Options", "Search", "Several", "Loading", "Output"]


def test_help_imports_no_heavy_library() -> None:
    code = f"""
import sys
from longrope.cli.main import run
heavy = {{"numpy", "torch", "transformers", "pandas", "matplotlib", "ray", "datasets"}}
assert run(["--help"]) == 0
assert not {{"pydantic", *heavy}} & set(sys.modules), "the list of verbs needs none"
for verb in {list(VERBS)}:
    assert run([verb, "--help"]) == 0
    assert not heavy & set(sys.modules), (verb, heavy & set(sys.modules))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_page_of_the_docs_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == page(), "run python scripts/option_tables.py"


def test_version_and_what_is_shown_without_a_verb(cli) -> None:
    from longrope import __version__

    assert cli("--version").out == f"longrope {__version__}\n"
    bare = cli()
    assert bare.code == 0
    assert all(verb in bare.out for verb in VERBS)


def test_completion_is_written_for_a_shell(cli, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli("--install-completion", "--shell", "bash", "--output", tmp_path / "completion.bash").code == 0
    script = (tmp_path / "completion.bash").read_text("utf-8")
    assert "fix-config" in script
    assert "--target-length" in script
