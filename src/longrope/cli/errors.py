"""One line for each error: usage errors of cyclopts, and the library's with their arguments turned into options."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence

from cyclopts import Argument, CycloptsError, MissingArgumentError, UnknownOptionError, UnusedCliTokensError

_LINES = 3
_COMMAND = " python -c "
SYNONYMS = (
    ("output_dir", "output"),
    ("model", "checkpoint", "folder"),
    ("data", "search_data"),
    ("eval_data", "evaluation_data"),
    ("target", "to"),
)
"""Arguments of library functions and parameters of verbs that mean the same."""


def usage_error(error: CycloptsError, verbs_with: Callable[[str], Sequence[str]]) -> str:
    """The fault in the options themselves, in one line. `verbs_with`: the verbs that have an option."""
    error.verbose = False
    if isinstance(error, UnknownOptionError):
        option, verb = (error.token.keyword or error.token.value).partition("=")[0], " ".join(error.command_chain or ())
        if others := verbs_with(option):  # a close name of another meaning would mislead
            return f"{verb} has no {option}; {' and '.join(others)} {'has' if len(others) == 1 else 'have'} it"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        if error.argument.tokens or error.keyword:
            return f"expected a value after {error.keyword or error.argument.name}"
        verb = " ".join(error.command_chain or ())
        close = re.search(r"Did you mean .*\?", " ".join(str(error).split()))  # cyclopts has seen a name close to it
        advice = f"d{close[0][1:]}" if close else f"see longrope {verb} --help"
        return f"expected {error.argument.name}, found none: {advice}"
    if isinstance(error, UnusedCliTokensError):
        return f"expected nothing more, found {' '.join(error.unused_tokens or ())}"
    return re.sub(r"(?<!\.)\.$", "", " ".join(str(error).split()))


def shortened(message: str) -> str:
    """`message` in at most three lines of the terminal, or of 80 columns: words in its middle give way to `…`.

    The beginning says what is wrong, the end what to do. A command at the end is whole, so that it can be run.
    """
    words, command, code = message.partition(_COMMAND)
    if command:
        return f"{shortened(words)}{command}{code}"
    room = _LINES * shutil.get_terminal_size().columns
    if len(message) <= room:
        return message
    tail = message[-room // 2 :].partition(" ")[2]
    head = message[: room - len(tail) - len(" … ")].rpartition(" ")[0]
    return f"{head} … {tail}"


def options_by_name(arguments: Iterable[Argument]) -> dict[str, Argument]:
    """The options of a verb by the argument of the library that each of them stands for."""
    found = {argument.field_info.name: argument for argument in arguments if argument.names != ("*",)}
    for names in SYNONYMS:
        known = next((found[name] for name in names if name in found), None)
        if known is not None:
            found = dict.fromkeys(names, known) | found
    return found


def in_options(text: str, options: dict[str, Argument]) -> str:
    """`text` of the library with its arguments in backticks as options: `resume=True` as --resume, `output_dir` as -o.

    Backticks around anything else go away, and text without them is not touched.
    """

    def option(match: re.Match[str]) -> str:
        name, _, value = match[1].partition("=")
        known = next((options[part] for part in reversed(name.split(".")) if part in options), None)
        if known is None:
            return match[1]
        if value in ("True", "False") and known.parameter.choices:  # a switch
            return f"{known.name} {'on' if value == 'True' else 'off'}"
        if value == "False":
            return known.negatives[0] if known.negatives else f"no {known.name}"
        return f"{known.name} {value.strip(chr(34) + chr(39))}" if value and value != "True" else known.name

    return re.sub(r"`([^`]+)`", option, text)
