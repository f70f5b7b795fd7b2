"""Losses whose negatives are also pairs of two queries and pairs of two documents of the batch."""

from typing import Any

from negmine.losses import methods
from negmine.losses.methods import MethodLoss
from negmine.recipes.schedules import Number, Temperature


def qwen3_embedding(margin: Number = 0.1, *, temperature: Temperature = 0.02, **keywords: Any) -> MethodLoss:
    """The loss of Qwen3-Embedding: InfoNCE whose denominator also has pairs of two queries and of two documents, with a mask.

        loss_i = -log(e^(s(q_i, d_i) / T) / (e^(s(q_i, d_i) / T) + Z_i))
        Z_i = sum over j != i of m e^(s(q_i, d_j) / T) + m e^(s(q_i, q_j) / T) + m e^(s(d_i, d_j) / T)
              + sum over the hard negatives n of m e^(s(q_i, n) / T)
        m = 0 if the score of the pair is above s(q_i, d_i) + margin, or if d_j = d_i; else 1

    Parameters
    ----------
    margin : float or schedule
        Negatives that score more than this above the positive are masked. The default is that of the paper.
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is not from the paper.
    **keywords
        Other arguments of the loss: reduction and backend.

    Returns
    -------
    MethodLoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, where `negative_keys` are hard negatives (B, M, D),
        other negatives, or None if there are only those of the batch. If documents may occur twice in a batch, pass
        ``query_ids`` or ``query_labels`` that are equal for equal documents.

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
    """The improved contrastive loss of GTE: InfoNCE whose denominator has all in-batch pairs of queries and documents.

        loss_i = -log(e^(s(q_i, d_i) / T) / Z_i)
        Z_i = sum over j of e^(s(q_i, d_j) / T) + sum over j != i of e^(s(q_i, q_j) / T)
              + sum over j != i of (e^(s(q_j, d_i) / T) + e^(s(d_i, d_j) / T))

    Parameters
    ----------
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of the paper.
    **keywords
        Other arguments of the loss: reduction and backend.

    Returns
    -------
    MethodLoss
        The loss. Call it like that of `qwen3_embedding`.

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
