"""More than one positive: labels, false negatives, and the sigmoid loss that treats each pair alone."""

from typing import Any

from negmine.losses import InfoNCELoss, SupConLoss
from negmine.losses.siglip import SigLIPLoss
from negmine.options import FalseNegatives
from negmine.recipes.schedules import Number, Temperature, scheduled


def sup_con(positives: str = "out", *, temperature: Temperature = 0.07, **keywords: Any) -> SupConLoss:
    """Supervised contrastive loss (SupCon): every key of the query's label attracts.

    Parameters
    ----------
    positives : str
        ``"out"`` takes the mean over the positives outside the logarithm, which the paper found far better than ``"in"``.
    temperature : float, Tensor or schedule
        Divides the scores; as in the paper.
    **keywords
        Further arguments of `SupConLoss`, such as reduction, seed or backend.

    Returns
    -------
    SupConLoss
        The loss, to call with query, keys, query labels and key labels.

    Notes
    -----
    With a queue, give it the current keys and the queue concatenated, as zhangyifei01/MoCo-v2-SupContrast does. A label of
    -1 is unknown.

    References
    ----------
    Khosla et al. 2020 (arXiv 2004.11362; HobbitLong/SupContrast losses.py).

    Examples
    --------
    >>> query, labels = F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2
    >>> queue = negmine.MoCoQueue(16, 100, with_labels=True)
    >>> loss = negmine.recipes.sup_con()(query, queue.keys, labels, queue.labels)
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
    """False negatives that further views of the image find are removed, or attract.

    Parameters
    ----------
    top_k : int or None
        How many candidates each query has; None: only the threshold decides.
    threshold : float, schedule or None
        The score above which a candidate is a false negative; None: only the rank decides.
    mode : str
        ``"eliminate"`` or ``"attract"``.
    reduce : str
        ``"max"`` or ``"mean"`` over the views.
    temperature : float, Tensor or schedule
        Divides the scores; as in the paper.
    **keywords
        Further arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss, to call with support=, views (B, V, D).

    Notes
    -----
    The public code only attracts. Elimination, the default here, is the safer one in a queue with one key for each image.

    References
    ----------
    Huynh et al. 2022 (arXiv 2011.11765; google-research/fnc objective.py).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> views = torch.randn(8, 3, 16)
    >>> loss = negmine.recipes.false_negative_cancellation(5, 0.7)(query, key, queue, support=views)
    """
    found = scheduled(FalseNegatives, top_k=top_k, threshold=threshold, mode=mode, reduce=reduce)
    return InfoNCELoss(temperature, false_negatives=found, **keywords)


def siglip(scale: float = 10.0, bias: float = -10.0, *, learn: bool = True, **keywords: Any) -> SigLIPLoss:
    """SigLIP with a queue or the batch: a sigmoid for each pair, with learned scale and bias.

        loss = log(1 + exp(-l_pos)) + sum_j log(1 + exp(l_j)),   l = scale s + bias

    Parameters
    ----------
    scale : float
        The scale at the start.
    bias : float
        The bias at the start. The sum grows with K: against a long queue start lower, at -14 for example.
    learn : bool
        Learn scale (as a logarithm) and bias: give the module's parameters to the optimiser.
    **keywords
        Further arguments of `SigLIPLoss`, such as reduction, seed or backend.

    Returns
    -------
    SigLIPLoss
        The loss, to call with query, positive key, negatives and masks.

    References
    ----------
    Zhai et al. 2023 (arXiv 2303.15343; google-research/big_vision siglip.py).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.siglip(bias=-14.0)(query, key, queue)
    """
    return SigLIPLoss(scale, bias, learn=learn, **keywords)
