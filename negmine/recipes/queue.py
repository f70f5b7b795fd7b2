"""The whole queue as negatives: MoCo, and the loss without the positive in its denominator."""

from typing import Any

from negmine.losses import InfoNCELoss, methods
from negmine.losses.methods import MethodLoss
from negmine.recipes.schedules import Number, Temperature


def moco_v1(temperature: Temperature = 0.07, **keywords: Any) -> InfoNCELoss:
    """MoCo (He et al. 2020, arXiv 1911.05722; facebookresearch/moco moco/builder.py): the whole queue, T = 0.07.

    loss = -x_pos + log(exp(x_pos) + sum_j exp(x_j)),   x = s / T
    """
    return InfoNCELoss(temperature, **keywords)


def moco_v2(temperature: Temperature = 0.2, **keywords: Any) -> InfoNCELoss:
    """MoCo v2 (Chen et al. 2020, arXiv 2003.04297; `--moco-t 0.2`): the loss of v1 at T = 0.2."""
    return InfoNCELoss(temperature, **keywords)


def decoupled(temperature: Temperature = 0.1, **keywords: Any) -> InfoNCELoss:
    """Decoupled contrastive learning, DCL (Yeh et al. 2021, arXiv 2110.06848): the positive leaves the denominator.

    loss = -x_pos + log sum_j exp(x_j), which may be negative. One log-sum-exp over all negatives, as in the paper's formula.
    """
    return InfoNCELoss(temperature, decoupled=True, **keywords)


def decoupled_weighted(sigma: Number = 0.5, *, temperature: Temperature = 0.1, **keywords: Any) -> MethodLoss:
    """DCL with weighted positives (Yeh et al. 2021, arXiv 2110.06848): see negmine/losses/methods.py, decoupled_weighted.

    loss_b = -(2 - B softmax_b(s_pos / sigma)) x_pos + log sum_j exp(x_j); the weights carry no gradient.
    """
    return MethodLoss(methods.decoupled_weighted, temperature=temperature, sigma=sigma, **keywords)
