"""Kernels for keys (B, M, D), where each query has M keys of its own, instead of a queue (K, D) that all queries share.

`over_own_keys(kernels)` returns such kernels.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from negmine.ops import sort_key
from negmine.ops.backends import Kernels, choose
from negmine.ops.column_lists import LIST_SUMS, flat_rows, gathered_scores, list_logsumexp
from negmine.ops.pool import Pool, narrow, usable


def _allowed(query: Tensor, negative_keys: Tensor, pool: Pool) -> Tensor:
    """(B, M) int64: the number of each column that the masks allow, -1 for the others."""
    column = torch.arange(negative_keys.shape[1], device=query.device)  # (M,)
    mask = usable(pool, query, negative_keys)
    return column.expand(negative_keys.shape[:2]) if mask is None else torch.where(mask, column, -1)


def _sort_keys(kernels: Kernels, query: Tensor, negative_keys: Tensor, pool: Pool) -> Tensor:
    """(B, M) int64: the sort key of each column in the pool, NOWHERE for the others."""
    index = _allowed(query, negative_keys, pool)
    one = torch.ones((), dtype=torch.float32, device=query.device)
    scores = gathered_scores(kernels, query, negative_keys, one, index)  # (B, M)
    keys = sort_key.pack(scores, index.clamp_min(0))  # (B, M)
    inside = (index >= 0) & ~scores.isnan()
    if pool.lower is not None:
        inside = inside & (keys >= pool.lower[:, None]) & (pool.lower != sort_key.NOWHERE)[:, None]
    if pool.upper is not None:
        # A positive whose score is NaN gives a bound with the score NaN. It is above every sort key and must keep no column.
        inside = inside & (keys <= pool.upper[:, None]) & (pool.upper <= sort_key.TOP)[:, None]
    return keys.masked_fill(~inside, sort_key.NOWHERE)


def _columns(kernels: Kernels, query: Tensor, negative_keys: Tensor, pool: Pool) -> Tensor:
    """(B, M) int64: the number of each column in the pool, -1 for the others.

    Without bounds no score is computed, so columns with a NaN score are in the pool.
    """
    if not pool.is_bounded:
        return _allowed(query, negative_keys, pool)
    return sort_key.unpack(_sort_keys(kernels, query, negative_keys, pool))[1]


def _logsumexp(
    kernels: Kernels, query: Tensor, negative_keys: Tensor, scales: Tensor, pivot: Tensor | None, want_mean: bool,
    N: int, ranks: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    pool = Pool(*rest)
    mined: tuple[Tensor, ...] = ()
    if N:
        mined = _mine_hardest(kernels, query, negative_keys, N, False, *pool)[:2]
    bounds: tuple[Tensor, ...] = ()
    if ranks is not None:
        keys = _rank_thresholds(kernels, query, negative_keys, ranks, *pool)  # (B, 2)
        empty = (ranks[:, 1] < ranks[:, 0]) | (keys[:, 0] == sort_key.NOWHERE)  # (B,)
        bounds = (keys.masked_fill(empty[:, None], sort_key.NOWHERE),)
        pool = narrow(pool, *bounds[0].unbind(1))
    index = _columns(kernels, query, negative_keys, pool)
    lse, mean, num_kept, num_above, scores, column, sort_keys = list_logsumexp(
        kernels, query, negative_keys, scales, pivot, want_mean, 0, None, index, pool.bias, False
    )
    if pivot is not None and pool.is_bounded:  # num_above ignores the bounds
        allowed = _allowed(query, negative_keys, pool)
        above = gathered_scores(kernels, query, negative_keys, scales[0], allowed) > pivot[:, None]  # (B, M)
        num_above = ((allowed >= 0) & above).sum(1)
    return lse, mean, num_kept, num_above, *(mined or (scores, column)), *(bounds or (sort_keys,))


def _over_columns(op: str, kernels: Kernels, query: Tensor, negative_keys: Tensor, *arguments: Any) -> Any:
    """A sum over the columns of a pool, or its gradient. The pool is the end of `arguments`."""
    numbers, pool = arguments[: -len(Pool._fields)], Pool(*arguments[-len(Pool._fields) :])
    index = _columns(kernels, query, negative_keys, pool)
    return LIST_SUMS[op](kernels, query, negative_keys, *numbers, index, pool.bias, False)


def _mine_hardest(
    kernels: Kernels, query: Tensor, negative_keys: Tensor, N: int, want_count: bool, *pool: Any
) -> tuple[Tensor, ...]:
    keys = _sort_keys(kernels, query, negative_keys, Pool(*pool))  # (B, M)
    count = (keys != sort_key.NOWHERE).sum(1)[: len(query) if want_count else 0]
    keys = torch.nn.functional.pad(keys, (0, max(0, N - keys.shape[1])), value=sort_key.NOWHERE)
    return *sort_key.unpack(keys.topk(N, dim=1).values), count


def _rank_thresholds(kernels: Kernels, query: Tensor, negative_keys: Tensor, ranks: Tensor, *pool: Any) -> Tensor:
    keys = _sort_keys(kernels, query, negative_keys, Pool(*pool)).sort(dim=1, descending=True).values  # (B, M)
    keys = torch.nn.functional.pad(keys, (0, 1), value=sort_key.NOWHERE)  # (B, M + 1)
    return keys.gather(1, ranks.clamp(0, keys.shape[1] - 1)).masked_fill(ranks < 0, sort_key.NOWHERE)


def _count_negatives(kernels: Kernels, query: Tensor, negative_keys: Tensor, *pool: Any) -> Tensor:
    return (_columns(kernels, query, negative_keys, Pool(*pool)) >= 0).sum(1)


def _mix_logsumexp(
    kernels: Kernels,
    query: Tensor,
    negative_keys: Tensor,
    hard_index: Tensor,
    scale: Tensor,
    want_mean: bool,
    *draws: Any,
) -> tuple[Tensor, Tensor]:
    keys, rows = flat_rows(negative_keys, hard_index)
    return kernels.mix_logsumexp(query, keys, rows, scale, want_mean, *draws)


def over_own_keys(kernels: Kernels) -> Kernels:
    """The kernels of a loss, for keys (B, M, D). The gathered_* kernels are unchanged."""
    functions: dict[str, Any] = {
        "logsumexp": _logsumexp,
        "mine_hardest": _mine_hardest,
        "rank_thresholds": _rank_thresholds,
        "count_negatives": _count_negatives,
        "mix_logsumexp": _mix_logsumexp,
    }
    own = {op: partial(_over_columns, op, kernels) for op in LIST_SUMS}
    own |= {op: partial(function, kernels) for op, function in functions.items()}
    lists = {op: getattr(kernels, op) for op in LIST_OPS if kernels.has(op)}
    return Kernels(**own, **lists)


LIST_OPS = ("gathered_logsumexp", "gathered_grad_keys")


def choose_for_keys(
    caller: str,
    ops: tuple[str, ...],
    backend: str | None,
    tensors: tuple[Tensor, ...],
    keys: Tensor,
    pool: Pool,
    optional: str = "",
) -> Kernels | None:
    """backends.choose for keys (K, D) or (B, M, D) and their pool."""
    if keys.dim() == 2:
        return choose(caller, ops, backend, tensors, optional, pool.extra)
    kernels = choose(caller, tuple(dict.fromkeys((*ops, *LIST_OPS))), backend, tensors)
    return None if kernels is None else over_own_keys(kernels)
