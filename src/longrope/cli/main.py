"""`longrope <verb>`: the entry point. Errors a user can mend are one line on standard error and exit code 2."""

from __future__ import annotations

import sys
from typing import Any

import typer

from longrope.cli import doctor, evaluate, export, extend, finetune, fix_config, inspect, plan, presets, report, search
from longrope.errors import LongRopeError, one_line

# Typer carries a click of its own and does not export this class.
_UsageError: type[Any] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

_INTERRUPTED = 130  # 128 + SIGINT, as shells count

app = typer.Typer(
    name="longrope",
    help="Extend the context window of a RoPE language model, and prove it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("inspect")(inspect.command)
app.command("plan")(plan.command)
app.command("search")(search.command)
app.command("finetune")(finetune.command)
app.command("extend")(extend.command)
app.command("eval")(evaluate.command)
app.command("export")(export.command)
app.command("doctor")(doctor.command)
app.command("fix-config")(fix_config.command)
app.command("presets")(presets.command)
app.command("report")(report.command)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from longrope import __version__

        typer.echo(f"longrope {__version__}")
        raise typer.Exit()


def run(arguments: list[str]) -> int:
    """Run the command line on `arguments` and return its exit code."""
    if any(not argument.isprintable() for argument in arguments):  # bytes that are no text come in as surrogates
        return _fail("expected printable text as arguments; found one that is not")
    try:
        result = app(args=arguments or ["--help"], prog_name="longrope", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        result = _INTERRUPTED
    except (LongRopeError, OSError, MemoryError) as error:
        return _fail(one_line(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for --help
            raise
        return _fail(f"out of memory: try a shorter length, another --dtype or another --device ({one_line(error)})")
    except _UsageError as error:
        return _fail(error.format_message())
    if result == _INTERRUPTED:  # typer returns it for Ctrl-C, and says nothing
        print("longrope: interrupted", file=sys.stderr)
    return result if isinstance(result, int) else 0


def _fail(message: str) -> int:
    print(f"longrope: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main() -> None:
    sys.exit(run(sys.argv[1:]))
