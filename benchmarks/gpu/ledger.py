"""The file of one stage: measurements by name, written after each; those that are there are not repeated."""

from __future__ import annotations

import argparse
import gc
import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longrope.errors import LongRopeError, one_line
from longrope.provenance import record
from longrope.storage import json_ready, write_json_atomic

SCHEMA = "longrope.gpu/1"


class NotAvailableError(Exception):
    """This device cannot do what was to be measured; a finding, not a fault."""


class OutOfTimeError(Exception):
    """The stage's time ended inside a measurement."""


class Ledger:
    """The measurements of the stage `name` in `arguments.output`, for at most `seconds`.

    Raises LongRopeError where the file is of another device, of other versions, or of the other size.
    """

    def __init__(self, arguments: argparse.Namespace, name: str, seconds: float) -> None:
        self.device = torch.device(arguments.device)
        self.path: Path = arguments.output / f"{name}.json"
        self.until = time.monotonic() + seconds
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "stage": name,
            "device": device_name(self.device),
            "small": arguments.small,
            **record(),
            "rows": {},
            "not_reached": [],
        }
        if self.path.is_file():
            earlier = json.loads(self.path.read_text("utf-8"))
            for key in ("schema", "device", "small"):
                if earlier[key] != self.content[key]:
                    raise LongRopeError(
                        f"{self.path} has {key} {earlier[key]!r}, not {self.content[key]!r}", hint="give another -o"
                    )
            self.content["rows"] = {name: row for name, row in earlier["rows"].items() if "error" not in row}

    def measure(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The row of `name`: an earlier one, or `work()` with its seconds and peak memory. None where time is over.

        A row says `not_available` where the device cannot do it, `out_of_memory` where its memory ends, `error` where
        something else went wrong: that is measured again next time.
        """
        rows = self.content["rows"]
        if name in rows:
            return dict(rows[name])
        if time.monotonic() > self.until:
            self.content["not_reached"].append(name)
            self._write()
            return None
        free(self.device)
        began = time.perf_counter()
        try:
            row = work()
            synchronize(self.device)
        except OutOfTimeError:
            self.content["not_reached"].append(name)
            self._write()
            return None
        except NotAvailableError as reason:
            row = {"not_available": str(reason)}
        except torch.OutOfMemoryError as error:
            row = {"out_of_memory": one_line(error)}
        except Exception as error:  # the other measurements go on, and the program ends with 1
            row = {"error": one_line(error)}
        row |= {"seconds": time.perf_counter() - began, "peak_bytes": peak_bytes(self.device)}
        rows[name] = json_ready(row)
        self._write()
        said = next((f"{key}: {row[key]}" for key in ("error", "out_of_memory", "not_available") if key in row), "")
        print(f"   {name}: {row['seconds']:.1f} s {said}", flush=True)
        return dict(rows[name])

    def _write(self) -> None:
        write_json_atomic(self.path, self.content)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what the last measurement has left, and begin counting the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The highest memory of a GPU since `free`; of a CPU that of the process so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def timed(work: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Seconds of `work`, the mean of `repeats` after one that is not counted."""
    work()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


def require_number(value: float) -> float:
    """`value`. Raises LongRopeError where it is NaN or infinite."""
    if not math.isfinite(value):
        raise LongRopeError(f"a measurement came to {value}", code="not-finite")
    return value
