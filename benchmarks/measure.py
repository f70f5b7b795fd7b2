"""Check one op's variants against each other, then time them: what run.py and the demo share.

Every variant first answers the same inputs as plain PyTorch in fp32; where one answer differs nothing is timed. A way
that a device cannot run, for want of memory or of a kernel, is left out, and said. The floor is the matrix products
that no method avoids, timed in the same rounds as the variants; on a GPU also what they take at the rate of a large one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from benchmarks.cases import Inputs
from benchmarks.peers import OPS, PLAIN_TOLERANCE, TOLERANCE, Answer, Op, disagreement, in_float32
from benchmarks.timing import Timing, interleave, peak_extra_bytes, product_rate

PLAIN = ("eager", "torch.compile")


class Disagreement(Exception):
    """Variants answer the same inputs differently; the message says which and by how much."""


@dataclass(frozen=True)
class Measured:
    variant: str
    timing: Timing
    floor_ms: float
    rate_floor_ms: float | None
    peak_extra_mib: float


@cache
def rate_of(dtype: torch.dtype, device: str) -> float:
    return product_rate(dtype, device)


def variants_of(
    op: Op, backends: list[str | None], with_compile: bool, with_peers: bool
) -> dict[str, Callable[[Inputs], Answer]]:
    variants: dict[str, Callable[[Inputs], Answer]] = {
        f"negmine[{backend}]" if backend else "negmine": partial(op.fused, backend=backend) for backend in backends
    }
    variants["eager"] = op.eager
    if with_compile:
        variants["torch.compile"] = torch.compile(op.eager)
    if with_peers:
        variants |= op.peers
    return variants


def check(name: str, variants: dict[str, Callable[[Inputs], Answer]], inputs: Inputs) -> list[str]:
    """Sentences that say which variant answers something else; one that draws at random is checked on given draws.

    A variant of plain PyTorch that cannot run here leaves `variants`.
    """
    op = OPS[name]
    truth = (op.eager_same_draws or op.eager)(in_float32(inputs))
    complaints = []
    for variant, run in list(variants.items()):
        is_plain = not variant.startswith("negmine")
        if variant in PLAIN and op.eager_same_draws:
            run = op.eager_same_draws
        tolerance = (PLAIN_TOLERANCE if is_plain else TOLERANCE)[inputs.query.dtype]
        try:
            found = disagreement(name, run(inputs), truth, inputs, tolerance)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_plain:
                raise
            print(f"left out: {variant} cannot run {name} here: {str(error).splitlines()[0]}")
            del variants[variant]
            continue
        if found:
            complaints.append(f"{variant}: {found}")
    return complaints


def measure(
    name: str,
    inputs: Inputs,
    seconds: float,
    backends: list[str | None],
    with_compile: bool = False,
    with_peers: bool = False,
) -> list[Measured]:
    """Time the op `name`; raises Disagreement before any timing where a variant answers something else."""
    variants = variants_of(OPS[name], backends, with_compile, with_peers)
    if complaints := check(name, variants, inputs):
        raise Disagreement("not timed, since " + "; ".join(complaints))
    device = inputs.query.device.type
    calls = {variant: partial(run, inputs) for variant, run in variants.items()}
    calls["gemm"] = lambda: inputs.query @ inputs.keys.T  # (B, K)
    timings = interleave(calls, device, seconds)
    gemms, (K, D) = OPS[name].gemms, inputs.keys.shape
    floor_ms = gemms * timings["gemm"].median
    rate_floor_ms = None
    if device != "cpu":
        rate_floor_ms = gemms * 2 * len(inputs.query) * K * D / rate_of(inputs.query.dtype, device)
    return [
        Measured(variant, timings[variant], floor_ms, rate_floor_ms, peak_extra_bytes(calls[variant], device) / 2**20)
        for variant in variants
    ]
