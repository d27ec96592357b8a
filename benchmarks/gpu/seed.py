"""Stage d: the seed's example (`benchmarks/seed_example.py`) at 128k, 512k and 2M tokens, a process for each."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ledger import Ledger, OutOfTimeError

PROGRAM = Path(__file__).parents[1] / "seed_example.py"
LENGTHS, SMALL_LENGTHS = ("128k", "512k", "2M"), ("1k", "2k")


def run(arguments: argparse.Namespace, seconds: float) -> None:
    ledger = Ledger(arguments, "seed", seconds)
    dtype = "float32" if arguments.small else "bfloat16"
    lengths = SMALL_LENGTHS if arguments.small else LENGTHS
    plan = [("forward", length, 1) for length in lengths]
    # The seed's own batch of two where it is quick, and a whole extension, which takes minutes on a CPU.
    plan += [("forward", length, 2) for length in lengths[:2]]
    plan += [] if arguments.small else [("extend", "32k", 1)]
    for what, length, batch in plan:

        def work(what: str = what, length: str = length, batch: int = batch) -> dict[str, Any]:
            command = [sys.executable, str(PROGRAM), "--measure", what, "--lengths", length, "--batch", str(batch)]
            command += ["--device", arguments.device, "--dtype", dtype]
            left = max(ledger.until - time.monotonic(), 10.0)
            try:
                ran = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
            except subprocess.TimeoutExpired as error:
                raise OutOfTimeError from error
            if ran.returncode:
                fault = ran.stderr.strip().splitlines()[-1]
                raise (torch.OutOfMemoryError if "OutOfMemoryError" in fault else RuntimeError)(fault)
            row: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
            return {"measured_seconds": row.pop("seconds"), "measured_peak_bytes": row.pop("peak_bytes")} | row

        ledger.measure(f"{what} of {length}, batch {batch}", work)
