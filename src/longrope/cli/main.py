"""`longrope <verb>`: the entry point. Errors that a user can mend are one line on standard error and exit code 2.

The options are read by cyclopts. Of the two libraries that read typed models, tyro prints an error as a box of its own
and ends the process, converts the values of a pydantic model by itself (so `128k` is no length), and imports every verb
to build its parser. Cyclopts raises its errors, hands the values to pydantic as they were typed, and imports only the
verb that is run, so that `longrope --help` needs neither torch nor transformers.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any
from unicodedata import category

from cyclopts import App, ArgumentCollection, CycloptsError, Group, Parameter

from longrope.callbacks import Stopped
from longrope.cli.common import speaks
from longrope.cli.errors import in_options, options_by_name, shortened, usage_error
from longrope.cli.stopping import EXIT_CODE
from longrope.errors import LongRopeError, one_line
from longrope.transformers_version import require_known_transformers

_INTERRUPTED = 130  # 128 + SIGINT, as shells count
_UNEXPECTED = 1


def _version() -> str:
    from longrope import __version__

    return f"longrope {__version__}"


VERBS = {
    "inspect": "Show a model's rotary geometry: periods, critical dimensions, the scaling already present.",
    "plan": "Tokens, FLOPs, memory and hours of search, fine-tuning and evaluation, before they are spent.",
    "search": "Search rescale factors for a longer window, without training.",
    "finetune": "Fine-tune a model under a scaling, at one window or at several mixed.",
    "extend": "Extend a model's window and prove it, by a search alone or by a recipe.\n\n"
    "Without a recipe, the budget of the search is that of a demonstration.",
    "eval": "Measure a model, or the model of a server: perplexity, retrieval, RULER, short texts.",
    "export": "Write a checkpoint with the longer window, reload it and prove that it is applied.",
    "doctor": "Show what each runtime computes from a checkpoint, or what a running server does.\n\n"
    "Exit code 1 when a runtime drops or changes the scaling. Without --runtime, transformers 5 and 4.57, vLLM and "
    "SGLang count, and llama.cpp for a GGUF file.",
    "fix-config": "Write every key that some runtime reads into config.json again; weights are not touched.",
    "presets": "List, show or write the published factor tables, or a factor file of the authors' code.",
    "report": "Write a report on one run, or on several side by side: an HTML or Markdown file, figures and tables.",
}
"""Help of the verbs, in the order in which they are used. Each is the function `command` of a module of this room, and
its first line the function's docstring: here because the list of verbs is shown without importing them."""
MODULES = {"eval": "evaluate"}


def _shown_default(default: Any) -> str | None:
    """A default as the help shows it; None where there is nothing to show."""
    if default is None or default is False or default in ("", ()):
        return None
    return "on" if default is True else f"{default:g}" if isinstance(default, float) else str(default)


DEFAULTS = Parameter(negative=(), allow_repeating=True, show_default=_shown_default)
app = App(
    name="longrope",
    help="Extend the context window of a RoPE language model, and prove it.",
    version=_version,
    version_format="plaintext",
    help_flags=("--help", "-h"),
    help_format="plaintext",
    default_parameter=DEFAULTS,
    group_parameters=Group("Options", sort_key=0),
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
    print_error=False,
    result_action="return_value",
)
for place, (name, text) in enumerate(VERBS.items()):
    module = MODULES.get(name, name).replace("-", "_")
    app.command(f"longrope.cli.{module}:command", name=name, help=text, sort_key=place)
app.register_install_completion_command(help="Install completion for your shell.")


def run(arguments: list[str]) -> int:
    """Run the command line on `arguments` and return its exit code."""
    # Control characters, and surrogates, as which bytes that are no text come in.
    if any(category(letter) in ("Cc", "Cs") for argument in arguments for letter in argument):
        return _fail("expected printable text as arguments; found one that is not")
    try:
        if arguments and arguments[0] in VERBS:
            require_known_transformers()
    except LongRopeError as error:
        return _fail(one_line(error))
    try:
        result = app(arguments or ["--help"])
    except Stopped as stopped:
        _say(f"longrope: stopped by {stopped}")
        return EXIT_CODE
    except KeyboardInterrupt:
        _say("longrope: interrupted")
        return _INTERRUPTED
    except CycloptsError as error:
        return _fail(usage_error(error, _verbs_with))
    except (LongRopeError, OSError, MemoryError) as error:
        verb = next(iter(app.parse_commands(arguments)[0]))
        return _fail(in_options(one_line(error), options_by_name(options_of(verb))))
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for --help
            said = one_line(error)
            return _fail(f"out of memory: try a shorter length, another --dtype or another --device ({said})")
        return _unexpected(error, arguments)
    return result if isinstance(result, int) else 0


def options_of(verb: str) -> ArgumentCollection:
    """The options of a verb; a whole configuration is one of them too, named `*`."""
    return app[verb].assemble_argument_collection(default_parameter=DEFAULTS)


def _verbs_with(option: str) -> list[str]:
    """The verbs that have an option of this name."""
    return [verb for verb in VERBS if any(option in argument.names for argument in options_of(verb))]


def _unexpected(error: Exception, arguments: list[str]) -> int:
    """Report a fault of the program itself; its traceback with --verbose."""
    if {"-v", "--verbose"} & set(arguments):
        traceback.print_exception(error)
    _say(shortened(f"longrope: unexpected error: {one_line(error)}; --verbose shows where it happened"))
    return _UNEXPECTED


def _fail(message: str) -> int:
    _say(shortened(f"longrope: error: {' '.join(message.split())}"))
    return 2


def _say(message: str) -> None:
    """A line on standard error; of several processes that share a job, the first one alone says it."""
    if speaks():
        print(message, file=sys.stderr)


def main() -> None:
    sys.exit(run(sys.argv[1:]))
