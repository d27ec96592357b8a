"""The model of the seed's example (d_model 512, 8 heads, 6 layers, window 4,096): its plan, time and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/seed_example.py                        # a CPU, up to 32k tokens: some minutes
    python benchmarks/seed_example.py --device cuda --dtype bfloat16 --batch 2 --lengths 128k,512k,2M --extend 32k

Forwards run under YaRN's factors for their length, which cost what searched ones do; `--extend` runs `extend_context`
itself, on the shipped books and with a small budget. Every measurement is a process of its own, so that its peak is its
own. Each call adds a run to `seed_example.json` in `--out` and writes `seed_example.md` from all of them. Not a test.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longrope import LongRoPEModel, RopeScaling, load_data
from longrope.data.books import shipped_books
from longrope.data.sources import read_all
from longrope.provenance import record
from longrope.rope.closed_forms import yarn
from longrope.search.config import SearchConfig
from longrope.standalone.sizes import ForwardCost, Sizes
from longrope.storage import write_json_atomic, write_text_atomic
from longrope.units import format_length, parse_length, parse_lengths

SIZES = Sizes(d_model=512, n_heads=8, num_layers=6, base_length=4096)
SEED_LENGTH, SEED_BATCH = 2048 * 1024, 2
BUDGET = SearchConfig(method="gradient", steps=2, samples=1)
RESULTS = Path(__file__).parent / "results"


def new_model(arguments: argparse.Namespace) -> LongRoPEModel:
    model = LongRoPEModel(SIZES.d_model, SIZES.n_heads, SIZES.num_layers, SIZES.base_length)
    return model.to(arguments.device, getattr(torch, arguments.dtype))


def timed(work: Callable[[], Any], device: str) -> dict[str, float]:
    """Wall and processor seconds of `work`, and the peak of the device's memory (a CPU: of the process) in bytes."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    times = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return times | {"peak_bytes": resident if device == "cpu" else torch.cuda.max_memory_allocated()}


def forward(arguments: argparse.Namespace, length: int) -> dict[str, Any]:
    """One forward of random embeddings."""
    model = new_model(arguments)
    if length > SIZES.base_length:
        model = model.with_scaling(RopeScaling.extended(SIZES.geometry, length, yarn(SIZES.geometry, length)))
    weight = model.lm_head.weight
    embeddings = torch.randn(arguments.batch, length, SIZES.d_model, device=weight.device, dtype=weight.dtype)
    plan = model.plan(length, arguments.batch)

    def run() -> None:
        output = model(embeddings)
        assert output.shape == embeddings.shape
        assert bool(output[:, -1].isfinite().all())

    return {
        "what": "forward",
        "length": length,
        "batch": arguments.batch,
        "flops": plan.flops,
        "planned_bytes": plan.peak_bytes(weight.element_size()),
    } | timed(run, arguments.device)


