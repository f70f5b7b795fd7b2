"""Losses with several positives (SupCon, false negative cancellation), and the sigmoid loss of single pairs (SigLIP)."""

from typing import Any

from negmine.losses import InfoNCELoss, SupConLoss
from negmine.losses.siglip import SigLIPLoss
from negmine.options import FalseNegatives
from negmine.recipes.schedules import Number, Temperature, scheduled


def sup_con(positives: str = "out", *, temperature: Temperature = 0.07, **keywords: Any) -> SupConLoss:
    """The supervised contrastive loss (SupCon): all keys with the query's label are positives. `sup_con` has the formula.

    Parameters
    ----------
    positives : str
        ``"out"`` takes the mean over the positives outside of the logarithm, ``"in"`` inside. The paper found ``"out"`` to be
        far better.
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of the paper.
    **keywords
        Other arguments of `SupConLoss`, such as reduction or backend.

    Returns
    -------
    SupConLoss
        The loss. Call it as ``loss(query, keys, query_labels, key_labels)``.

    Notes
    -----
    With a queue, pass the keys of the batch and the queue, as zhangyifei01/MoCo-v2-SupContrast does:
    ``loss(query, [negmine.Negatives(key, labels=labels), queue], labels)``. A label of -1 means unknown.

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
    """False negative cancellation: detects false negatives with additional views, and removes them or uses them as positives.

    `FalseNegatives` has the formulas.

    Parameters
    ----------
    top_k : int or None
        The number of keys of each query that may be false negatives. None means all keys.
    threshold : float, schedule or None
        The score above which these keys are false negatives. None means that all of them are.
    mode : str
        ``"eliminate"`` removes false negatives, ``"attract"`` uses them as positives.
    reduce : str
        Whether the score of a key is the ``"max"`` or the ``"mean"`` over the views.
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of the paper.
    **keywords
        Other arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss. Call it as ``loss(query, positive_key, negative_keys, support=views)``, with views (B, V, D).

    Notes
    -----
    The public code has only ``"attract"``. The default here is ``"eliminate"``, because it is safer if the queue has one key for
    each image.

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
    """SigLIP, over a queue or the batch: a sigmoid for each pair, with a learned scale and a learned bias.

        loss = log(1 + exp(-l_pos)) + sum_j log(1 + exp(l_j)),   l = scale s + bias

    Parameters
    ----------
    scale : float
        The initial scale.
    bias : float
        The initial bias. The sum grows with the number of negatives, so start with a lower bias for a long queue, such as -14.
    learn : bool
        Whether scale (as its logarithm) and bias are learned. Pass the parameters of the module to the optimiser.
    **keywords
        Other arguments of `SigLIPLoss`, such as reduction, seed or backend.

    Returns
    -------
    SigLIPLoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

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
