"""Ends a long job in time: SIGTERM and SIGUSR1, as schedulers send them, and --time-limit. Exit code 75.

A stop is a `Stopped`, a KeyboardInterrupt with a reason: the job ends where Ctrl-C would end it, with a state that
--resume goes on from. A fine-tuning ends after its step instead, with a checkpoint; a second signal does not wait.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from longrope.callbacks import Stopped
from longrope.errors import LongRopeError
from longrope.quantities import format_duration

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not an error, try again
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class _State:
    """`wait`: the next stop is only noted in `reason`."""

    wait = False
    reason = ""
    limit = 0.0


_state = _State()


def unwind_on_interrupt() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again, where `longrope.__main__` made it end the process at once."""
    if getattr(signal.getsignal(signal.SIGINT), "__name__", "") == "_end_at_once":
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def stopping(time_limit: float | None) -> Iterator[None]:
    """Stop what runs inside on a signal, or `time_limit` seconds from now. For the main thread."""
    if time_limit is not None and not hasattr(signal, "setitimer"):
        raise LongRopeError("this system has no timers for a time limit", code="not-supported")
    _state.wait, _state.reason, _state.limit = False, "", time_limit or 0.0
    before = {number: signal.signal(number, _stop) for number in _SIGNALS}
    if time_limit is not None:
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, time_limit)
    try:
        yield
    finally:
        if time_limit is not None:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_after_step() -> bool:
    """True if the job was asked to stop. From the first call on, stops are noted instead of raised."""
    _state.wait = True
    return bool(_state.reason)


def stop_at_once() -> None:
    """From here on stops are raised again: now, where one was noted."""
    _state.wait = False
    if _state.reason:
        raise Stopped(_state.reason)


def _stop(number: int, _frame: FrameType | None) -> None:
    alarm = number == getattr(signal, "SIGALRM", None)
    reason = f"the time limit of {format_duration(_state.limit)}" if alarm else signal.Signals(number).name
    if _state.wait and not _state.reason:
        _state.reason = reason
    else:
        raise Stopped(reason)
