"""The one exception for what a user can cause or mend. Library code raises it; only the command line prints it."""

from __future__ import annotations


class LongRopeError(Exception):
    """What was expected and what was found (`message`), and what to do about it (`hint`), on one line together.

    `code` is a short name of the fault that does not change when its wording does: programs and tests compare it.

    Messages and hints speak of Python arguments in backticks: `output_dir`, `resume=True`, `max_factor`. The command
    line prints the option in their place (-o, --resume, --max-factor).
    """

    def __init__(self, message: str = "", *, code: str = "invalid-input", hint: str = "") -> None:
        super().__init__(message)
        self.code, self.hint = code, hint

    @property
    def message(self) -> str:
        """The fault without the hint."""
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, with its type where the message alone would not be understood."""
    text = " ".join(str(error).split())
    if isinstance(error, LongRopeError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
