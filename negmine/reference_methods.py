"""Definitions that methods are built from, in the manner of negmine/reference.py: dense, differentiable, unchecked.

query (B, D), negative_keys (K, D); usable (B, K) bool or None; positive_score (B,) where select has a margin
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine import reference
from negmine.options import Select


def kept_scores(
    query: Tensor,
    negative_keys: Tensor,
    usable: Tensor | None,
    positive_score: Tensor | None,
    select: Select | None,
    draw: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """scores (B, K) and how often each column is kept (B, K) int64; draw = seed, step, row_offset of select.sample."""
    scores = reference.scores_of(query, negative_keys)  # (B, K)
    if select is not None:
        return scores, reference.multiplicity(scores, positive_score, select, usable, *draw)
    times = torch.ones_like(scores, dtype=torch.int64) if usable is None else usable.long()
    return scores, times


def logsumexp(
    query: Tensor,
    negative_keys: Tensor,
    temperature: Tensor | float,
    usable: Tensor | None = None,
    positive_score: Tensor | None = None,
    select: Select | None = None,
    draw: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """(B,): log of the sum over each pool of exp(s / temperature); -inf, without gradient, where the pool is empty."""
    scores, times = kept_scores(query, negative_keys, usable, positive_score, select, draw)
    some = (times > 0).any(1)  # (B,)
    x = (scores / temperature + times.to(scores.dtype).log()).masked_fill(times == 0, -torch.inf)  # (B, K)
    lse = F.pad(x, (0, 1), value=-torch.inf).masked_fill(~some[:, None], 0.0).logsumexp(1)  # no column is no error
    return lse.masked_fill(~some, -torch.inf)


def softplus_sum(
    query: Tensor,
    negative_keys: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    usable: Tensor | None = None,
    positive_score: Tensor | None = None,
    select: Select | None = None,
    draw: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """(B,): sum over each pool of log(1 + exp(scale s + bias)); 0 where the pool is empty."""
    scores, times = kept_scores(query, negative_keys, usable, positive_score, select, draw)
    each = -F.logsigmoid(-(scale * scores + bias))  # (B, K)
    return (each.masked_fill(times == 0, 0.0) * times).sum(1)
