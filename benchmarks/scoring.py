"""Scoring and gradient against the plain forward of transformers, in one run: processor time, memory, and the losses.

    python benchmarks/scoring.py SmolLM2-135M-Instruct.gguf --length 4096      # on a CPU; some minutes
    python benchmarks/scoring.py owner/model --length 32768 --device cuda

The file of SmolLM2 comes from `scripts/smollm2.py`. Four runs over the same text, taken in turns, in turn first:

- forward, transformers: `model(ids).logits` and the cross-entropy of every next token;
- forward, longrope: `token_nll`, which the search's losses come from;
- gradient, transformers: the same loss under transformers' own activation checkpointing, and its gradient by the input;
- gradient, longrope: `loss_and_gradient` by the rescale factors, for each way to have layer inputs.

Time is that of the process (all its threads) on a CPU, and of CUDA events on a GPU, in the ratio of each round to
transformers' of the same round, of which the median counts. Memory is the peak above the model and the text, each in a
process of its own on a CPU (resident memory; glibc is told to give back what is freed). Random ids: time does not
depend on them. Writes `benchmarks/results/scoring.json` and `scoring.md`, or what `-o` names.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from longrope.models.apply import geometry_of, scaled
from longrope.models.config import LayerInputs, LoadOptions
from longrope.models.loading import load_model
from longrope.models.scoring import loss_and_gradient, token_nll
from longrope.provenance import record
from longrope.rope.scaling import RopeScaling, Window
from longrope.storage import write_json_atomic, write_text_atomic
from longrope.units import parse_length

RESULTS = Path(__file__).resolve().parent / "results"
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
FORWARD, GRADIENT = "forward, transformers", "gradient, transformers"
AGAINST = {
    "forward, longrope": FORWARD,
    "gradient, longrope, keep": GRADIENT,
    "gradient, longrope, recompute": GRADIENT,
    "gradient, longrope, offload": GRADIENT,
}
"""The runs of longrope, with that of transformers that each is compared with."""
Run = Callable[[], Any]


def plain_loss(model: PreTrainedModel, ids: Tensor, **more: Any) -> Tensor:
    """The loss of every next token (T − 1,) from the logits of all positions."""
    logits = model(**({"input_ids": ids} | more), use_cache=False).logits
    return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")


def plain_forward(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return plain_loss(model, ids)


def plain_gradient(model: PreTrainedModel, ids: Tensor) -> float:
    """By the embedded text: the least that transformers computes with weights that get no gradient."""
    model.train()  # no dropout in these models; transformers checkpoints in training alone
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    loss = plain_loss(model, ids, input_ids=None, inputs_embeds=embedded).sum()
    loss.backward()
    model.eval()
    return float(loss.detach())


def our_forward(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return token_nll(model, ids)[0]


def our_gradient(model: PreTrainedModel, ids: Tensor, how: LayerInputs) -> float:
    original = RopeScaling.original(geometry_of(model))
    window = Window(ids.shape[1], original.windows[0].factors)
    with scaled(model, original) as handle:
        return loss_and_gradient(handle, window, ids, layer_inputs=how)[0]


def runs_of(model: PreTrainedModel, ids: Tensor) -> dict[str, Run]:
    """Every run by name; the window of gradients is the original one, so that both sides have the same loss."""
    model.requires_grad_(False)
    model.activation_checkpointing_enable({"use_reentrant": False})
    runs: dict[str, Run] = {
        FORWARD: partial(plain_forward, model, ids),
        "forward, longrope": partial(our_forward, model, ids),
        GRADIENT: partial(plain_gradient, model, ids),
    }
    ways: tuple[LayerInputs, ...] = ("keep", "recompute", "offload")
    for how in ways:
        if how != "offload" or ids.device.type == "cuda":
            runs[f"gradient, longrope, {how}"] = partial(our_gradient, model, ids, how)
    return runs


def seconds(run: Run, device: torch.device) -> float:
    """Processor time on a CPU, time on the GPU there."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000
    begun = time.process_time()
    run()
    return time.process_time() - begun


def in_turns(runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """The seconds of every run and round, after a round that does not count; each round begins with another run."""
    names, found = list(runs), {name: [] for name in runs}
    for number in range(rounds + 1):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            took = seconds(runs[name], device)
            if number:
                found[name].append(took)
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return found


def compared(runs: dict[str, Run]) -> float | None:
    """The largest difference of a loss, in nats; None without the forwards."""
    if FORWARD not in runs:
        return None
    return float((runs["forward, longrope"]() - runs[FORWARD]()).abs().max())


def resident(name: str) -> int:
    """Bytes of resident memory now (VmRSS), or at their peak (VmHWM). Linux."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def peak(run: Run, device: torch.device) -> int:
    """The peak bytes of a run above what is there."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # the peak begins anew: that of loading does not count
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def prepared(options: argparse.Namespace) -> tuple[dict[str, Run], torch.device]:
    loading = LoadOptions(dtype=options.dtype, device=options.device)
    model = load_model(options.model, dtype=loading.dtype, device=loading.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, options.length), generator=generator)
    runs = runs_of(model, ids.to(model.device))
    return {name: run for name, run in runs.items() if name.startswith(options.part or "")}, model.device


def in_own_process(name: str) -> int:
    """The peak bytes of the run `name` of this command, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | GLIBC)
    return int(json.loads(ended.stdout)["peak"])


def table(result: dict[str, Any], name: str) -> str:
    """The results as Markdown; `name`: of their JSON."""
    difference = result["largest_difference"]
    lines = [
        f"# Scoring against the plain forward of transformers: {result['model']}, {result['length']:,} tokens",
        "",
        f"{result['device']}, {result['dtype']}, {result['threads']} thread(s), {result['rounds']} rounds."
        f"{'' if difference is None else f' The largest difference of a loss: {difference:.1e} nats.'} "
        f"`python benchmarks/scoring.py` with the arguments in {name}.",
        "",
        "| run | seconds | ratio to transformers | MB above the model |",
        "|---|---|---|---|",
    ]
    for what, run in result["runs"].items():
        ratio = f"{run['ratio']:.3f} ({run['least']:.3f} to {run['most']:.3f})" if "ratio" in run else ""
        lines.append(f"| {what} | {run['seconds']:.2f} | {ratio} | {run['peak_bytes'] / 1e6:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--length", type=parse_length, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=["forward", "gradient"], help="these runs alone")
    parser.add_argument("--only", help="the memory of this run, in this process")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "scoring.json")
    options = parser.parse_args()
    runs, device = prepared(options)
    if options.only:
        print(json.dumps({"peak": peak(runs[options.only], device)}))
        return
    difference = compared(runs)
    times = in_turns(runs, options.rounds, device)
    found: dict[str, dict[str, float]] = {}
    for name, took in times.items():
        found[name] = {"seconds": statistics.median(took)}
        found[name]["peak_bytes"] = peak(runs[name], device) if device.type == "cuda" else in_own_process(name)
        if name in AGAINST:
            ratios = [own / other for own, other in zip(took, times[AGAINST[name]], strict=True)]
            found[name] |= {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    result = {
        "model": Path(options.model).name,
        "length": options.length,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "largest_difference": difference,
        "runs": found,
        "times": times,
        "provenance": record(),
    }
    print(table(result, options.output.name))
    write_json_atomic(options.output, result)
    write_text_atomic(options.output.with_suffix(".md"), table(result, options.output.name))


if __name__ == "__main__":
    main()
