"""Columns by name: a list (B, M) of what each query keeps, where a pool describes it by masks and bounds.

`listed(ops)` and `own(ops)` stand in for the kernels `ops`, so that whatever is written for pools serves both:

    listed   sums take (index, False) in the place of a pool; index (B, M) int64, -1 = no column, repeats count
    own      negative_keys are (B, M, D), each query's own, under a pool of M columns

The scores (B, M) of a list are as small as the list, and the vectors (B, M, D) are never all gathered into memory.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine import order, reference
from negmine.backends import Launchers, in_two, one_by_one
from negmine.pool import Pool, pieces, usable
from negmine.reference_triplets import rows_at

PIECE = 1 << 20  # numbers of gathered vectors in memory at one time


def rows_of(negative_keys: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Keys as one matrix and the list in its rows: (K, D) as they are, (B, M, D) as (B M, D)."""
    if negative_keys.dim() == 2:
        return negative_keys, index
    B, M, D = negative_keys.shape
    first = torch.arange(B, device=index.device)[:, None] * M  # (B, 1)
    return negative_keys.reshape(B * M, D), torch.where(index < 0, -1, index + first)


def scores_at(ops: Launchers, query: Tensor, negative_keys: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """(B, M) fp32, -inf where the list names no column."""
    keys, rows = rows_of(negative_keys, index)
    return ops.listed_logsumexp(query, keys, rows, scale, False)[0]


def _logsumexp(ops, query, negative_keys, scale, pivot, want_mean, index, _same_label):
    keys, rows = rows_of(negative_keys, index)
    scores, lse, mean = ops.listed_logsumexp(query, keys, rows, scale, want_mean)
    present = index >= 0  # (B, M)
    above = torch.zeros_like(present) if pivot is None else present & (scores > pivot[:, None])
    return lse, mean, present.sum(1), above.sum(1)


def _logsumexp_grad_keys(ops, query, negative_keys, scale, lse, weight, index, _same_label):
    keys, rows = rows_of(negative_keys, index)
    scores = ops.listed_logsumexp(query, keys, rows, scale, False)[0]  # (B, M)
    p = (scale * scores - lse[:, None]).exp().masked_fill(index < 0, 0.0)  # (B, M)
    return ops.listed_grad_keys(query, rows, p * weight[:, None], keys.shape[0]).view(negative_keys.shape)


def _softplus_sum(ops, query, negative_keys, scale, bias, want_pull, index, _same_label):
    absent = index < 0  # (B, M)
    x = scale * scores_at(ops, query, negative_keys, scale, index).masked_fill(absent, 0.0) + bias  # (B, M)
    sigmoid = x.sigmoid().masked_fill(absent, 0.0)  # (B, M)
    pull = x.new_zeros(len(query) if want_pull else 0, query.shape[1])
    for b in pieces(index.shape[1] * query.shape[1], len(pull), PIECE):
        with reference.unshortened(query.device):
            pull[b] = torch.einsum("bm,bmd->bd", sigmoid[b], rows_at(negative_keys, index[b], x.dtype))
    return (-F.logsigmoid(-x)).masked_fill(absent, 0.0).sum(1), pull, sigmoid.sum(1), (~absent).sum(1)


def _softplus_sum_grad_keys(ops, query, negative_keys, scale, bias, weight, index, _same_label):
    scores = scores_at(ops, query, negative_keys, scale, index)  # (B, M)
    sigmoid = (scale * scores + bias).sigmoid()  # (B, M)
    return ops.listed_grad_keys(query, index, sigmoid * weight[:, None], negative_keys.shape[0])


def listed(ops: Launchers) -> Launchers:
    """The sums over the columns in a list."""
    logsumexp = partial(_logsumexp, ops)
    return Launchers(
        logsumexp=logsumexp,
        logsumexp_pair=in_two(logsumexp),
        logsumexp_grad_keys=partial(_logsumexp_grad_keys, ops),
        softplus_sum=partial(_softplus_sum, ops),
        softplus_sum_grad_keys=partial(_softplus_sum_grad_keys, ops),
    )


def _allowed(query: Tensor, negative_keys: Tensor, pool: Pool) -> Tensor:
    """(B, M) int64: every column that the masks leave, under its own number; -1 elsewhere."""
    column = torch.arange(negative_keys.shape[1], device=query.device)  # (M,)
    mask = usable(pool, query, negative_keys)
    return column.expand(negative_keys.shape[:2]) if mask is None else torch.where(mask, column, -1)


def _ranked(ops, query, negative_keys, pool) -> Tensor:
    """(B, M) int64 order of every place of the pool, NOWHERE elsewhere."""
    index = _allowed(query, negative_keys, pool)
    one = torch.ones((), dtype=torch.float32, device=query.device)
    scores = scores_at(ops, query, negative_keys, one, index)  # (B, M)
    place = order.pack(scores, index.clamp_min(0))  # (B, M)
    inside = (index >= 0) & ~scores.isnan()
    if pool.lower is not None:
        inside = inside & (place >= pool.lower[:, None]) & (pool.lower != order.NOWHERE)[:, None]
    if pool.upper is not None:
        # A bound of NaN, the margin below a positive that is NaN, lies above every place and keeps none.
        inside = inside & (place <= pool.upper[:, None]) & (pool.upper <= order.TOP)[:, None]
    return place.masked_fill(~inside, order.NOWHERE)


def _own_columns(ops, query, negative_keys, pool) -> Tensor:
    """(B, M) int64: the columns of the pool, -1 elsewhere; without bounds no score is computed and NaN scores stay."""
    if pool.lower is None and pool.upper is None:
        return _allowed(query, negative_keys, pool)
    return order.unpack(_ranked(ops, query, negative_keys, pool))[1]


def _own_logsumexp(ops, query, negative_keys, scale, pivot, want_mean, *pool):
    pool = Pool(*pool)
    index = _own_columns(ops, query, negative_keys, pool)
    lse, mean, kept, above = _logsumexp(ops, query, negative_keys, scale, pivot, want_mean, index, False)
    if pivot is not None and (pool.lower is not None or pool.upper is not None):  # above looks past the bounds
        allowed = _allowed(query, negative_keys, pool)
        above = ((allowed >= 0) & (scores_at(ops, query, negative_keys, scale, allowed) > pivot[:, None])).sum(1)
    return lse, mean, kept, above


def _own_logsumexp_grad_keys(ops, query, negative_keys, scale, lse, weight, *pool):
    index = _own_columns(ops, query, negative_keys, Pool(*pool))
    return _logsumexp_grad_keys(ops, query, negative_keys, scale, lse, weight, index, False)


def _own_mine_hardest(ops, query, negative_keys, N, *pool):
    place = _ranked(ops, query, negative_keys, Pool(*pool))
    place = torch.nn.functional.pad(place, (0, max(0, N - place.shape[1])), value=order.NOWHERE)
    return order.unpack(place.topk(N, dim=1).values)


def _own_rank_thresholds(ops, query, negative_keys, ranks, *pool):
    place = _ranked(ops, query, negative_keys, Pool(*pool)).sort(dim=1, descending=True).values  # (B, M)
    place = torch.nn.functional.pad(place, (0, 1), value=order.NOWHERE)  # (B, M + 1)
    return place.gather(1, ranks.clamp(0, place.shape[1] - 1)).masked_fill(ranks < 0, order.NOWHERE)


def _own_count_negatives(ops, query, negative_keys, *pool):
    return (_own_columns(ops, query, negative_keys, Pool(*pool)) >= 0).sum(1)


def _own_mix_logsumexp(ops, query, negative_keys, hard_index, scale, want_mean, *draws):
    keys, rows = rows_of(negative_keys, hard_index)
    return ops.mix_logsumexp(query, keys, rows, scale, want_mean, *draws)


def own(ops: Launchers) -> Launchers:
    """The ops of a loss over keys that are each query's own."""
    logsumexp, mine_hardest = partial(_own_logsumexp, ops), partial(_own_mine_hardest, ops)
    return ops._replace(
        info_nce=None,
        logsumexp_window=None,
        logsumexp=logsumexp,
        logsumexp_pair=in_two(logsumexp),
        logsumexp_mine=one_by_one(logsumexp, mine_hardest),
        logsumexp_grad_keys=partial(_own_logsumexp_grad_keys, ops),
        mine_hardest=mine_hardest,
        rank_thresholds=partial(_own_rank_thresholds, ops),
        count_negatives=partial(_own_count_negatives, ops),
        mix_logsumexp=partial(_own_mix_logsumexp, ops),
    )
