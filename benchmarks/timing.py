"""How long and how much memory: interleaved rounds, and the peak above what was there before.

Variants take turns, in an order that rotates every round, so that a clock that drifts or a neighbour that wakes up
meets all of them alike; medians are compared, and the 20 % and 80 % quantiles say how much to believe them. On a GPU
each call is timed by events, after the L2 cache was overwritten. Memory is measured in a call of its own, never in a
timed one.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Variant = Callable[[], object]
PAGE = 4096
L2_BYTES = 256 << 20  # more than any L2


@dataclass(frozen=True)
class Timing:
    """Milliseconds."""

    median: float
    q20: float
    q80: float
    rounds: int


def call_ms(variant: Variant, device: str, flush: torch.Tensor | None) -> float:
    if device == "cpu":
        start = time.perf_counter()
        variant()
        return 1e3 * (time.perf_counter() - start)
    if flush is not None:
        flush.zero_()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    variant()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def interleave(
    variants: dict[str, Variant], device: str, seconds: float, min_rounds: int = 5, max_rounds: int = 200
) -> dict[str, Timing]:
    """Time all variants in turns for about `seconds`, at least `min_rounds` rounds; one round before is not counted."""
    flush = None if device == "cpu" else torch.empty(L2_BYTES, dtype=torch.uint8, device=device)
    names = list(variants)
    for name in names:
        call_ms(variants[name], device, flush)
    taken: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (time.perf_counter() < end and rounds < max_rounds):
        turn = rounds % len(names)
        for name in names[turn:] + names[:turn]:
            taken[name].append(call_ms(variants[name], device, flush))
        rounds += 1
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    timings = {}
    for name in names:
        q20, median, q80 = torch.tensor(taken[name], dtype=torch.float64).quantile(quantiles).tolist()
        timings[name] = Timing(median, q20, q80, rounds)
    return timings


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def peak_extra_bytes(variant: Variant, device: str) -> int:
    """The most memory that one call held beyond what was held before it.

    On a CPU the resident set is sampled by a thread, so what lives for a fraction of a millisecond can be
    missed: read it to the nearest MiB. On a GPU it is the allocator's own count.
    """
    variant()
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        variant()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator keeps for reuse would hide what the call needs
    before = peak = resident_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.0002):
            peak = max(peak, resident_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    variant()
    done.set()
    sampler.join()
    return peak - before
