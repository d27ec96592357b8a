"""Time of `cos_sin` beside the plain float32 computation that every model has, on this machine's CPU.

Not a test: it prints a table. Run it with `python benchmarks/angles.py`; one thread, so that the ratio is of the work.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from longrope.rope.angles import cos_sin
from longrope.rope.closed_forms import ntk_aware
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window

GEOMETRY = RopeGeometry(rotary_dim=128, base=10000.0, original_length=4096)  # D = 64 pairs
LENGTHS = (2048, 32768, 131072)
SECONDS = 4.0  # per length, for both


def plain(positions: Tensor, inv_freq_D: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines as transformers computes them: one float32 product, (T,) -> (T, D)."""
    angle = positions.float()[:, None] * inv_freq_D
    return angle.cos(), angle.sin()


def seconds(function: Callable[[], object]) -> float:
    """CPU time of one call; unlike wall time it does not count what other processes take."""
    start = time.thread_time()
    function()
    return time.thread_time() - start


def compare(length: int) -> tuple[float, float]:
    """Median seconds of the plain computation and of ours, in rounds of ten calls so that both meet one machine."""
    positions = torch.arange(length)
    factors = ntk_aware(GEOMETRY, 32 * GEOMETRY.original_length)
    window = Window(max_length=length, factors=tuple(factors.tolist()))
    inv_freq = torch.from_numpy(GEOMETRY.inv_freq / factors).float()
    methods = (lambda: plain(positions, inv_freq), lambda: cos_sin(GEOMETRY, window, positions))
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[0]) < 5:
        for kept, method in zip(times, methods, strict=True):
            kept += [seconds(method) for _ in range(10)][2:]  # the first two find the other's data in the caches
    ours, theirs = (statistics.median(kept) for kept in reversed(times))
    return theirs, ours


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"{'tokens':>8} {'plain ms':>10} {'cos_sin ms':>10} {'ratio':>6}   D = {GEOMETRY.pairs}, one thread")
    for length in LENGTHS:
        theirs, ours = compare(length)
        print(f"{length:8} {1e3 * theirs:10.2f} {1e3 * ours:10.2f} {ours / theirs:6.2f}")


if __name__ == "__main__":
    main()
