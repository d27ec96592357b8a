"""Attention on a CPU: our `blocked` against PyTorch's fused kernel, forward and backward, side by side in one run.

    python benchmarks/attention.py                       # heads of SmolLM2-135M (9/3 of 64) at 4k and 16k, bfloat16
    python benchmarks/attention.py --dtype float32 --lengths 8k --heads 32 --key-heads 8 --head-dim 128

FLOP/s count the causal half of both products forward, and two and a half times that backward. The floor is the rate of
a matrix product of the same dtype, measured in the same run. Writes `benchmarks/results/attention.json`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from longrope.models.blocked_attention import blocked_attention
from longrope.provenance import record
from longrope.storage import write_json_atomic
from longrope.units import parse_lengths

RESULTS = Path(__file__).resolve().parent / "results/attention.json"
ROUNDS = 5


def seconds(*runs: Callable[[], object]) -> list[float]:
    """The least time of each of `runs`, taken in turns after one round that does not count."""
    times = [[_time(run) for run in runs] for _ in range(ROUNDS + 1)][1:]
    return [min(column) for column in zip(*times, strict=True)]


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(length: int, heads: int, key_heads: int, dim: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds and ratios of both kernels at one length."""
    q, k, v = (torch.randn(1, h, length, dim, dtype=dtype) for h in (heads, key_heads, key_heads))
    scale = dim**-0.5

    def fused(*inputs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*inputs, is_causal=True, scale=scale, enable_gqa=True)

    def blocked(*inputs: Tensor) -> Tensor:
        return blocked_attention(*inputs, scale)

    with torch.no_grad():
        forward = seconds(lambda: fused(q, k, v), lambda: blocked(q, k, v))
        error = float((blocked(q, k, v).double() - fused(q.double(), k.double(), v.double())).abs().max())
        error_fused = float((fused(q, k, v).double() - fused(q.double(), k.double(), v.double())).abs().max())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    outputs = [fused(*leaves), blocked(*leaves)]
    grad = torch.randn_like(outputs[0])
    backward = seconds(*(lambda out=out: torch.autograd.grad(out, leaves, grad, retain_graph=True) for out in outputs))
    flops = 2 * heads * dim * length**2
    return {
        "fused_forward_s": forward[0],
        "blocked_forward_s": forward[1],
        "forward_ratio": forward[0] / forward[1],
        "fused_backward_s": backward[0],
        "blocked_backward_s": backward[1],
        "backward_ratio": backward[0] / backward[1],
        "fused_forward_gflops": flops / forward[0] / 1e9,
        "blocked_forward_gflops": flops / forward[1] / 1e9,
        "fused_largest_error": error_fused,
        "blocked_largest_error": error,
    }


def product_gflops(dtype: torch.dtype) -> float:
    """The rate of a matrix product of `dtype`: 4,096 × 576 by 576 × 4,096."""
    a, b = torch.randn(4096, 576, dtype=dtype), torch.randn(576, 4096, dtype=dtype)
    return 2 * 4096 * 4096 * 576 / seconds(lambda: a @ b)[0] / 1e9


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4k,16k")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    shape = (options.heads, options.key_heads, options.head_dim)
    result = {
        "dtype": options.dtype,
        "heads": shape,
        "threads": torch.get_num_threads(),
        "product_gflops": product_gflops(dtype),
        "lengths": {str(length): measure(length, *shape, dtype) for length in parse_lengths(options.lengths)},
        "provenance": record(),
    }
    for length, row in result["lengths"].items():
        print(
            f"{int(length):>9,} tokens: forward {row['fused_forward_s']:.2f} s fused, {row['blocked_forward_s']:.2f} s"
            f" blocked ({row['forward_ratio']:.2f} times as fast); backward {row['fused_backward_s']:.2f} and"
            f" {row['blocked_backward_s']:.2f} s ({row['backward_ratio']:.2f} times)"
        )
    write_json_atomic(options.output, result)


if __name__ == "__main__":
    main()
