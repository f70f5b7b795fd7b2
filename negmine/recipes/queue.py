"""Losses over the whole queue: MoCo, and decoupled losses, whose denominator does not have the positive."""

from typing import Any

from negmine.losses import InfoNCELoss, methods
from negmine.losses.methods import MethodLoss
from negmine.recipes.schedules import Number, Temperature


def moco_v1(temperature: Temperature = 0.07, **keywords: Any) -> InfoNCELoss:
    """MoCo: InfoNCE over the whole queue at T = 0.07.

        loss = -x_pos + log(exp(x_pos) + sum_j exp(x_j)),   x = s / T

    Parameters
    ----------
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of the paper.
    **keywords
        Other arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

    References
    ----------
    He et al. 2020 (arXiv 1911.05722; facebookresearch/moco moco/builder.py).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.moco_v1()(query, key, queue)
    """
    return InfoNCELoss(temperature, **keywords)


def moco_v2(temperature: Temperature = 0.2, **keywords: Any) -> InfoNCELoss:
    """MoCo v2: InfoNCE over the whole queue at T = 0.2. `moco_v1` has the formula.

    Parameters
    ----------
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of the published commands (``--moco-t 0.2``).
    **keywords
        Other arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

    References
    ----------
    Chen et al. 2020 (arXiv 2003.04297).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.moco_v2()(query, key, queue)
    """
    return InfoNCELoss(temperature, **keywords)


def decoupled(temperature: Temperature = 0.1, **keywords: Any) -> InfoNCELoss:
    """Decoupled contrastive learning (DCL): InfoNCE without the positive in the denominator.

        loss = -x_pos + log sum_j exp(x_j)

    Parameters
    ----------
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of the paper.
    **keywords
        Other arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

    Notes
    -----
    The loss may be negative. As in the formula of the paper, there is one log-sum-exp over all negatives.

    References
    ----------
    Yeh et al. 2021 (arXiv 2110.06848).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.decoupled()(query, key, queue)
    """
    return InfoNCELoss(temperature, decoupled=True, **keywords)


def decoupled_weighted(sigma: Number = 0.5, *, temperature: Temperature = 0.1, **keywords: Any) -> MethodLoss:
    """Decoupled contrastive learning with weighted positives (DCLW): a query has a larger weight if its positive is distant.

        loss_b = -w_b x_pos + log sum_j exp(x_j),   w_b = 2 - B softmax over the batch of (s_pos / sigma)

    Parameters
    ----------
    sigma : float, Tensor or schedule
        The temperature of the weights.
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of the paper.
    **keywords
        Other arguments of the loss: reduction, seed and backend.

    Returns
    -------
    MethodLoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

    Notes
    -----
    The weights of a batch add up to B and have no gradient. The DCLLoss of lightly is another loss: it adds two log-sum-exps.

    References
    ----------
    Yeh et al. 2021 (arXiv 2110.06848).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.decoupled_weighted()(query, key, queue)
    """
    return MethodLoss(methods.decoupled_weighted, temperature=temperature, sigma=sigma, **keywords)
