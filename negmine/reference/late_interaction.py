"""Late interaction: MaxSim scores of token matrices, and InfoNCE with these scores.

query (B, I, D), positive (B, J, D), documents (K, J, D); lengths: the number of tokens of each matrix, None = all rows
"""

from typing import Any

import torch
from torch import Tensor

from negmine.ops.vectors import disable_autocast
from negmine.options import Select
from negmine.reference.selection import multiplicity


def _present(vectors: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Token vectors with zeros past the length of each matrix, and a mask (rows, tokens) of the tokens past the length."""
    if lengths is None:
        return vectors, None
    absent = torch.arange(vectors.shape[1], device=vectors.device) >= lengths[:, None]
    return vectors.masked_fill(absent[:, :, None], 0.0), absent


def maxsim(
    query: Tensor, documents: Tensor, query_lengths: Tensor | None = None, document_lengths: Tensor | None = None
) -> Tensor:
    """(B, K): sum over the query's tokens of the largest inner product with a document token; -inf if it has no tokens."""
    (query, _), (documents, absent) = _present(query, query_lengths), _present(documents, document_lengths)
    with disable_autocast(query.device):
        inner = torch.einsum("bid,kjd->bkij", query, documents)  # (B, K, I, J)
    inner = inner if absent is None else inner.masked_fill(absent[:, None], -torch.inf)
    return inner.max(3).values.sum(2)


def maxsim_of_pairs(
    query: Tensor, documents: Tensor, query_lengths: Tensor | None = None, document_lengths: Tensor | None = None
) -> Tensor:
    """(B,): the score of each query with the document in the same row of documents (B, J, D)."""
    (query, _), (documents, absent) = _present(query, query_lengths), _present(documents, document_lengths)
    with disable_autocast(query.device):
        inner = torch.einsum("bid,bjd->bij", query, documents)  # (B, I, J)
    inner = inner if absent is None else inner.masked_fill(absent[:, None], -torch.inf)
    return inner.max(2).values.sum(1)


def late_interaction(
    query: Tensor,
    positive: Tensor,
    documents: Tensor,
    *,
    query_lengths: Tensor | None = None,
    positive_lengths: Tensor | None = None,
    document_lengths: Tensor | None = None,
    usable: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    select: Select | None = None,
    decoupled: bool = False,
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (B,) and the statistics of info_nce with MaxSim scores. usable is (B, K) bool, bias is (K,)."""
    if usable is not None:
        documents = torch.where(usable.any(0)[:, None, None], documents, 0.0)
    scores = maxsim(query, documents, query_lengths, document_lengths)  # (B, K)
    positive_score = maxsim_of_pairs(query, positive, query_lengths, positive_lengths)  # (B,)
    allowed = torch.ones_like(scores, dtype=torch.bool) if usable is None else usable
    if document_lengths is not None:
        allowed = allowed & (document_lengths > 0)
    kept = allowed
    if select is not None:
        kept = multiplicity(scores, positive_score, select, allowed, seed, step, row_offset) > 0
    x, x_positive = scores.masked_fill(~kept, 0.0) / temperature, positive_score / temperature
    x = (x if bias is None else x + bias.to(x.dtype)).masked_fill(~kept, -torch.inf)  # (B, K)
    has_negative = kept.any(1)  # (B,)
    columns = x if decoupled else torch.cat([x_positive[:, None], x], 1)
    finite = columns.masked_fill(~has_negative[:, None], 0.0)
    lse = finite.logsumexp(1) if finite.shape[1] else finite.sum(1)
    stats: dict[str, Any] = {
        "logsumexp": torch.where(has_negative, lse, -torch.inf if decoupled else x_positive).detach(),
        "positive_rank": (allowed & (scores > positive_score[:, None])).sum(1),
        "num_negatives": kept.sum(1),
        "clamped": torch.zeros_like(has_negative),
        "num_empty": (~has_negative).sum(),
    }
    return torch.where(has_negative, lse - x_positive, 0.0 * x_positive), stats
