"""Measure time in interleaved rounds, and the peak of the memory.

Variants take turns, in an order that rotates in every round, so that a changing clock rate or other load affects all of them. The
medians are compared; the 20 % and 80 % quantiles show their uncertainty. On a GPU, a round replays a CUDA graph with as many
calls as take a few milliseconds, so that the time of Python code is not included. The L2 cache is not flushed between calls. A
call that cannot be captured is timed by events. Memory is measured in a separate call that is not timed.
"""

import ctypes
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Variant = Callable[[], object]
PAGE = 4096
GRAPH_MS = 2.0  # a graph has as many calls as take about this long, ...
MOST_CALLS = 64  # ... but at most this many


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    median: float
    q20: float
    q80: float
    rounds: int
    timed: str  # "graph", "events" or "clock"
    call: float  # one call from Python, including the time of Python code and kernel launches


@dataclass(frozen=True)
class Repeated:
    """What a round runs, and how many calls of the variant it makes."""

    run: Variant
    calls: int
    timed: str


def elapsed_ms(run: Variant, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def captured(variant: Variant, call_ms: float, pool: tuple[int, int]) -> Repeated:
    """Capture several calls as a CUDA graph, or return the call itself if it cannot be captured.

    The graphs share a memory pool, so only one may run at a time.
    """
    calls = min(MOST_CALLS, max(1, math.ceil(GRAPH_MS / call_ms)))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        variant()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            for _ in range(calls):
                variant()
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"not captured, timed by events: {str(error).splitlines()[0]}")
        return Repeated(variant, 1, "events")
    return Repeated(graph.replay, calls, "graph")


def median(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()


def interleave(
    variants: dict[str, Variant],
    device: str,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    uncaptured: tuple[str, ...] = (),
) -> dict[str, Timing]:
    """Time all variants in turn for about `seconds` and at least `min_rounds` rounds, after calls that are not counted."""
    names = list(variants)
    for name in names:
        elapsed_ms(variants[name], device)
    if device == "cpu":
        called = {}
        repeated = {name: Repeated(variants[name], 1, "clock") for name in names}
    else:
        called = {name: median([elapsed_ms(variants[name], device) for _ in range(5)]) for name in names}
        pool = torch.cuda.graph_pool_handle()
        repeated = {
            name: Repeated(variants[name], 1, "events")
            if name in uncaptured
            else captured(variants[name], called[name], pool)
            for name in names
        }
        for name in names:
            elapsed_ms(repeated[name].run, device)
    taken: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (time.perf_counter() < end and rounds < max_rounds):
        turn = rounds % len(names)
        for name in names[turn:] + names[:turn]:
            taken[name].append(elapsed_ms(repeated[name].run, device) / repeated[name].calls)
        rounds += 1
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    timings = {}
    for name in names:
        q20, middle, q80 = torch.tensor(taken[name], dtype=torch.float64).quantile(quantiles).tolist()
        timings[name] = Timing(middle, q20, q80, rounds, repeated[name].timed, called.get(name, middle))
    return timings


def product_rate(dtype: torch.dtype, device: str, size: int = 8192) -> float:
    """Return the FLOP per millisecond of a large square matrix product, which reads and writes little per operation."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 / median([elapsed_ms(lambda: a @ b, device) for _ in range(10)])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def peak_extra_bytes(variant: Variant, device: str) -> int:
    """Return the peak of the memory during one call, minus the memory in use before it.

    On a CPU, a thread samples the resident memory, so memory that is in use for only a fraction of a millisecond can be missed,
    and the result is exact to about 1 MiB. On a GPU, PyTorch's allocator counts it.
    """
    variant()
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        variant()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise the call could use freed memory that is still resident
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
