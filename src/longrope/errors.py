"""The one exception for what a user can cause or mend. Library code raises it; only the command line prints it."""

from __future__ import annotations


class LongRopeError(Exception):
    """One line: what was expected, what was found, what to do. The command line turns it into exit code 2."""


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, with its type where the message alone would not be understood."""
    text = " ".join(str(error).split())
    if isinstance(error, LongRopeError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
