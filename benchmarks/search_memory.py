"""How much memory one evaluation takes, and how much one gradient in the factors: the peaks of two processes.

    python benchmarks/search_memory.py                     # the embedded model, 4,096 tokens; a minute on one core

Each measures the resident memory after the model and its text are there, then one loss, or one loss and gradient, and
the highest resident memory until then. Linux. Not a test: nothing depends on the numbers.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

from longrope.models.install import install
from longrope.pipeline.options import SearchOptions
from longrope.pipeline.subject import ModelOptions, open_model, sources_or_books
from longrope.pipeline.texts import objectives_over, prepare_texts
from longrope.rope.factors import yarn
from longrope.rope.scaling import RopeScaling, Window

MIB = 2**20


def resident() -> int:
    """Bytes of resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(what: str, model: str, length: int, dtype: str) -> None:
    subject = open_model(model, ModelOptions(dtype=dtype))
    options = SearchOptions(method="longrope", samples=1)
    texts = prepare_texts(subject, sources_or_books(subject.name, [], "search"), length, options)
    installed = install(subject.model, RopeScaling.original(subject.geometry))
    objective = objectives_over(installed, texts)["search", length]
    window = Window(length, tuple(yarn(subject.geometry, length).tolist()))
    before = resident()
    if what == "scoring":
        objective.loss(window)
    else:
        objective.loss_and_gradient(window)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{what}: {before / MIB:.0f} MiB before, {peak / MIB:.0f} MiB at its peak, {(peak - before) / MIB:.0f} more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", choices=["scoring", "gradient"], help="this one, in this process")
    args = parser.parse_args()
    if args.only:
        measure(args.only, args.model, args.length, args.dtype)
        return
    for what in ("scoring", "gradient"):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", what], check=True)


if __name__ == "__main__":
    main()
