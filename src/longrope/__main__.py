"""`longrope` and `python -m longrope`: the command line, where Ctrl-C ends the process at once until a verb begins.

The imports of the command line take some tenths of a second. An interrupt in them would end in a traceback, and there
is nothing to keep yet.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def _end_at_once(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"longrope: interrupted\n")
    os._exit(130)  # 128 + SIGINT, as shells count


def main() -> None:
    """Run the command line on the arguments of the process, and end it with the exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background
        signal.signal(signal.SIGINT, _end_at_once)
    from longrope.cli.main import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
