"""Stage c: scoring and gradient at 131,072 tokens of a model of Llama-3-8B's shape, random weights in bfloat16.

How much of the card's own rate of bfloat16 they reach, which is measured first over matrices and over attention of
these sizes; the peak memory; and the kernels that take the time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from ledger import Ledger, NotAvailableError, free, require_number, synchronize, timed
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import longrope as lr
from longrope.costs.flops_bytes import Flops, forward_flops, gradient_flops
from longrope.data.samples import SampleOrigin, Samples
from longrope.models.model_dims import shape_of
from longrope.models.peak_bytes import scoring_bytes
from longrope.search.objective import PerplexityObjective

SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SMALL = {"hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 4, "num_key_value_heads": 2}
LAYERS, GRADIENT_LAYERS, VOCABULARY = 32, 8, 128_256
LENGTH, SMALL_LENGTH = 131_072, 4096
_ROOM = 0.85  # of the memory that is free, for weights and scoring


def build(layers: int, small: bool, device: torch.device) -> PreTrainedModel:
    config = LlamaConfig(
        **(SMALL if small else SHAPE),
        num_hidden_layers=layers,
        vocab_size=2048 if small else VOCABULARY,
        max_position_embeddings=256 if small else 8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def layers_that_fit(device: torch.device, length: int, small: bool) -> int:
    """As many layers as the free memory holds beside what scoring takes, at most 32."""
    if small or device.type != "cuda":
        return 2
    with torch.device("meta"):
        config = LlamaConfig(**SHAPE, num_hidden_layers=1, vocab_size=VOCABULARY)
        one = shape_of("one layer", AutoModelForCausalLM.from_config(config))
    room = _ROOM * torch.cuda.mem_get_info(device)[0] - sum(scoring_bytes(one, length, 2).values())
    return max(1, min(LAYERS, 1 + int(room // (2 * one.layer_parameters))))


def matrix_rate(device: torch.device, small: bool) -> dict[str, Any]:
    """FLOP/s of the MLP's product for 16,384 positions."""
    tokens, hidden, inner = (512, 64, 224) if small else (16_384, SHAPE["hidden_size"], SHAPE["intermediate_size"])
    left = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    right = torch.randn(inner, hidden, device=device, dtype=torch.bfloat16)
    seconds = timed(lambda: F.linear(left, right), device, repeats=20)
    return {"flops_per_second": require_number(2 * tokens * hidden * inner / seconds), "tokens": tokens}


def attention_rate(device: torch.device, small: bool) -> dict[str, Any]:
    """FLOP/s of causal attention, forward, over a quarter of the length; the causal half is counted."""
    length, heads, size = (1024, 4, 16) if small else (32_768, 32, 128)
    q, k, v = (torch.randn(1, heads, length, size, device=device, dtype=torch.bfloat16) for _ in range(3))
    seconds = timed(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), device, repeats=3)
    return {"flops_per_second": require_number(2 * length**2 * heads * size / seconds), "tokens": length}


def prepared(model: PreTrainedModel, what: str, length: int) -> Callable[[], float]:
    """The function that scores random tokens under YaRN's window for them, or takes their gradient too; it returns the
    loss."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
    scaling = lr.yarn(model, length)
    samples = Samples(ids, (SampleOrigin("random", "0" * 64, 0),), has_bos=False)
    objective = PerplexityObjective(lr.apply_scaling(model, scaling), samples)
    window = scaling.windows[-1]
    if what == "scoring":
        return lambda: objective.loss(window)
    return lambda: objective.loss_and_gradient(window)[0]


def shares(flops: Flops, seconds: float, rates: dict[str, float]) -> dict[str, Any]:
    """The time that matrices and attention would take at the measured rates, as shares of the time that it took."""
    ideal = {"matrices": flops.matrices / rates["matrices"], "attention": flops.attention / rates["attention"]}
    return {
        "flops": {"matrices": flops.matrices, "attention": flops.attention},
        "share_of_measured_rate": sum(ideal.values()) / seconds,
        "ideal_shares_of_time": {name: part / seconds for name, part in ideal.items()},
        "flops_per_second": flops.total / seconds,
    }


def kernels(work: Any, device: torch.device) -> dict[str, float]:
    """The eight kernels that take most of the time of `work`, as shares of all of it."""
    if device.type != "cuda":
        raise NotAvailableError("the kernels of a CPU say nothing of a GPU")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        synchronize(device)
    times = {event.key: float(event.self_device_time_total) for event in seen.key_averages()}
    whole = sum(times.values())
    ranked = sorted(times.items(), key=lambda item: -item[1])[:8]
    return {name[:120]: time / whole for name, time in ranked}


def run(arguments: argparse.Namespace, seconds: float) -> None:
    ledger = Ledger(arguments, "llama_8b", seconds)
    device, small = ledger.device, arguments.small
    length = SMALL_LENGTH if small else LENGTH
    measured = {
        "matrices": ledger.measure("rate of matrices", lambda: matrix_rate(device, small)),
        "attention": ledger.measure("rate of attention", lambda: attention_rate(device, small)),
    }
    rates = {name: row["flops_per_second"] for name, row in measured.items() if row and "flops_per_second" in row}
    if len(rates) < len(measured):
        return
    depths = {"scoring": layers_that_fit(device, length, small), "gradient": 2 if small else GRADIENT_LAYERS}
    for what, layers in depths.items():

        def work(what: str = what, layers: int = layers) -> dict[str, Any]:
            model = build(layers, small, device)
            prepared(model, what, length // 8)()  # the first call of every kernel is slower
            compute = prepared(model, what, length)
            free(device)
            began = time.perf_counter()
            loss = require_number(compute())
            synchronize(device)
            took = time.perf_counter() - began
            flops = {"scoring": forward_flops, "gradient": gradient_flops}[what](shape_of("random", model), length)
            row = {"layers": layers, "length": length, "measured_seconds": took, "tokens_per_second": length / took}
            weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
            return row | {"weights_bytes": weights, "loss": loss} | shares(flops, took, rates)

        ledger.measure(what, work)

        def profiled(what: str = what) -> dict[str, Any]:
            model = build(2, small, device)
            compute = prepared(model, what, length)
            return {"layers": 2, "length": length, "share_of_time": kernels(compute, device)}

        ledger.measure(f"kernels of {what}", profiled)
