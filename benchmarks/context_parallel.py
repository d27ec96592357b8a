"""One text over several processes: time and memory against one process, measured on a CPU and modelled for GPUs.

    python benchmarks/context_parallel.py measure --out benchmarks/results     # 3 minutes on two cores
    python benchmarks/context_parallel.py model --out benchmarks/results --figure docs/images/context-parallel.png

`measure` scores a text of a small random Llama and takes its gradient, in 1, 2 and 4 processes of one thread each, one
after the other. Memory is the highest resident memory above that before the text; Linux, and glibc told to give back
what is freed. Time is the processor time of the busiest process: wall-clock time says little where there are fewer
cores than processes. `model` needs no GPU: it is `longrope plan` for 1 to 1,024 of them. Not a test: nothing depends on
the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import AutoModelForCausalLM, LlamaConfig

from longrope.costs.context_parallel import shared_seconds
from longrope.costs.devices import USABLE, Devices
from longrope.models.apply import geometry_of, scaled
from longrope.models.context_parallel import shared_rows
from longrope.models.devices import weightless_model
from longrope.models.model_dims import ModelShape, shape_of
from longrope.models.peak_bytes import shared_bytes
from longrope.models.scoring import loss_and_gradient, token_nll
from longrope.models.shared_texts import Share
from longrope.rope.closed_forms import yarn
from longrope.rope.scaling import RopeScaling, Window

MIB = 2**20
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
SMALL: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
}
PROCESSES = (1, 2, 4)
LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
MODELS: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
LENGTHS = {"128k": 2**17, "512k": 2**19, "2M": 2**21}
WORKS = {"scoring": "keep", "gradient": "keep", "gradient, recompute": "recompute"}
"""Work by name, with its `layer_inputs`: all on the GPU, or those of some layers made again."""
COUNTS = tuple(2**power for power in range(11))
GPUS = {"8B": "h100", "70B": "b200"}


# Measured.


def resident() -> int:
    """Bytes of resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def work(processes: int, length: int, out: Path) -> None:
    """One of `processes`: scores the text and takes its gradient, and writes what it took to `out`.RANK."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval()
    ids = torch.randint(0, SMALL["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))
    geometry = geometry_of(model)
    window = Window(length, tuple(yarn(geometry, length).tolist()))
    rank, found = 0, {}
    with scaled(model, RopeScaling.original(geometry)) as handle, handle.using(window):
        score: Callable[[torch.Tensor], Any] = lambda text: token_nll(model, text)  # noqa: E731
        gradient: Callable[[torch.Tensor], Any] = lambda text: loss_and_gradient(handle, window, text, divisor=length)  # noqa: E731
        if processes > 1:
            rank = int(PartialState(cpu=True).process_index)
            share = Share(handle, shared_rows(model, processes, packed=False))
            score = lambda text: share.scores(window, text, 0, top=False)[0]  # noqa: E731
            gradient = lambda text: share.loss_and_gradient(window, text, 0, length)  # noqa: E731
        for name, job in (("scoring", score), ("gradient", gradient)):
            with torch.set_grad_enabled(name == "gradient"):
                job(ids[:, :64])  # what is loaded once
                before, began, wall = resident(), time.process_time(), time.perf_counter()
                result = job(ids)
            found[name] = {
                "loss": float(result.double().mean()) if name == "scoring" else result[0],
                "gradient": None if name == "scoring" else result[1].tolist(),
                "processor_s": time.process_time() - began,
                "wall_s": time.perf_counter() - wall,
                "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
            }
    out.with_suffix(f".{rank}").write_text(json.dumps(found), "utf-8")
    if processes > 1:
        dist.destroy_process_group()


def measure(length: int, out: Path) -> None:
    """`context_parallel.json` and `.md` in `out`."""
    found: dict[int, list[dict[str, Any]]] = {}
    with TemporaryDirectory() as folder:
        for processes in PROCESSES:
            launch = [sys.executable]
            if processes > 1:
                launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            given = ["work", "--processes", processes, "--length", length, "--out", Path(folder) / f"{processes}.json"]
            subprocess.run(
                [*launch, __file__, *map(str, given)], env=os.environ | GLIBC, check=True, capture_output=True
            )
            files = sorted(Path(folder).glob(f"{processes}.[0-9]*"))
            found[processes] = [json.loads(file.read_text("utf-8")) for file in files]
    rows = []
    for what in ("scoring", "gradient"):
        one = found[1][0][what]
        for processes, every in found.items():
            row = {key: max(each[what][key] for each in every) for key in ("processor_s", "wall_s", "memory")}
            error = abs(every[0][what]["loss"] - one["loss"]) / one["loss"]
            if what == "gradient":
                mine, theirs = (torch.tensor(each["gradient"]) for each in (every[0][what], one))
                row["gradient_error"] = float((mine - theirs).norm() / theirs.norm())
            ratios = {f"{key}_ratio": row[key] / one[key] for key in ("processor_s", "memory")}
            rows.append({"work": what, "processes": processes, **row, **ratios, "loss_error": error})
    layers = SMALL["num_hidden_layers"]
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__}
    document = {"machine": machine, "length": length, "model": SMALL, "rows": rows}
    (out / "context_parallel.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    lines = [
        f"One text of {length:,} tokens, a random Llama of {layers} layers in float32, gloo on a CPU of "
        f"{os.cpu_count()} cores, one thread a process (`python benchmarks/context_parallel.py measure`).",
        "",
        "| work | processes | processor time of the busiest | to one | memory beside the weights | to one | error |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['work']} | {row['processes']} | {row['processor_s']:.1f} s | {row['processor_s_ratio']:.2f} | "
            f"{row['memory'] / MIB:.0f} MiB | {row['memory_ratio']:.2f} | "
            f"{row.get('gradient_error', row['loss_error']):.0e} |"
            for row in rows
        ),
        "",
        "Four processes on two cores take the wall-clock time of two. The error is that of the mean loss, of a "
        "gradient that of its D + 1 numbers, against one process.",
    ]
    (out / "context_parallel.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


# Modelled.


def shapes() -> dict[str, ModelShape]:
    return {name: shape_of(name, weightless_model(LlamaConfig(**LLAMA3, **sizes))) for name, sizes in MODELS.items()}


def modelled() -> list[dict[str, Any]]:
    """A row for every model, length, work, network and number of GPUs that share a text."""
    rows = []
    for model, shape in shapes().items():
        for name, length in LENGTHS.items():
            for what, kept in WORKS.items():
                for network in ("infiniband", "ethernet"):
                    for count in COUNTS:
                        devices = Devices(gpu=GPUS[model], count=count, network=network)
                        how: dict[str, Any] = {"gradient": what != "scoring", "processes": count, "layer_inputs": kept}
                        time_ = shared_seconds(shape, length, devices, **how)
                        size = shared_bytes(shape, length, 2, **how)
                        rows.append(
                            {
                                "model": model,
                                "gpu": GPUS[model],
                                "length": name,
                                "work": what,
                                "network": network,
                                "gpus": count,
                                "seconds": time_.total,
                                "exchange_share": time_.exchange / time_.total,
                                "efficiency": time_.compute / time_.total,
                                "gigabytes": sum(size.values()) / 1e9,
                                "fits": devices.holds(sum(size.values())),
                            }
                        )
    return rows


def limit(rows: list[dict[str, Any]]) -> int:
    """The most GPUs of which at least half of the time is computing."""
    return max(row["gpus"] for row in rows if row["efficiency"] >= 0.5)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """For every model, length and work the fewest GPUs that share a text so that it fits, and where sharing stops: the
    most GPUs of which at least half of the time is computing."""
    lines = [
        "| model, GPU | tokens | work | GPUs | GB on each | one text | of it exchange | stops: InfiniBand | Ethernet |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, gpu in GPUS.items():
        for name in LENGTHS:
            for what in WORKS:
                same = [row for row in rows if (row["model"], row["length"], row["work"]) == (model, name, what)]
                fast, slow = ([row for row in same if row["network"] == net] for net in ("infiniband", "ethernet"))
                first = next((row for row in fast if row["fits"]), None)
                cells = ["none", "", "", ""]
                if first is not None:
                    share = f"{first['exchange_share']:.1%}"
                    cells = [str(first["gpus"]), f"{first['gigabytes']:.0f}", f"{first['seconds']:.3g} s", share]
                stops = [f"{limit(fast):,}", f"{limit(slow):,}"]
                lines.append(f"| {' | '.join([f'{model}, {gpu}', name, what, *cells, *stops])} |")
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of one gradient and memory of a GPU against the GPUs that share the text, of the 8B model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained")
    colours = dict(zip(LENGTHS, ("#009E73", "#0072B2", "#D55E00"), strict=True))  # Okabe and Ito's
    for name, colour in colours.items():
        for network, line in (("infiniband", "-"), ("ethernet", "--")):
            same = [
                row
                for row in rows
                if (row["model"], row["length"], row["work"], row["network"]) == ("8B", name, "gradient", network)
            ]
            left.plot(COUNTS, [row["seconds"] for row in same], line, color=colour, linewidth=1.6)
        left.plot(COUNTS, [same[0]["seconds"] / count for count in COUNTS], ":", color=colour, linewidth=0.9)
        for what, line in (("gradient", "-"), ("gradient, recompute", "--")):
            own = [row for row in rows if (row["model"], row["length"], row["work"]) == ("8B", name, what)]
            sizes = [row["gigabytes"] for row in own if row["network"] == "infiniband"]
            right.plot(COUNTS, sizes, line, color=colour, label=name if line == "-" else None, linewidth=1.6)
    right.plot([], [], "--", color="#555555", label="inputs of layers made again", linewidth=1.2)
    for label, line in (
        ("InfiniBand, 400 Gbit/s a GPU", "-"),
        ("Ethernet, 100 Gbit/s a machine", "--"),
        ("ideal", ":"),
    ):
        left.plot([], [], line, color="#555555", label=label, linewidth=1.2)
    right.axhline(USABLE * 80, color="#555555", linewidth=0.9, linestyle="-.", label="90 % of 80 GB")
    right.axhline(16.06, color="#999999", linewidth=0.9, linestyle=":", label="weights")
    for axes, title, unit in (
        (left, "time of one gradient", "seconds"),
        (right, "memory of each GPU, gradient", "GB"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="GPUs that share the text", ylabel=unit)
        axes.set_xticks(COUNTS[::2], [f"{count:,}" for count in COUNTS[::2]])
        axes.set_title(title, fontsize=9)
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
    right.set_yticks([20, 50, 100, 200, 500], ["20", "50", "100", "200", "500"])
    figure.suptitle("Llama-3-8B on H100, calculated, not run", fontsize=10)
    figure.savefig(path, dpi=130)


def model(out: Path, figure: Path | None) -> None:
    """`context_parallel_model.json` and `.md` in `out`, and the figure."""
    rows = modelled()
    listed = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    (out / "context_parallel_model.json").write_text(f'{{\n "rows": [\n{listed}\n ]\n}}\n', "utf-8")
    lines = table(rows)
    (out / "context_parallel_model.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))
    if figure is not None:
        draw(rows, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("measure", "work", "model"):
        verb = verbs.add_parser(name)
        verb.add_argument("--out", type=Path, required=True)
        if name == "model":
            verb.add_argument("--figure", type=Path)
            continue
        verb.add_argument("--length", type=int, default=8192)
        if name == "work":
            verb.add_argument("--processes", type=int, required=True)
    given = parser.parse_args()
    if given.verb == "measure":
        measure(given.length, given.out)
    elif given.verb == "work":
        work(given.processes, given.length, given.out)
    else:
        model(given.out, given.figure)


if __name__ == "__main__":
    main()
