"""False negatives: the columns that support views of a query's own image give away, found without a score matrix.

With top_k, each view mines its own hardest columns and the lists are merged, which is exact: a column among the top_k of the
largest view is among the top_k of that view. By threshold alone, the queue passes in pieces. What is found becomes a mask of one
byte a pair, 1/4 of the fp32 scores.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from negmine import order, reference
from negmine.backends import Launchers
from negmine.options import FalseNegatives
from negmine.pool import Pool, pieces, usable
from negmine.selection import for_kernels, working

PIECE = 1 << 22  # scores in memory at one time where the threshold stands alone


class Found(NamedTuple):
    """The false negatives of each query: a mask, and the same as a list where top_k bounds it."""

    mask: Tensor  # (B, K) bool
    columns: Tensor | None  # (B, top_k) int64, -1 = none


def find(ops: Launchers, support: Tensor, negative_keys: Tensor, options: FalseNegatives, pool: Pool) -> Found:
    """The columns of the pool that support (B, V, D) gives away; meaning as reference.false_negatives_found."""
    if options.top_k is None:
        return Found(_past_threshold(support, negative_keys, options, pool), None)
    (B, V, _), K = support.shape, negative_keys.shape[-2]
    N = min(options.top_k, K)
    if options.reduce == "max":
        views = support.unbind(1)  # V of (B, D)
    else:
        views = (working(support).sum(1),)  # a sum ranks as the mean does, and is exact more often
    mined = [ops.mine_hardest(for_kernels(view), for_kernels(negative_keys), N, *pool) for view in views]
    scores, index = order.unpack(_merged(mined, N))  # (B, N) each
    if options.reduce == "mean":
        scores = scores / V
    if options.threshold is not None:
        index = index.masked_fill(~(scores > options.threshold), -1)
    if not N:
        return Found(torch.zeros(B, K, dtype=torch.bool, device=support.device), index)
    # Hardest first, so -1 stands at the end: those cells write once more what the first one writes.
    some, first = index[:, :1] >= 0, index[:, :1].clamp_min(0)  # (B, 1) each
    at = torch.where(index < 0, first, index)  # (B, N)
    mask = torch.zeros(B, K, dtype=torch.bool, device=support.device).scatter(1, at, some.expand_as(at))
    return Found(mask, index)


def _merged(mined: list[tuple[Tensor, Tensor]], N: int) -> Tensor:
    """Lists of scores and columns, (B, N) each -> the N best distinct columns as places (B, N) int64, hardest first."""
    places = torch.cat([order.pack(s, i.clamp_min(0)).masked_fill(i < 0, order.NOWHERE) for s, i in mined], 1)
    if len(mined) > 1:
        places = places.sort(dim=1, descending=True).values  # (B, V N)
        column, cell = order.unpack(places)[1].sort(dim=1, stable=True)  # the best place of a column comes first
        again = torch.nn.functional.pad(column[:, 1:] == column[:, :-1], (1, 0))
        places = places.gather(1, cell).masked_fill(again, order.NOWHERE)
    return places.topk(N, dim=1).values


def _past_threshold(support: Tensor, negative_keys: Tensor, options: FalseNegatives, pool: Pool) -> Tensor:
    """(B, K) bool: the columns of the pool whose score passes the threshold."""
    assert options.threshold is not None  # FalseNegatives refuses neither of the two
    support, (B, V), K = working(support), support.shape[:2], negative_keys.shape[-2]
    found = torch.zeros(B, K, dtype=torch.bool, device=support.device)
    for part in pieces(B * V, K, PIECE):
        keys = working(negative_keys[..., part, :])  # (C, D), or (B, C, D)
        found[:, part] = reference.found_scores(support, keys, options.reduce) > options.threshold
    allowed = usable(pool, support[:, 0], negative_keys)
    return found if allowed is None else found & allowed


def without(pool: Pool, found: Tensor) -> Pool:
    """The pool less the columns found (B, K)."""
    mask = ~found if pool.negative_mask is None else pool.negative_mask & ~found
    return pool._replace(negative_mask=mask)