def extend(arguments: argparse.Namespace, length: int) -> dict[str, Any]:
    """`extend_context` of the untrained model: what the search costs, not what it is good for."""
    model = new_model(arguments)
    found: list[LongRoPEModel] = []
    with tempfile.TemporaryDirectory() as folder:
        text = "\n".join(document.text for document in read_all([f"book:{book.name}" for book in shipped_books()]))
        repeats = 1 + 4 * length // len(text)  # four texts of this length, whatever they say
        Path(folder, "books.txt").write_text("\n".join([text] * repeats), "utf-8")
        data = load_data(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is untrained
            measured = timed(lambda: found.append(model.extend_context(data, length, BUDGET)), arguments.device)
    provenance = found[0].scaling.provenance
    kept = {name: provenance[name] for name in ("evaluations", "token_passes", "options")}
    return {"what": "extend_context", "length": length, "batch": 1} | measured | kept


def in_own_process(arguments: argparse.Namespace, what: str, length: int) -> dict[str, Any]:
    options = {"device": arguments.device, "dtype": arguments.dtype, "batch": arguments.batch}
    command = [sys.executable, __file__, "--measure", what, "--lengths", str(length)]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    print(f"{what} {format_length(length)}: {row['seconds']:.1f} s, {row['peak_bytes'] / 1e9:.2f} GB", flush=True)
    return row


def hardware(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    threads = torch.get_num_threads()
    return f"{name or platform.processor()}, {threads} thread{'s' * (threads > 1)}"


def markdown(runs: list[dict[str, Any]]) -> str:
    """The plan of the example as the seed writes it, and every run as a table."""
    parts = ["# The seed's example: d_model 512, 8 heads, 6 layers, base length 4,096", ""]
    parts += ["What its forward at 2M tokens takes, from `model.plan(2048 * 1024, batch=2)`:", ""]
    parts += ["```", str(ForwardCost(SIZES, SEED_LENGTH, SEED_BATCH)), "```", ""]
    parts += [
        "On a CPU the peak is that of the whole process, with Python, torch and transformers, and GFLOP/s are of "
        "processor time: other work may have run on the machine.",
        "",
    ]
    for run in runs:
        versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("python", "torch", "transformers"))
        parts += [f"## {run['hardware']}, {run['dtype']}", "", f"`{run['command']}`; {versions}.", ""]
        parts += ["| | tokens | batch | seconds | processor s | peak GB | planned GB | GFLOP/s |"]
        parts += ["|---|---|---|---|---|---|---|---|"]
        for row in run["rows"]:
            planned = f"{row['planned_bytes'] / 1e9:.2f}" if "planned_bytes" in row else "–"
            busy = row["cpu_seconds" if run["device"] == "cpu" else "seconds"]
            rate = f"{row['flops'] / busy / 1e9:,.0f}" if "flops" in row else "–"
            parts.append(
                f"| {row['what']} | {format_length(row['length'])} | {row['batch']} | {row['seconds']:.1f} "
                f"| {row['cpu_seconds']:.1f} | {row['peak_bytes'] / 1e9:.2f} | {planned} | {rate} |"
            )
        searches = [row for row in run["rows"] if row["what"] == "extend_context"]
        parts += ["", *(_search_line(row) for row in searches)]
    if all(run["device"] == "cpu" for run in runs):
        parts += ["## GPU", "", "Not measured yet; the command is in `benchmarks/seed_example.py`."]
    return "\n".join(parts).rstrip() + "\n"


def _search_line(row: dict[str, Any]) -> str:
    options = row["options"]
    return (
        f"`extend_context`: method {options['method']}, {options['steps']} steps, {options['samples']} sample, "
        f"{row['evaluations']} evaluations, {row['token_passes']:,} token passes; the baselines come on top.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lengths", default="4k,8k,16k,32k", help="forwards to measure")
    parser.add_argument("--extend", default="8k", help="target length of extend_context")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", choices=["forward", "extend"], help="one measurement, as JSON: for this script")
    arguments = parser.parse_args()
    if arguments.measure:
        measure = {"forward": forward, "extend": extend}[arguments.measure]
        print(json.dumps(measure(arguments, parse_length(arguments.lengths))))
        return
    print(ForwardCost(SIZES, SEED_LENGTH, SEED_BATCH), flush=True)
    path = arguments.out / "seed_example.json"
    runs = json.loads(path.read_text("utf-8"))["runs"] if path.exists() else []
    rows = [in_own_process(arguments, "forward", length) for length in parse_lengths(arguments.lengths)]
    rows.append(in_own_process(arguments, "extend", parse_length(arguments.extend)))
    machine = {"hardware": hardware(arguments.device), "device": arguments.device, "dtype": arguments.dtype}
    runs.append(machine | {"rows": rows} | record())
    write_json_atomic(path, {"schema": "longrope.seed-example/1", "runs": runs})
    write_text_atomic(arguments.out / "seed_example.md", markdown(runs))


if __name__ == "__main__":
    main()
