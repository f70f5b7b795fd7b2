"""Chooses the backend of a call from a table that is filled at import.

The environment variable NEGMINE_BACKEND is read once, at import. It sets the backend of every call that does not name one. For a
backend that is not available, the table holds the reason; `choose` raises an error with this reason if that backend is requested.
All ops of a call that compare scores come from the same backend, because two backends sum in different orders.
"""

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from negmine.ops import (  # noqa: F401  importing a module declares its op
    compiled,
    count_negatives,
    gathered_grad_keys,
    gathered_logsumexp,
    info_nce,
    logsumexp,
    logsumexp_grad_bias,
    logsumexp_grad_keys,
    maxsim,
    mine_gathered,
    mine_hardest,
    mine_hardest_codes,
    mix_logsumexp,
    mix_negatives,
    prefix_logsumexp,
    rank_thresholds,
    round_to_codes,
    softplus_sum,
    softplus_sum_grad_bias,
    softplus_sum_grad_keys,
)
from negmine.ops.registry import OPS

NAMES = ("cuda", "triton", "cpu", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORCED = os.environ.get("NEGMINE_BACKEND") or None
if FORCED is not None and FORCED not in NAMES:
    raise ValueError(f"NEGMINE_BACKEND must be one of {', '.join(NAMES)}, got {FORCED!r}")
# The backends whose ops over a queue support a bias or a guide.
TAKE_EXTRAS = frozenset({"cpu", "triton", "reference"})
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The ops that the cuda backend runs by default. Its other ops run only with backend="cuda". No CUDA kernel has run on a GPU yet.
# An op is added here once benchmarks/results has rows of both backends (benchmarks/run.py --device cuda --backend triton cuda)
# and cuda is faster. Calls that exceed the limits of a CUDA kernel then run on Triton's kernel.
CUDA_BY_DEFAULT: frozenset[str] = frozenset()
# kernels/triton and kernels/cuda need the shared memory and the matrix products of Ampere.
MIN_COMPUTE_CAPABILITY = (8, 0)
AMD_GPUS = ("gfx942", "gfx1100")  # the AMD GPUs for which tests compile the kernels of Triton; they have run on none


class Kernels:
    """The functions that run one call, as attributes with the names of the ops. `has` tells whether an op is among them."""

    def __init__(self, **functions: Callable) -> None:
        self.__dict__.update(functions)

    def __getattr__(self, op: str) -> Callable:
        raise AttributeError(f"this call has no kernel {op}")

    def has(self, op: str) -> bool:
        return op in self.__dict__

    def queue_size(self, negative_keys: Tensor) -> int:
        """The number of rows K of the queue that the ops read."""
        return negative_keys.shape[-2]


class BackendUnavailable(RuntimeError):
    """The requested backend cannot run this call. The message gives the reason."""


@dataclass
class Backend:
    """One row of the table."""

    name: str
    device: str  # the torch device type that it runs on by default, or "any"
    functions: dict[str, Callable] = field(default_factory=dict)  # by op name
    refusal: str = ""  # the reason if it is not available
    second_device: str = ""  # another device type, supported only if the backend is requested by name
    by_name_only: frozenset[str] = frozenset()  # ops that run only if the backend is requested by name
    limits: dict[str, Callable[..., str]] = field(default_factory=dict)  # op -> why it cannot run the given arguments


def card_limit(device: torch.device) -> str:
    """The reason why the kernels cannot run on this GPU, or "" if they can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        known = " and ".join(AMD_GPUS)
        return "" if name in AMD_GPUS else f"its kernels are compiled for {known} among AMD's GPUs, this one is {name}"
    found = torch.cuda.get_device_capability(device)
    return (
        ""
        if found >= MIN_COMPUTE_CAPABILITY
        else "its kernels need compute capability {}.{}, this GPU has {}.{}".format(*MIN_COMPUTE_CAPABILITY, *found)
    )


def scoring_limit(dtypes: tuple[torch.dtype, ...], D: int) -> str:
    """The reason why the cuda backend cannot compute the scores of a call, or "" if it can.

    It supports only 16-bit storage, because TF32 products would round fp32 input, and only rows that fit into registers.
    """
    if len(set(dtypes)) != 1 or dtypes[0] not in (torch.bfloat16, torch.float16):
        got = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"it takes query and negative_keys both bfloat16 or both float16, got {got}"
    return f"it takes D up to 256, got {D}" if D > 256 else ""


def mining_limit(dtypes: tuple[torch.dtype, ...], K: int, D: int, N: int, asked: bool) -> str:
    """The reason why the mine_hardest of the cuda backend does not run a call, or "" if it does.

    In addition to the limits of scoring, the kept columns must fit into the shared memory of a block. Short queues run on Triton,
    unless the cuda backend is requested.
    """
    why = scoring_limit(dtypes, D)
    if why:
        return why
    if N > 4096 or K > 2**22 or (N > 2048 and K > 2**19):
        return f"it takes N up to 4096 of K up to {2**19}, or 2048 of {2**22}, got N = {N} of K = {K}"
    return "" if asked or K > 8192 else f"Triton's kernel is faster for a queue as short as K = {K}"


def ranking_limit(dtypes: tuple[torch.dtype, ...], K: int, D: int) -> str:
    """The reason why the rank_thresholds of the cuda backend does not run a call, or "" if it does.

    In addition to the limits of scoring, the queue must not be too long. The ranks are known only on the device, so memory is
    reserved for the case that needs most, the median: a few percent of K columns.
    """
    why = scoring_limit(dtypes, D)
    return why or (f"it takes K up to {2**24}, got {K}" if K > 2**24 else "")


def _scoring_limit(query: Tensor, negative_keys: Tensor, *_: Any, asked: bool) -> str:
    return scoring_limit((query.dtype, negative_keys.dtype), query.shape[1])


def _mining_limit(query: Tensor, negative_keys: Tensor, N: int, *_: Any, asked: bool) -> str:
    K, D = negative_keys.shape
    return mining_limit((query.dtype, negative_keys.dtype), K, D, N, asked)


def _ranking_limit(query: Tensor, negative_keys: Tensor, *_: Any, asked: bool) -> str:
    K, D = negative_keys.shape
    return ranking_limit((query.dtype, negative_keys.dtype), K, D)


def _summing_limit(
    query: Tensor,
    negative_keys: Tensor,
    scales: Tensor,
    pivot: Any,
    want_mean: bool,
    N: int,
    ranks: Any,
    *_: Any,
    asked: bool,
) -> str:
    if N:
        return _mining_limit(query, negative_keys, N, asked=asked)
    return (_scoring_limit if ranks is None else _ranking_limit)(query, negative_keys, asked=asked)


def _loss_limit(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor,
    scale: Tensor,
    pivot: Any,
    want_gradient: bool,
    decoupled: bool,
    ranks: Any,
    hard: int,
    skip: int,
    *_: Any,
    asked: bool,
) -> str:
    mined = min(skip + hard, max(negative_keys.shape[0], skip + 1)) if hard else 0
    return _summing_limit(query, negative_keys, scale, pivot, want_gradient, mined, ranks, asked=asked)


def _cuda_backend() -> Backend:
    found = {} if compiled.CUDA_REFUSAL else compiled.functions("negmine_cuda", "CUDA")
    limits: dict[str, Callable[..., str]] = {
        "mine_hardest": _mining_limit,
        "info_nce": _loss_limit,
        "logsumexp": _summing_limit,
        "rank_thresholds": _ranking_limit,
        "logsumexp_grad_keys": _scoring_limit,
        "count_negatives": _scoring_limit,
    }
    by_name_only = frozenset(found) - CUDA_BY_DEFAULT
    return Backend("cuda", "cuda", found, compiled.CUDA_REFUSAL, by_name_only=by_name_only, limits=limits)


def _triton_backend() -> Backend:
    if not (torch.cuda.is_available() or INTERPRETED):
        return Backend(
            "triton", "cuda", refusal="torch sees no CUDA device, and TRITON_INTERPRET=1 was not set at import"
        )
    try:
        module = importlib.import_module("negmine.ops.triton_ops")
        found = module.launchers(("cuda", "cpu") if INTERPRETED else ("cuda",))
    except ImportError as error:
        return Backend("triton", "cuda", refusal=f"its import failed: {error}")
    return Backend("triton", "cuda", found, second_device="cpu" if INTERPRETED else "")


def _cpu_backend() -> Backend:
    found = {} if compiled.CPU_REFUSAL else compiled.functions("negmine_cpu", "CPU")
    return Backend("cpu", "cpu", found, compiled.CPU_REFUSAL)


# In order of preference. The reference has no kernels: public functions call its dense functions directly.
BACKENDS = (_cuda_backend(), _triton_backend(), _cpu_backend(), Backend("reference", "any"))
_chosen: dict[tuple, Kernels | None] = {}  # a cache of choices, by kind of call
_warned: set[str] = set()


def explain(op: str, device: str, too_old: str = "", asked: str | None = None) -> str:
    """The reasons why the backends, or the requested one, do not run `op` on `device`. too_old is the result of card_limit."""
    reasons = []
    for backend in BACKENDS[:-1]:
        if asked not in (None, backend.name):
            continue
        if device not in (backend.device, backend.second_device):
            reasons.append(f"{backend.name} takes {backend.device} tensors")
        elif backend.refusal:
            reasons.append(f"{backend.name}: {backend.refusal}")
        elif too_old:
            reasons.append(f"{backend.name}: {too_old}")
        elif op not in backend.functions:
            reasons.append(f"{backend.name} has no kernel for {op}")
        elif op in backend.by_name_only:
            reasons.append(f"{backend.name} runs {op} only if it is requested by name")
    return "; ".join(reasons)


def _runs(backend: Backend, ops: list[str], device: str, by_name: bool) -> bool:
    fits = backend.device == device or (by_name and backend.second_device == device)
    # An op with limits may fall back to another backend. That must not happen if its scores are compared with those of other ops.
    by_default = not backend.by_name_only.intersection(ops)
    by_default = by_default and (len(ops) == 1 or not set(backend.limits).intersection(ops))
    return fits and (by_name or by_default) and not backend.refusal and all(op in backend.functions for op in ops)


def _function(caller: str, op: str, able: list[Backend], asked: str | None) -> Callable:
    """The op of the first of these backends. If the arguments of a call exceed its limits, the second backend runs the call."""
    first = able[0].functions[op]
    limit = able[0].limits.get(op)
    if limit is None:
        return first
    fallback = able[1].functions[op] if asked is None and len(able) > 1 else None

    def launch(*arguments: Any) -> Any:
        why = limit(*arguments, asked=fallback is None)
        if why and fallback is None:
            raise BackendUnavailable(f"{caller}: backend {able[0].name!r} cannot run this {op} ({why})")
        return (fallback if why and fallback else first)(*arguments)

    return launch


def choose(
    caller: str,
    ops: tuple[str, ...],
    backend: str | None,
    tensors: tuple[Tensor, ...],
    optional: str = "",
    extra: str = "",
) -> Kernels | None:
    """The kernels of `ops` for these tensors, or None if the reference runs the call.

    `optional` names an op that the call can do without; it is included if the backend of the first op has it. `extra` is
    Pool.extra. Raises ValueError for an unknown backend, and BackendUnavailable if the requested backend cannot run the call.
    """
    device = tensors[0].device
    if torch.compiler.is_compiling():
        return _choose(caller, ops, backend, device, [t.dtype for t in tensors], optional, extra)
    kind = (caller, ops, backend, device, *(t.dtype for t in tensors), optional, extra)
    try:
        return _chosen[kind]
    except (KeyError, TypeError):  # TypeError: an unhashable `backend`, which _choose rejects
        chosen = _choose(caller, ops, backend, device, [t.dtype for t in tensors], optional, extra)
        _chosen[kind] = chosen
        return chosen


def _choose(
    caller: str,
    ops: tuple[str, ...],
    backend: str | None,
    torch_device: torch.device,
    dtypes: list[torch.dtype],
    optional: str,
    extra: str,
) -> Kernels | None:
    device = torch_device.type
    if backend is not None and backend not in NAMES:
        raise ValueError(f"{caller}: backend must be None, {', '.join(map(repr, NAMES))}, got {backend!r}")
    asked = backend or FORCED
    if asked == "reference":
        return None
    unsupported = [f"{str(dtype).removeprefix('torch.')} input" for dtype in dtypes if dtype not in KERNEL_DTYPES]
    if extra and asked is not None and asked not in TAKE_EXTRAS:
        raise BackendUnavailable(
            f"{caller}: backend {asked!r} does not support a {extra} of shared keys; 'cpu' and 'triton' do"
        )
    if unsupported:
        if asked is not None:
            raise BackendUnavailable(
                f"{caller}: backend {asked!r} has no kernel for {unsupported[0]}; use backend='reference'"
            )
        _warn_dense(caller, device, unsupported[0])
        return None
    rows = [row for row in BACKENDS if asked in (None, row.name) and (not extra or row.name in TAKE_EXTRAS)]
    too_old = card_limit(torch_device)
    if too_old:
        rows = []
    scored = [op for op in ops if OPS[op].takes_pool]
    chosen: dict[str, Callable] = {}
    for op in ops:
        together = scored if OPS[op].takes_pool else [op]
        able = [row for row in rows if _runs(row, together, device, asked is not None)]
        if able:
            holders = [row for row in able if optional and _runs(row, [optional], device, asked is not None)]
            if not chosen and holders[:1] == able[:1]:
                chosen[optional] = _function(caller, optional, holders, asked)
            chosen[op] = _function(caller, op, able, asked)
            continue
        # Either no backend runs this op, or no backend runs all ops of `together`. The error names an op that no backend runs.
        missing = (each for each in together if not any(_runs(row, [each], device, asked is not None) for row in rows))
        first_missing = next(missing, op)
        why = explain(first_missing, device, too_old, asked)
        if asked is not None:
            raise BackendUnavailable(
                f"{caller}: backend {asked!r} cannot run {first_missing} on {device} tensors ({why})"
            )
        _warn_dense(caller, device, why)
        return None
    return Kernels(**chosen)


def _warn_dense(caller: str, device: str, why: str) -> None:
    """Warn, once for each reason, that the dense reference runs a call on a GPU. It may be a thousand times slower."""
    message = f"{caller}: the dense reference runs this call on {device} tensors and stores the score matrix ({why})"
    if device != "cpu" and not torch.compiler.is_compiling() and message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=5)
