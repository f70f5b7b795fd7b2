"""Log-sum-exps and sums of softplus over each query's pool, and log-sum-exps over lists of columns.

query (B, D), negative_keys (K, D); usable (B, K) bool or None; positive_score (B,), needed if select has a margin
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine.options import Select
from negmine.reference.selection import multiplicity, row_logsumexp, scores_of

Draw = tuple[int, int | Tensor, int | Tensor]  # seed, step, row_offset


def kept_scores(
    query: Tensor,
    negative_keys: Tensor,
    usable: Tensor | None,
    positive_score: Tensor | None,
    select: Select | None,
    draw: Draw,
) -> tuple[Tensor, Tensor]:
    """scores (B, K) and how often each column is kept (B, K) int64. draw: seed, step and row_offset for select.sample."""
    scores = scores_of(query, negative_keys, usable)  # (B, K)
    if select is not None:
        return scores, multiplicity(scores, positive_score, select, usable, *draw)
    times = torch.ones_like(scores, dtype=torch.int64) if usable is None else usable.long()
    return scores, times


def logsumexp(
    query: Tensor,
    negative_keys: Tensor,
    temperature: Tensor | float,
    usable: Tensor | None = None,
    positive_score: Tensor | None = None,
    select: Select | None = None,
    draw: Draw = (0, 0, 0),
    key_bias: Tensor | None = None,
) -> Tensor:
    """(B,): log of the sum over each pool of exp(s / temperature + key_bias); -inf, without gradient, if the pool is empty.

    key_bias is (K,) or (B, M).
    """
    scores, times = kept_scores(query, negative_keys, usable, positive_score, select, draw)
    not_empty = (times > 0).any(1)  # (B,)
    logits = scores / temperature if key_bias is None else scores / temperature + key_bias.to(scores.dtype)  # (B, K)
    x = (logits + times.to(scores.dtype).log()).masked_fill(times == 0, -torch.inf)  # (B, K)
    return row_logsumexp(x.masked_fill(~not_empty[:, None], 0.0)).masked_fill(~not_empty, -torch.inf)


def softplus_sum(
    query: Tensor,
    negative_keys: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    usable: Tensor | None = None,
    positive_score: Tensor | None = None,
    select: Select | None = None,
    draw: Draw = (0, 0, 0),
    key_bias: Tensor | None = None,
) -> Tensor:
    """(B,): sum over each pool of log(1 + exp(scale s + bias + key_bias)); 0 if the pool is empty. key_bias: (K,) or (B, M)."""
    scores, times = kept_scores(query, negative_keys, usable, positive_score, select, draw)
    logits = scale * scores + bias  # (B, K)
    each = -F.logsigmoid(-(logits if key_bias is None else logits + key_bias.to(logits.dtype)))  # (B, K)
    return (each.masked_fill(times == 0, 0.0) * times).sum(1)


def gathered_logsumexp(
    query: Tensor, negative_keys: Tensor, index: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B, M) of the listed columns, their log-sum-exp (B,), and the mean of their keys weighted by the softmax (B, D).

    index (B, M): -1 is an empty entry, and a column that occurs twice counts twice.
    """
    absent = index < 0  # (B, M)
    rows = negative_keys[index.clamp_min(0)].masked_fill(absent[:, :, None], 0.0)  # (B, M, D)
    scores = scores_of(query, rows).masked_fill(absent, -torch.inf)  # (B, M)
    lse = row_logsumexp((scale * scores).masked_fill(absent, -torch.inf))  # (B,)
    p = (scale * scores - lse[:, None]).exp().masked_fill(absent, 0.0)  # (B, M)
    return scores, lse, torch.einsum("bm,bmd->bd", p, rows)


def gathered_grad_keys(query: Tensor, index: Tensor, weight: Tensor, K: int) -> Tensor:
    """(K, D): row k = sum of weight_bm query_b over the entries of index (B, M) that are k. weight is (B, M)."""
    equal = index[:, :, None] == torch.arange(K, device=index.device)  # (B, M, K)
    return torch.einsum("bmk,bd->kd", weight[:, :, None].where(equal, 0.0), query)
