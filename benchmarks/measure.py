"""Checks the variants of an op and then times them. run.py and the demo use this module.

The results of every variant are first compared with PyTorch in float64. If a result of negmine differs, nothing is timed. Any
other variant whose result differs, or that the device cannot run, is left out with a message. The floors are timed together with
the variants: the matrix products that every method needs, and a copy of the keys; on a GPU also the time of these products at the
rate of a large product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from benchmarks import libraries
from benchmarks.cases import Inputs
from benchmarks.peers import OPS, PLAIN_TOLERANCE, TOLERANCE, Answer, disagreement, for_truth, in_float32
from benchmarks.timing import Timing, interleave, peak_extra_bytes, product_rate

Variants = dict[str, Callable[[Inputs], Answer]]
OURS, EAGER, EAGER_FP32 = "negmine", "eager", "eager fp32"
PLAIN = (EAGER, EAGER_FP32, "torch.compile")


class Disagreement(Exception):
    """Variants answer the same inputs differently; the message says which and by how much."""


@dataclass(frozen=True)
class Measured:
    variant: str
    timing: Timing
    floor_ms: float
    copy_ms: float
    rate_floor_ms: float | None
    peak_extra_mib: float


@cache
def rate_of(dtype: torch.dtype, device: str) -> float:
    return product_rate(dtype, device)


def with_isa(run: Callable[[Inputs], Answer], isa: str) -> Callable[[Inputs], Answer]:
    """The same call held to one instruction set of the CPU kernels; ValueError where this processor lacks it."""
    from negmine import _ops_cpu

    def held(inputs: Inputs) -> Answer:
        chosen = _ops_cpu.isa()
        if not _ops_cpu.set_isa(isa):
            raise ValueError(f"the CPU kernels have no {isa} here")
        try:
            return run(inputs)
        finally:
            _ops_cpu.set_isa(chosen)

    return held


def variants_of(
    name: str,
    inputs: Inputs,
    backends: list[str | None],
    isas: tuple[str, ...] = (),
    with_compile: bool = False,
    with_peers: bool = False,
) -> Variants:
    """with_peers: the packages installed here, and on a GPU other ways in PyTorch, which are no match on a CPU."""
    op = OPS[name]
    variants: Variants = {
        f"{OURS}[{backend}]" if backend else OURS: partial(op.fused, backend=backend) for backend in backends
    }
    variants |= {f"{OURS} ({isa})": with_isa(op.fused, isa) for isa in isas}
    variants[EAGER] = op.eager
    if inputs.keys.dtype != torch.float32 and not inputs.keys.is_cuda:
        longer = in_float32(inputs)
        variants[EAGER_FP32] = lambda _: op.eager(longer)
    if with_compile:
        variants["torch.compile"] = torch.compile(op.eager)
    if with_peers:
        variants |= (op.peers if inputs.keys.is_cuda else {}) | libraries.variants(name, inputs)
    return variants


def check(name: str, variants: Variants, inputs: Inputs) -> list[str]:
    """Sentences that say which variant answers something else; one that draws at random is checked on given draws.

    A variant of another that cannot run here, or is off by more than it may, leaves `variants`.
    """
    op = OPS[name]
    same_draws = op.eager_same_draws and partial(op.eager_same_draws, drawn_from=inputs)
    truth = (same_draws or op.eager)(for_truth(inputs))
    complaints = []
    for variant, run in list(variants.items()):
        is_ours = variant.startswith(OURS)
        if variant in PLAIN and same_draws:
            run = same_draws
        tolerance = (TOLERANCE if is_ours else PLAIN_TOLERANCE)[inputs.query.dtype]
        try:
            found = disagreement(name, run(inputs), truth, inputs, tolerance)
        except Exception as error:  # whatever a package raises, the others keep their rows
            if is_ours:
                raise
            print(f"left out: {variant} cannot run {name} here: {libraries.said(error)}")
            del variants[variant]
            continue
        if found and is_ours:
            complaints.append(f"{variant}: {found}")
        elif found:
            print(f"left out: {variant}: {found}")
            del variants[variant]
    return complaints


def measure(
    name: str,
    inputs: Inputs,
    seconds: float,
    backends: list[str | None],
    *,
    isas: tuple[str, ...] = (),
    with_compile: bool = False,
    with_peers: bool = False,
) -> list[Measured]:
    """Time the op `name`; raises Disagreement before any timing where a variant answers something else."""
    variants = variants_of(name, inputs, backends, isas, with_compile, with_peers)
    if complaints := check(name, variants, inputs):
        raise Disagreement("not timed, since " + "; ".join(complaints))
    device = inputs.query.device.type
    calls: dict[str, Callable[[], object]] = {variant: partial(run, inputs) for variant, run in variants.items()}
    calls["gemm"] = lambda: inputs.query @ inputs.keys.T  # (B, K)
    calls["copy"] = inputs.keys.clone
    timings = interleave(calls, device, seconds, uncaptured=libraries.UNCAPTURED)
    gemms, (K, D) = OPS[name].gemms, inputs.keys.shape
    floor_ms, copy_ms = gemms * timings["gemm"].median, timings["copy"].median
    rate_floor_ms = None
    if device != "cpu":
        rate_floor_ms = gemms * 2 * len(inputs.query) * K * D / rate_of(inputs.query.dtype, device)
    return [
        Measured(
            variant,
            timings[variant],
            floor_ms,
            copy_ms,
            rate_floor_ms,
            peak_extra_bytes(calls[variant], device) / 2**20,
        )
        for variant in variants
    ]
