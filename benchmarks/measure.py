"""Check the variants of an op and then time them. run.py and the demo use this module.

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
    """The results of variants differ; the message says which and by how much."""


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
    """The same call with one instruction set of the CPU kernels. It raises ValueError if the processor does not have it."""
    from negmine import _ops_cpu

    def forced(inputs: Inputs) -> Answer:
        chosen = _ops_cpu.isa()
        if not _ops_cpu.set_isa(isa):
            raise ValueError(f"the CPU kernels have no {isa} here")
        try:
            return run(inputs)
        finally:
            _ops_cpu.set_isa(chosen)

    return forced


def variants_of(
    name: str,
    inputs: Inputs,
    backends: list[str | None],
    isas: tuple[str, ...] = (),
    with_compile: bool = False,
    with_peers: bool = False,
) -> Variants:
    """with_peers: add the packages that are installed, and on a GPU also other PyTorch code, which is too slow on a CPU."""
    op = OPS[name]
    variants: Variants = {
        f"{OURS}[{backend}]" if backend else OURS: partial(op.fused, backend=backend) for backend in backends
    }
    variants |= {f"{OURS} ({isa})": with_isa(op.fused, isa) for isa in isas}
    variants[EAGER] = op.eager
    if inputs.keys.dtype != torch.float32 and not inputs.keys.is_cuda:
        widened = in_float32(inputs)
        variants[EAGER_FP32] = lambda _: op.eager(widened)
    if with_compile:
        variants["torch.compile"] = torch.compile(op.eager)
    if with_peers:
        variants |= (op.peers if inputs.keys.is_cuda else {}) | libraries.variants(name, inputs)
    return variants


def check(name: str, variants: Variants, inputs: Inputs) -> list[str]:
    """One sentence for each variant of negmine whose result is wrong. Ops with random draws are checked with given draws.

    Other variants that cannot run here, or whose results are wrong, are removed from `variants`.
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
        except Exception as error:  # one package that fails must not affect the others
            if is_ours:
                raise
            print(f"left out: {variant} cannot run {name} here: {libraries.first_line(error)}")
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
    """Time the op `name`. Raises Disagreement before any timing if a result of negmine is wrong."""
    variants = variants_of(name, inputs, backends, isas, with_compile, with_peers)
    if complaints := check(name, variants, inputs):
        raise Disagreement("not timed, because " + "; ".join(complaints))
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
