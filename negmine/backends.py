"""Which code runs: one table, filled once at import, read by one loop per call.

NEGMINE_BACKEND, read once, insists on a backend for every call that names none. A backend that cannot be used here keeps the
reason, and `choose` repeats it to whoever asks for that backend. The ops of a call whose scores meet come from one backend.
"""

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from negmine import order

NAMES = ("cuda", "triton", "cpu", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORCED = os.environ.get("NEGMINE_BACKEND") or None
if FORCED is not None and FORCED not in NAMES:
    raise ValueError(f"NEGMINE_BACKEND must be one of {', '.join(NAMES)}, got {FORCED!r}")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Launchers(NamedTuple):
    """The kernels that run one call, by op name; None where the call does not need the op."""

    info_nce: Any = None  # where it is absent, negmine/info_nce.py does its arithmetic in torch
    logsumexp: Any = None
    logsumexp_pair: Any = None
    logsumexp_mine: Any = None
    logsumexp_window: Any = None  # where it is absent, the window's places come from rank_thresholds
    logsumexp_grad_keys: Any = None
    softplus_sum: Any = None
    softplus_sum_grad_keys: Any = None
    mine_hardest: Any = None
    mine_hardest_kept: Any = None
    mine_listed: Any = None
    rank_thresholds: Any = None
    count_negatives: Any = None
    mix_negatives: Any = None
    mix_logsumexp: Any = None
    listed_logsumexp: Any = None
    listed_grad_keys: Any = None

    def rows(self, negative_keys: Tensor) -> int:
        """K of the queue that the ops read."""
        return negative_keys.shape[-2]


SPARED = ("info_nce", "logsumexp_window")  # what a call can do without
OPS = tuple(op for op in Launchers._fields if op not in SPARED)

# Ops that compute scores against the queue: one may compare its own with places that another found, and two backends sum in
# another order. So a call takes all of these from one backend.
SCORED = frozenset(OPS[: OPS.index("mix_negatives")])

# Ops that the cuda backend runs unasked; its others wait for backend="cuda". An op gets here, and Triton's kernel then runs what
# mining_limit says, once rows of benchmarks/results from a card show both (benchmarks/run.py --device cuda --backend triton cuda)
# and cuda is ahead. mix_negatives computes no score and has nothing to be compared with.
CUDA_UNASKED = frozenset({"mix_negatives"})


def in_two(logsumexp: Callable) -> Callable:
    """logsumexp_pair as two calls of a logsumexp: for what has no pass that serves both scales."""

    def logsumexp_pair(query, negative_keys, scale, pivot, want_mean, *pool):
        first = logsumexp(query, negative_keys, scale[0], pivot, want_mean, *pool)
        second = logsumexp(query, negative_keys, scale[1], None, want_mean, *pool)
        lse, mean = (torch.stack(both) for both in zip(first[:2], second[:2], strict=True))
        return lse, mean, *first[2:]

    return logsumexp_pair


def one_by_one(logsumexp: Callable, mine_hardest: Callable) -> Callable:
    """logsumexp_mine as a sum and a mining: for what has no pass that serves both."""

    def logsumexp_mine(query, negative_keys, N, scale, pivot, want_mean, *pool):
        summed = logsumexp(query, negative_keys, scale, pivot, want_mean, *pool)
        return *summed, *mine_hardest(query, negative_keys, N, *pool)

    return logsumexp_mine


def with_count(mine_hardest: Callable, count_negatives: Callable) -> Callable:
    """mine_hardest_kept as a mining and a count: for what has no pass that serves both."""

    def mine_hardest_kept(query, negative_keys, N, mask, ids, of_ids, labels, of_labels, lower, upper, same=False):
        if lower is None:  # a bound that holds every score but NaN
            lower = order.pack(query.new_full((len(query),), -torch.inf, dtype=torch.float32), order.LAST_INDEX)
        pool = (mask, ids, of_ids, labels, of_labels, lower, upper, same)
        return *mine_hardest(query, negative_keys, N, *pool), count_negatives(query, negative_keys, *pool)

    return mine_hardest_kept


def summing(keys: Any) -> tuple[str, ...]:
    """The ops of a sum over keys, checked or not; their gradient is a kernel of its own, for keys that require one."""
    return ("logsumexp", "logsumexp_grad_keys") if getattr(keys, "requires_grad", False) else ("logsumexp",)


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run this call; the message says why."""


@dataclass
class Backend:
    """One row of the table."""

    name: str
    device: str  # the torch device type it is the natural choice for, or "any"
    launchers: dict[str, Callable] = field(default_factory=dict)
    refusal: str = ""  # why it cannot be used here
    also: str = ""  # a further device type it takes when asked for by name
    asked_only: frozenset[str] = frozenset()  # ops that it runs only when asked for by name
    limits: dict[str, Callable[..., str]] = field(default_factory=dict)  # op -> why not these arguments, given `asked`


def scoring_limit(dtypes: tuple[torch.dtype, ...], D: int, capability: int) -> str:
    """Why the scores of the cuda backend are not what such a call takes, empty where they are; capability is major * 10 + minor.

    What its products cannot do at all: other storage than one of 16 bits (TF32 would round fp32 input), rows that do not fit
    in registers.
    """
    if capability < 80:
        return f"its products need compute capability 8.0 or higher, this card has {capability / 10}"
    if len(set(dtypes)) != 1 or dtypes[0] not in (torch.bfloat16, torch.float16):
        got = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"it takes query and negative_keys both bfloat16 or both float16, got {got}"
    return f"it takes D up to 256, got {D}" if D > 256 else ""


def mining_limit(dtypes: tuple[torch.dtype, ...], K: int, D: int, N: int, capability: int, asked: bool) -> str:
    """Why the cuda mine_hardest is not what runs such a call, empty where it is.

    Unasked it also leaves short queues to Triton. Beside the scores' limits: more survivors than fit in a block's shared memory.
    """
    why = scoring_limit(dtypes, D, capability)
    if why:
        return why
    if N > 4096 or K > 2**22 or (N > 2048 and K > 2**19):
        return f"it takes N up to 4096 of K up to {2**19}, or 2048 of {2**22}, got N = {N} of K = {K}"
    return "" if asked or K > 8192 else f"a queue as short as K = {K} is quicker by whole rows"


def ranking_limit(dtypes: tuple[torch.dtype, ...], K: int, D: int, capability: int) -> str:
    """Why the cuda rank_thresholds does not take such a call, empty where it does: beside the scores' limits, too long a queue.

    Its ranks are known on the device alone, so it has memory for those of a median: of K columns, a few in a hundred.
    """
    why = scoring_limit(dtypes, D, capability)
    return why or (f"it takes K up to {2**24}, got {K}" if K > 2**24 else "")


def _capability(query: Tensor) -> int:
    major, minor = torch.cuda.get_device_capability(query.device)
    return 10 * major + minor


def _scoring_limit(query: Tensor, negative_keys: Tensor, *_: Any, asked: bool) -> str:
    return scoring_limit((query.dtype, negative_keys.dtype), query.shape[1], _capability(query))


def _mining_limit(query: Tensor, negative_keys: Tensor, N: int, *_: Any, asked: bool) -> str:
    K, D = negative_keys.shape
    return mining_limit((query.dtype, negative_keys.dtype), K, D, N, _capability(query), asked)


def _ranking_limit(query: Tensor, negative_keys: Tensor, *_: Any, asked: bool) -> str:
    K, D = negative_keys.shape
    return ranking_limit((query.dtype, negative_keys.dtype), K, D, _capability(query))


def _cuda_ops() -> Backend:
    from negmine import cpp_ops

    found = cpp_ops.launchers("CUDA")
    if found:
        found["mine_hardest_kept"] = with_count(found["mine_hardest"], found["count_negatives"])
        found["logsumexp_pair"] = in_two(found["logsumexp"])
        found["logsumexp_mine"] = one_by_one(found["logsumexp"], found["mine_hardest"])
    asked_only = frozenset(found) - CUDA_UNASKED
    mining = ("mine_hardest", "mine_hardest_kept", "logsumexp_mine")
    summing = ("logsumexp", "logsumexp_pair", "logsumexp_grad_keys", "count_negatives")
    limits = dict.fromkeys(mining, _mining_limit) | dict.fromkeys(summing, _scoring_limit)
    limits["rank_thresholds"] = _ranking_limit
    return Backend("cuda", "cuda", found, cpp_ops.CUDA_REFUSAL, asked_only=asked_only, limits=limits)


def _triton_ops() -> Backend:
    if not (torch.cuda.is_available() or INTERPRETED):
        return Backend(
            "triton", "cuda", refusal="torch sees no CUDA device, and TRITON_INTERPRET=1 was not set at import"
        )
    try:
        module = importlib.import_module("negmine.kernels.triton")
    except ImportError as error:
        return Backend("triton", "cuda", refusal=f"its import failed: {error}")
    from negmine import triton_ops

    devices = ("cuda", "cpu") if INTERPRETED else ("cuda",)
    found = triton_ops.launchers({op: getattr(module, op) for op in module.__all__}, devices)
    found["logsumexp_pair"] = in_two(found["logsumexp"])
    found["logsumexp_mine"] = one_by_one(found["logsumexp"], found["mine_hardest"])
    found["mine_hardest_kept"] = with_count(found["mine_hardest"], found["count_negatives"])
    return Backend("triton", "cuda", found, also="cpu" if INTERPRETED else "")


def _cpu_ops() -> Backend:
    from negmine import cpp_ops

    return Backend("cpu", "cpu", cpp_ops.launchers("CPU"), cpp_ops.CPU_REFUSAL)


# In order of preference. The reference has no launchers: the public functions call it by its own, dense signatures.
BACKENDS = (_cuda_ops(), _triton_ops(), _cpu_ops(), Backend("reference", "any"))
_warned: set[str] = set()


def explain(op: str, device: str) -> str:
    """One clause per backend: why it does not run `op` on `device`."""
    reasons = []
    for backend in BACKENDS[:-1]:
        if device not in (backend.device, backend.also):
            reasons.append(f"{backend.name} takes {backend.device} tensors")
        elif backend.refusal:
            reasons.append(f"{backend.name}: {backend.refusal}")
        elif op not in backend.launchers:
            reasons.append(f"{backend.name} has no kernel for {op}")
        elif op in backend.asked_only:
            reasons.append(f"{backend.name} runs {op} only where it is asked for by name")
    return "; ".join(reasons)


def _runs(backend: Backend, ops: list[str], device: str, by_name: bool) -> bool:
    fits = backend.device == device or (by_name and backend.also == device)
    # What a limit sends elsewhere would be apart from the ops beside it.
    free = not backend.asked_only.intersection(ops) and (len(ops) == 1 or not set(backend.limits).intersection(ops))
    return fits and (by_name or free) and not backend.refusal and all(op in backend.launchers for op in ops)


def _launcher(caller: str, op: str, able: list[Backend], asked: str | None) -> Callable:
    """The op of the first of these rows, or where its limit is against a call's arguments that of the next."""
    first = able[0].launchers[op]
    limit = able[0].limits.get(op)
    if limit is None:
        return first
    other = able[1].launchers[op] if asked is None and len(able) > 1 else None

    def launch(*arguments: Any) -> Any:
        why = limit(*arguments, asked=other is None)
        if why and other is None:
            raise BackendUnavailable(f"{caller}: backend {able[0].name!r} cannot run this {op} ({why})")
        return (other if why and other else first)(*arguments)

    return launch


def choose(
    caller: str, ops: tuple[str, ...], backend: str | None, tensors: tuple[Tensor, ...], also: tuple[str, ...] = ()
) -> Launchers | None:
    """The launchers of `ops` for these tensors, by name; None = the reference runs the call.

    also: ops that the call can do without, taken where the backend that runs the first one has them.

    Raises ValueError for an unknown backend and BackendUnavailable where the one insisted on cannot run the call.
    """
    if backend is not None and backend not in NAMES:
        raise ValueError(f"{caller}: backend must be None, {', '.join(map(repr, NAMES))}, got {backend!r}")
    asked = backend or FORCED
    if asked == "reference":
        return None
    device = tensors[0].device.type
    unfit = [str(t.dtype).removeprefix("torch.") for t in tensors if t.dtype not in KERNEL_DTYPES]
    if unfit:
        dense = f"{unfit[0]} input"
        if asked is not None:
            raise BackendUnavailable(
                f"{caller}: backend {asked!r} has no kernel for {dense}; only the reference defines it"
            )
        _warn_dense(caller, device, dense)
        return None
    rows = [row for row in BACKENDS if asked in (None, row.name)]
    scored = [op for op in ops if op in SCORED]
    chosen: dict[str, Any] = {}
    for op in ops:
        together = scored if op in SCORED else [op]
        able = [row for row in rows if _runs(row, together, device, asked is not None)]
        if able:
            found = able[0].launchers
            chosen |= {} if chosen else {name: found[name] for name in also if name in found}
            chosen[op] = _launcher(caller, op, able, asked)
            continue
        # An op that none of them runs; or each runs some of these, and none all.
        lone = (each for each in together if not any(_runs(row, [each], device, asked is not None) for row in rows))
        lacking = next(lone, op)
        why = explain(lacking, device)
        if asked is not None:
            raise BackendUnavailable(f"{caller}: backend {asked!r} cannot run {lacking} on {device} tensors ({why})")
        _warn_dense(caller, device, why)
        return None
    return Launchers(**chosen)


def _warn_dense(caller: str, device: str, why: str) -> None:
    """A GPU call that falls to the dense reference is a thousandfold slower: say so once a reason."""
    message = f"{caller}: the dense reference runs this call on {device} tensors and stores the score matrix ({why})"
    if device != "cpu" and not torch.compiler.is_compiling() and message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
