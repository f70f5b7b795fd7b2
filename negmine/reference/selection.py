"""Scores, rankings, and the columns that `Select` keeps.

query (B, D), positive_key (B, D), negative_keys (K, D) shared by all queries or (B, M, D) with M keys for each query
usable (B, K) bool: the columns that the masks allow (from negmine/ops/pool.py); None = all columns
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine.ops import philox
from negmine.ops.vectors import disable_autocast
from negmine.options import Guide, Select


def scores_of(query: Tensor, negative_keys: Tensor, usable: Tensor | None = None) -> Tensor:
    """Inner products (B, K) of query (B, D) with keys (K, D) or (B, K, D).

    Pairs that are not usable (B, K) have score 0. The values of their keys, NaN included, do not affect scores or gradients.
    """
    with disable_autocast(query.device):
        if negative_keys.dim() == 3:
            if usable is not None:
                negative_keys = torch.where(usable[:, :, None], negative_keys, 0.0)
            return torch.einsum("bd,bkd->bk", query, negative_keys)
        if usable is None:
            return query @ negative_keys.T
        # In backward, a gradient of 0 times a key that is not finite would be NaN for queries that do not use the key. So such a
        # key is replaced by zeros, and its score is added without gradient. For a query that uses the key, the loss is not finite
        # anyway, and so its gradient is NaN.
        finite = negative_keys.isfinite().all(1)  # (K,)
        scores = query @ torch.where(finite[:, None], negative_keys, 0.0).T  # (B, K)
        detached = query.detach() @ negative_keys.detach().T  # (B, K)
        return (scores + detached.masked_fill(finite, 0.0)).masked_fill(~usable, 0.0)


def row_logsumexp(x: Tensor) -> Tensor:
    """The log-sum-exp of each row: x (B, columns) -> (B,).

    The maximum is subtracted first, so that in the gradient the softmax sums to 1 even if x is large. The gradient of
    torch.logsumexp alone is exp(x - lse) with a rounded lse.
    """
    if x.shape[1] == 0:
        return x.logsumexp(1)
    highest = x.detach().amax(1, keepdim=True)  # (B, 1)
    shift = highest.masked_fill(~highest.isfinite(), 0.0)
    return (x - shift).logsumexp(1) + shift[:, 0]


def ranking(scores: Tensor, usable: Tensor | None) -> tuple[Tensor, Tensor]:
    """The columns of each row, candidates before others and hardest first: index (B, K), and the number of candidates (B,)."""
    scores = scores.detach()
    pool = ~scores.isnan() if usable is None else usable & ~scores.isnan()  # (B, K)
    index = scores.argsort(dim=1, descending=True, stable=True)  # (B, K)
    outside_last = (~pool).gather(1, index).byte().argsort(dim=1, stable=True)  # (B, K)
    return index.gather(1, outside_last), pool.sum(1)


def mine_hardest(query: Tensor, negative_keys: Tensor, N: int, usable: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The N hardest columns of each pool: scores (B, N), descending, and index (B, N) int64; (-inf, -1) past its end."""
    scores = scores_of(query, negative_keys)  # (B, K)
    index, count = ranking(scores, usable)
    index = F.pad(index[:, :N], (0, max(0, N - index.shape[1])))  # (B, N)
    present = torch.arange(N, device=index.device) < count[:, None]  # (B, N)
    if scores.shape[1]:
        scores = scores.gather(1, index)
    else:
        scores = scores.new_zeros(index.shape)
    return scores.masked_fill(~present, -torch.inf), index.masked_fill(~present, -1)


def rank_thresholds(query: Tensor, negative_keys: Tensor, ranks: Tensor, usable: Tensor | None = None) -> Tensor:
    """The score at each rank (0 = highest score): ranks (B, R) int64 -> (B, R), -inf past the end of the pool."""
    K = negative_keys.shape[-2]
    scores, _ = mine_hardest(query, negative_keys, K + 1, usable)  # (B, K + 1), the last column is past the end
    return scores.gather(1, ranks.clamp(0, K)).masked_fill(ranks < 0, -torch.inf)


def quantile(query: Tensor, negative_keys: Tensor, q: Tensor, usable: Tensor | None = None) -> Tensor:
    """q (R,) in [0, 1] -> (B, R): quantiles of each pool with the linear interpolation of torch.quantile; NaN if it is empty.

    A NaN score is a member of the pool and ranks below all other scores, so the low quantiles of its row are NaN.
    """
    scores, index = mine_hardest(query, negative_keys, negative_keys.shape[-2] + 1, usable)  # (B, K + 1)
    scores = scores.masked_fill(index < 0, torch.nan)
    everything = torch.full_like(scores[:, :1], negative_keys.shape[-2], dtype=torch.long)  # (B, 1)
    count = everything if usable is None else usable.sum(1, keepdim=True)
    position = (count - 1).clamp_min(0).double() * q.double()  # (B, R) ascending, between two neighbours
    below, above = (
        (count - 1 - position.floor().long()),
        (count - 1 - position.ceil().long()),
    )  # (B, R) descending ranks
    weight = position.frac().to(scores.dtype)
    return torch.lerp(scores.gather(1, below.clamp_min(0)), scores.gather(1, above.clamp_min(0)), weight)


def filtered(scores: Tensor, positive_score: Tensor | None, select: Select, usable: Tensor | None) -> Tensor:
    """The pool (B, K) bool after masks and score filters. A score equal to a limit is kept; NaN passes no filter."""
    pool = torch.ones_like(scores, dtype=torch.bool) if usable is None else usable
    if select.has_filter:
        pool = pool & ~scores.isnan()
    if select.min_score is not None:
        pool = pool & (scores >= select.min_score)
    if select.max_score is not None or select.has_margin:
        anchor = scores.new_zeros(len(scores)) if positive_score is None else positive_score.detach()
        pool = pool & (scores <= select.highest_score(anchor)[:, None])
    return pool


def guide_mask(guide: Guide) -> Tensor:
    """(B, K) bool: the columns that a guide does not mask."""
    score = scores_of(guide.query, guide.positive if guide.keys is None else guide.keys)  # (B, K)
    positive = (guide.query * guide.positive).sum(1)  # (B,)
    distance = positive.abs() * guide.margin if guide.relative else guide.margin
    return ~(score > (positive - distance)[:, None])


def multiplicity(
    scores: Tensor,
    positive_score: Tensor | None,
    select: Select,
    usable: Tensor | None,
    seed: int,
    step: int | Tensor,
    row_offset: int | Tensor,
) -> Tensor:
    """How often each column is kept: (B, K) int64, 0 or 1, or more if it is drawn with replacement."""
    scores = scores.detach()
    B, K = scores.shape
    pool = filtered(scores, positive_score, select, usable)
    index, candidates = ranking(scores, pool)  # (B, K), (B,)
    first, end = select.window(pool.sum(1))  # (B,), (B,)
    end = end.minimum(candidates)
    rank = torch.arange(K, device=scores.device)  # (K,)
    kept = ((rank >= first[:, None]) & (rank < end[:, None])).long()  # (B, K) in rank order
    if select.sample is not None and K:
        rows = torch.arange(B, device=scores.device) + row_offset  # (B,)
        count = (end - first).clamp_min(0)  # (B,)
        drawn = philox.sample(
            count, K, select.sample, select.replace, rows, seed, step
        )  # (B, sample) members of the window
        ranks = (first[:, None] + drawn).clamp(0, K - 1)  # (B, sample)
        kept = torch.zeros_like(kept).scatter_add(1, ranks, (drawn >= 0).long())
    return torch.zeros_like(kept).scatter(1, index, kept)
