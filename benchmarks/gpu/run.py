"""Everything that waits for a GPU, as one program of stages that write every number at once and can be resumed.

    python benchmarks/gpu/run.py --device cuda                # one H100: under 12 minutes; docs/gpu.md prepares it
    python benchmarks/gpu/run.py --device cuda --stages c,d         # these stages, or what is left of them
    python benchmarks/gpu/run.py --device cpu --small -o runs/gpu/small   # the same on tiny models, some minutes

Every stage is a process of its own with a time limit. `OUT/STAGE.json` holds its measurements, written after each of
them; the same command goes on with those that are missing or failed. It needs no network. The exit code is 1 where a
measurement failed, 3 where time ran out before one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError

STAGES = {
    "a": ("correctness", 100, "scoring, gradient, training, generation and export against the CPU's numbers"),
    "b": ("smollm2", 230, "SmolLM2-135M from 8k to 64k: searches, held-out perplexity, needles"),
    "c": ("llama_8b", 110, "scoring and gradient at 128k of a model of Llama-3-8B's shape"),
    "d": ("seed", 130, "the seed's example at 128k, 512k and 2M tokens"),
    "e": ("finetuning", 100, "fine-tuning beside the HF Trainer's defaults: tokens/s, longest window"),
}
"""Name, seconds and content of each stage, in the order of their worth. All together: 670 seconds."""
RESULTS = Path(__file__).parents[1] / "results" / "gpu"
GGUF = Path(__file__).parents[2] / "runs" / "gpu" / "SmolLM2-135M-Instruct.Q4_1.gguf"
_GRACE = 20  # seconds to finish a measurement in, and to start


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models and lengths: for a test of this program")
    parser.add_argument("--stages", default=",".join(STAGES), help="any of a,b,c,d,e")
    parser.add_argument("--model", default=str(GGUF), help="the SmolLM2 file of stage b; with --small it is tiny")
    parser.add_argument("--scale", type=float, default=1.0, help="all time limits times this")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=STAGES, help=argparse.SUPPRESS)  # one stage, in this process
    return parser


def main() -> int:
    arguments = options().parse_args()
    if arguments.only:
        name, seconds, _ = STAGES[arguments.only]
        try:
            import_module(name).run(arguments, seconds * arguments.scale)
        except LongRopeError as error:
            print(f"   error: {error}", flush=True)
            return 1
        return 0
    arguments.output.mkdir(parents=True, exist_ok=True)
    began, codes = time.monotonic(), []
    for stage in arguments.stages.split(","):
        name, seconds, about = STAGES[stage]
        print(f"{stage}. {about}", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--only", stage]
        try:
            ended = subprocess.run(command, timeout=seconds * arguments.scale + _GRACE, check=False).returncode
        except subprocess.TimeoutExpired:
            ended = 3
        codes.append(summary(arguments.output / f"{name}.json", ended))
    print(f"{time.monotonic() - began:.0f} s in all; results in {arguments.output}")
    return 1 if 1 in codes else max(codes, default=0)


def summary(path: Path, ended: int) -> int:
    """Print what a stage came to, from its file and the exit code of its process; returns 0, or 1 or 3 as `main`."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {"rows": {}, "not_reached": []}
    failed = [name for name, row in found["rows"].items() if "error" in row or row.get("agrees") is False]
    print(
        f"   {len(found['rows']) - len(failed)} measured, {len(failed)} failed, {len(found['not_reached'])} not reached"
    )
    for name in failed:
        print(f"   {name}: {found['rows'][name].get('error', 'does not agree')}")
    for name in found["not_reached"]:
        print(f"   {name}: no time left; the same command goes on")
    if failed or ended not in (0, 3):
        return 1
    return 3 if ended == 3 or found["not_reached"] else 0


if __name__ == "__main__":
    sys.exit(main())
