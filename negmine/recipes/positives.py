"""More than one positive: labels, false negatives, and the sigmoid loss that treats each pair alone."""

from typing import Any

from negmine.losses import InfoNCELoss, SupConLoss
from negmine.losses.siglip import SigLIPLoss
from negmine.options import FalseNegatives
from negmine.recipes.schedules import Number, Temperature, scheduled


def sup_con(positives: str = "out", *, temperature: Temperature = 0.07, **keywords: Any) -> SupConLoss:
    """SupCon (Khosla et al. 2020, arXiv 2004.11362; HobbitLong/SupContrast losses.py): every key of the same label attracts.

    positives="out" takes the mean outside the logarithm, which the paper found far better than "in". Against a queue, give it the
    current keys and the queue concatenated, as zhangyifei01/MoCo-v2-SupContrast does; label -1 is unknown.
    """
    return SupConLoss(temperature, positives=positives, **keywords)


def false_negative_cancellation(
    top_k: int | None = 10,
    threshold: Number | None = 0.7,
    *,
    mode: str = "eliminate",
    reduce: str = "max",
    temperature: Temperature = 0.1,
    **keywords: Any,
) -> InfoNCELoss:
    """False negative cancellation (Huynh et al., arXiv 2011.11765; google-research/fnc objective.py). Call with support=views.

    The public code has attraction only; elimination, the default here, is the safer one with one key an image in a queue.
    """
    found = scheduled(FalseNegatives, top_k=top_k, threshold=threshold, mode=mode, reduce=reduce)
    return InfoNCELoss(temperature, false_negatives=found, **keywords)


def siglip(scale: float = 10.0, bias: float = -10.0, *, learn: bool = True, **keywords: Any) -> SigLIPLoss:
    """SigLIP (Zhai et al. 2023, arXiv 2303.15343; google-research/big_vision siglip.py) with a queue: a sigmoid for each pair.

    log(1 + exp(-l_pos)) + sum_j log(1 + exp(l_j)), l = scale s + bias; scale (as a logarithm) and bias are learned unless
    learn=False: give the module's parameters to the optimiser.
    """
    return SigLIPLoss(scale, bias, learn=learn, **keywords)
