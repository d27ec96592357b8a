"""The devices of this machine: one that a user names, or one line why nothing can be computed on it."""

from __future__ import annotations

import torch

from longrope.errors import LongRopeError, one_line


def usable_device(name: str) -> torch.device:
    """The device `name`. Raises LongRopeError (`invalid-setting`) where nothing can be computed on it here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, AttributeError, ValueError) as error:  # by kind of device
        raise LongRopeError(
            f"the device {name!r} cannot be used here: {one_line(error)}",
            code="invalid-setting",
            hint=f"there are {', '.join(['cpu', *(f'cuda:{gpu}' for gpu in range(torch.cuda.device_count()))])}",
        ) from error
    return device
