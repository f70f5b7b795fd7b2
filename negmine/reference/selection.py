"""Scores, rankings and what `Select` keeps of them.

query (B, D), positive_key (B, D), negative_keys (K, D) shared by all queries or (B, M, D) each query's own
usable (B, K) bool: what the masks leave (negmine/ops/pool.py makes it); None = everything
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine.ops import philox
from negmine.ops.vectors import disable_autocast
from negmine.options import Guide, Select


def scores_of(query: Tensor, negative_keys: Tensor, usable: Tensor | None = None) -> Tensor:
    """Inner products (B, K) of query (B, D) with shared (K, D) or own (B, K, D) keys.

    usable (B, K) bool: other pairs score 0, and what their keys hold, NaN included, reaches neither scores nor gradients.
    """
    with disable_autocast(query.device):
        if negative_keys.dim() == 3:
            if usable is not None:
                negative_keys = torch.where(usable[:, :, None], negative_keys, 0.0)
            return torch.einsum("bd,bkd->bk", query, negative_keys)
        if usable is None:
            return query @ negative_keys.T
        # A gradient of 0 times a key that is not finite is NaN. Where a query sees such a key, its loss is not finite, and so its
        # gradient is NaN whatever the key: zeros will do.
        finite = negative_keys.isfinite().all(1)  # (K,)
        scores = query @ torch.where(finite[:, None], negative_keys, 0.0).T  # (B, K)
        lost = query.detach() @ negative_keys.detach().T  # (B, K)
        return (scores + lost.masked_fill(finite, 0.0)).masked_fill(~usable, 0.0)


def row_logsumexp(x: Tensor) -> Tensor:
    """x (B, columns) -> (B,). Its softmax sums to 1 however large x is, where torch's is exp(x - lse) of a rounded lse."""
    if x.shape[1] == 0:
        return x.logsumexp(1)
    highest = x.detach().amax(1, keepdim=True)  # (B, 1)
    shift = highest.masked_fill(~highest.isfinite(), 0.0)
    return (x - shift).logsumexp(1) + shift[:, 0]


def ranking(scores: Tensor, usable: Tensor | None) -> tuple[Tensor, Tensor]:
    """Columns of each row, candidates first and hardest first: index (B, K), number of candidates (B,)."""
    scores = scores.detach()
    pool = ~scores.isnan() if usable is None else usable & ~scores.isnan()  # (B, K)
    index = scores.argsort(dim=1, descending=True, stable=True)  # (B, K)
    outside_last = (~pool).gather(1, index).byte().argsort(dim=1, stable=True)  # (B, K)
    return index.gather(1, outside_last), pool.sum(1)


def mine_hardest(query: Tensor, negative_keys: Tensor, N: int, usable: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """scores (B, N) descending, index (B, N) int64; (-inf, -1) past the end of the pool."""
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
    """The score at each 0-based descending rank: ranks (B, R) int64 -> (B, R), -inf past the end of the pool."""
    K = negative_keys.shape[-2]
    scores, _ = mine_hardest(query, negative_keys, K + 1, usable)  # (B, K + 1), the last column past every end
    return scores.gather(1, ranks.clamp(0, K)).masked_fill(ranks < 0, -torch.inf)


def quantile(query: Tensor, negative_keys: Tensor, q: Tensor, usable: Tensor | None = None) -> Tensor:
    """q (R,) in [0, 1] -> (B, R): torch.quantile's linear interpolation over each row's pool; NaN for an empty pool.

    A NaN score counts in the pool and lies below everything: the low quantiles of its row are NaN.
    """
    scores, index = mine_hardest(query, negative_keys, negative_keys.shape[-2] + 1, usable)  # (B, K + 1)
    scores = scores.masked_fill(index < 0, torch.nan)
    everything = torch.full_like(scores[:, :1], negative_keys.shape[-2], dtype=torch.long)  # (B, 1)
    count = everything if usable is None else usable.sum(1, keepdim=True)
    place = (count - 1).clamp_min(0).double() * q.double()  # (B, R) ascending, between two neighbours
    below, above = (count - 1 - place.floor().long()), (count - 1 - place.ceil().long())  # (B, R) descending ranks
    weight = place.frac().to(scores.dtype)
    return torch.lerp(scores.gather(1, below.clamp_min(0)), scores.gather(1, above.clamp_min(0)), weight)


def filtered(scores: Tensor, positive_score: Tensor | None, select: Select, usable: Tensor | None) -> Tensor:
    """The pool (B, K) bool that the masks and the score filters leave; equality keeps, and NaN passes no filter."""
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
    """(B, K) bool: what a guide with keys leaves usable."""
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
    """How often each column is kept: (B, K) int64, 0 or 1, and more only when drawn with replacement."""
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
        at = (first[:, None] + drawn).clamp(0, K - 1)  # (B, sample) ranks
        kept = torch.zeros_like(kept).scatter_add(1, at, (drawn >= 0).long())
    return torch.zeros_like(kept).scatter(1, index, kept)
