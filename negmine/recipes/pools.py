"""Which pairs are negatives: those of the batch on both sides."""

from typing import Any

from negmine.losses import methods
from negmine.losses.methods import MethodLoss
from negmine.recipes.schedules import Number, Temperature


def qwen3_embedding(margin: Number = 0.1, *, temperature: Temperature = 0.02, **keywords: Any) -> MethodLoss:
    """Qwen3-Embedding's loss: in-batch pairs of queries and of documents join the denominator, under a mask.

        Z_i = sum over j != i of m e^(s(q_i, d_j) / T) + m e^(s(q_i, q_j) / T) + m e^(s(d_i, d_j) / T) + hard negatives
        m = 0 where s > s(q_i, d_i) + margin or d_j = d_i, else 1

    Parameters
    ----------
    margin : float or schedule
        How far above the positive's score a negative may lie; 0.1 in the paper.
    temperature : float, Tensor or schedule
        Divides the scores. The default is ours.
    **keywords
        Further arguments of the loss: reduction and backend.

    Returns
    -------
    MethodLoss
        The loss, to call with query, positive key, and hard negatives (B, M, D), another pool, or None for the batch only.
        Pass query_ids or query_labels that are equal for equal documents.

    References
    ----------
    Zhang et al. 2025 (arXiv 2506.05176).

    Examples
    --------
    >>> query, key, hard = torch.randn(8, 16), torch.randn(8, 16), torch.randn(8, 4, 16)
    >>> negmine.recipes.qwen3_embedding()(query, key, hard).shape
    torch.Size([])
    """
    return MethodLoss(methods.both_sides, temperature=temperature, margin=margin, **keywords)


def gte(*, temperature: Temperature = 0.01, **keywords: Any) -> MethodLoss:
    """GTE's improved contrastive loss: in-batch pairs of queries, of documents, and of documents with queries.

        Z_i = sum over j of e^(s(q_i, d_j) / T) + sum over j != i of e^(s(q_i, q_j) / T)
              + sum over j != i of (e^(s(q_j, d_i) / T) + e^(s(d_i, d_j) / T))

    Parameters
    ----------
    temperature : float, Tensor or schedule
        Divides the scores; 0.01 in the paper.
    **keywords
        Further arguments of the loss: reduction and backend.

    Returns
    -------
    MethodLoss
        The loss, to call as that of `qwen3_embedding`.

    Notes
    -----
    The paper's third sum includes j = i, so its denominator contains the positive twice. Here it is contained once.

    References
    ----------
    Li et al. 2023 (arXiv 2308.03281).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> negmine.recipes.gte()(query, key).shape
    torch.Size([])
    """
    return MethodLoss(methods.both_sides, temperature=temperature, margin=None, document_query=True, **keywords)
