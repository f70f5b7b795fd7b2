"""The whole queue as negatives: MoCo, and the loss without the positive in its denominator."""

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
        Divides the scores; as in the paper.
    **keywords
        Further arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss, to call with query, positive key, negatives and masks.

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
    """MoCo v2: the loss of MoCo at T = 0.2.

    Parameters
    ----------
    temperature : float, Tensor or schedule
        Divides the scores; `--moco-t 0.2` of the public code.
    **keywords
        Further arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss, to call with query, positive key, negatives and masks.

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
    """Decoupled contrastive learning (DCL): the positive leaves the denominator.

        loss = -x_pos + log sum_j exp(x_j)

    Parameters
    ----------
    temperature : float, Tensor or schedule
        Divides the scores; as in the paper.
    **keywords
        Further arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss, to call with query, positive key, negatives and masks.

    Notes
    -----
    The loss may be negative. There is one log-sum-exp over all negatives, as in the paper's formula.

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
    """Decoupled contrastive learning with weighted positives (DCLW): queries whose positive is still far weigh more.

        loss_b = -w_b x_pos + log sum_j exp(x_j),   w_b = 2 - B softmax over the batch of (s_pos / sigma)

    Parameters
    ----------
    sigma : float, Tensor or schedule
        The temperature of the weights.
    temperature : float, Tensor or schedule
        Divides the scores; as in the paper.
    **keywords
        Further arguments of `MethodLoss`, such as reduction, seed or backend.

    Returns
    -------
    MethodLoss
        The loss, to call with query, positive key, negatives and masks.

    Notes
    -----
    The weights of a batch add up to B and carry no gradient. lightly's DCLLoss adds two log-sum-exps, which is another
    loss.

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
