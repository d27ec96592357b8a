"""`LongRopeError`: a fault that a user can cause or mend. The library raises it; only the command line prints it."""

from __future__ import annotations


class LongRopeError(Exception):
    """A fault in one line: what was expected and found (`message`), then what to do about it (`hint`).

    `code` is a short name of the fault for programs and tests; it stays when the wording changes.

    Messages and hints name Python arguments in backticks: `output_dir`, `resume=True`, `max_factor`. The command line
    prints their options instead (-o, --resume, --max-factor).
    """

    def __init__(self, message: str = "", *, code: str = "invalid-input", hint: str = "") -> None:
        super().__init__(message)
        self.code, self.hint = code, hint

    @property
    def message(self) -> str:
        """The fault without the hint."""
        return str(self.args[0]) if self.args else ""

    def within(self, where: str) -> LongRopeError:
        """The same error with its place in front: `where: message`."""
        return LongRopeError(f"{where}: {self.message}", code=self.code, hint=self.hint)

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


_LONGEST = 160
"""Letters of another library's message that are quoted."""


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, with its type in front unless it is a LongRopeError.

    A long message of another library is cut: after its first sentence where that is short enough, else between words.
    """
    text = " ".join(str(error).split())
    if isinstance(error, LongRopeError) and text:
        return text
    text = quoted(text)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def quoted(text: str) -> str:
    """The message of another library, at most about 160 letters of it."""
    if len(text) <= _LONGEST:
        return text
    sentence = text[: text.find(". ") + 1]
    if 20 <= len(sentence) <= _LONGEST:
        return sentence.rstrip(".") + " …"
    return text[:_LONGEST].rpartition(" ")[0] + " …"
