"""Detects false negatives: the columns that are similar to other views of the query's image. No score matrix is stored.

With top_k, the top_k columns of each view are mined and the lists are merged. This is exact, because a column that is in the
top_k by its largest score over the views is also in the top_k of the view with that score. With a threshold alone, the queue is
scored in pieces. The result is a (B, K) bool mask.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from negmine import reference
from negmine.ops import sort_key
from negmine.ops.backends import Kernels
from negmine.ops.pool import Pool, pieces, usable
from negmine.ops.vectors import for_kernels, widened
from negmine.options import FalseNegatives

PIECE = 1 << 22  # how many scores are in memory at one time if there is a threshold but no top_k


class FoundNegatives(NamedTuple):
    """The false negatives of each query: a mask, and also a list if top_k is set."""

    mask: Tensor  # (B, K) bool
    columns: Tensor | None  # (B, top_k) int64, -1 = empty entry


def find_false_negatives(
    kernels: Kernels, support: Tensor, negative_keys: Tensor, options: FalseNegatives, pool: Pool
) -> FoundNegatives:
    """The false negatives in the pool by support (B, V, D), as defined by reference.false_negatives_found."""
    if options.top_k is None:
        return FoundNegatives(_past_threshold(support, negative_keys, options, pool), None)
    (B, V, _), K = support.shape, negative_keys.shape[-2]
    N = min(options.top_k, K)
    if options.reduce == "max":
        views = support.unbind(1)  # V of (B, D)
    else:
        views = (widened(support).sum(1),)  # the sum gives the same ranking as the mean, and is exact more often
    mined = [kernels.mine_hardest(for_kernels(view), for_kernels(negative_keys), N, False, *pool)[:2] for view in views]
    scores, index = sort_key.unpack(_merged(mined, N))  # (B, N) each
    if options.reduce == "mean":
        scores = scores / V
    if options.threshold is not None:
        index = index.masked_fill(~(scores > options.threshold), -1)
    if not N:
        return FoundNegatives(torch.zeros(B, K, dtype=torch.bool, device=support.device), index)
    # The list is sorted and padded with -1. An empty entry writes the same value to the first column as the first entry does.
    has_any, first = index[:, :1] >= 0, index[:, :1].clamp_min(0)  # (B, 1) each
    column = torch.where(index < 0, first, index)  # (B, N)
    mask = torch.zeros(B, K, dtype=torch.bool, device=support.device).scatter(1, column, has_any.expand_as(column))
    return FoundNegatives(mask, index)


def _merged(mined: list[tuple[Tensor, Tensor]], N: int) -> Tensor:
    """Merge lists of scores and columns (B, N) into the N best distinct columns: sort keys (B, N) int64, hardest first."""
    keys = torch.cat([sort_key.pack(s, i.clamp_min(0)).masked_fill(i < 0, sort_key.NOWHERE) for s, i in mined], 1)
    if len(mined) > 1:
        keys = keys.sort(dim=1, descending=True).values  # (B, V N)
        column, cell = sort_key.unpack(keys)[1].sort(dim=1, stable=True)  # the best sort key of a column comes first
        is_repeated = torch.nn.functional.pad(column[:, 1:] == column[:, :-1], (1, 0))
        keys = keys.gather(1, cell).masked_fill(is_repeated, sort_key.NOWHERE)
    return keys.topk(N, dim=1).values


def _past_threshold(support: Tensor, negative_keys: Tensor, options: FalseNegatives, pool: Pool) -> Tensor:
    """(B, K) bool: the columns of the pool whose score passes the threshold."""
    assert options.threshold is not None  # FalseNegatives requires top_k or threshold
    support, (B, V), K = widened(support), support.shape[:2], negative_keys.shape[-2]
    found = torch.zeros(B, K, dtype=torch.bool, device=support.device)
    for part in pieces(B * V, K, PIECE):
        keys = widened(negative_keys[..., part, :])  # (C, D), or (B, C, D)
        found[:, part] = reference.found_scores(support, keys, options.reduce) > options.threshold
    allowed = usable(pool, support[:, 0], negative_keys)
    return found if allowed is None else found & allowed


def without(pool: Pool, found: Tensor) -> Pool:
    """The pool without the columns found (B, K)."""
    mask = ~found if pool.negative_mask is None else pool.negative_mask & ~found
    return pool._replace(negative_mask=mask)
