"""InfoNCE with a part of the negatives: windows of ranks, and limits relative to the positive's score."""

from typing import Any

from negmine.losses import InfoNCELoss, methods
from negmine.losses.methods import MethodLoss
from negmine.ops import checks
from negmine.options import Select
from negmine.recipes.schedules import Number, Temperature, scheduled


def hardest(
    fraction: Number = 0.05, *, skip: Number = 0.0, temperature: Temperature = 0.2, **keywords: Any
) -> InfoNCELoss:
    """InfoNCE with the hardest `fraction` of each query's negatives, without the hardest `skip`.

        kept: ranks [floor(skip M), floor(fraction M)) of the M valid negatives, rank 0 being the hardest

    Parameters
    ----------
    fraction : float, int or schedule
        The end of the window: a fraction of the query's negatives (float) or a rank (int).
    skip : float, int or schedule
        The start of the window. For example, ``skip=0.001`` leaves out the hardest 0.1 %.
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of MoCo v2.
    **keywords
        Other arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

    Notes
    -----
    The values of the paper are for ImageNet. Which negatives are unnecessary depends on the sizes of the classes.

    References
    ----------
    Cai et al. 2020 (arXiv 2010.06682) found that the hardest 5 % are nearly sufficient, and the hardest 0.1 % unnecessary.

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.hardest(0.05, skip=0.001)(query, key, queue)
    """
    select = scheduled(Select, range_min=skip, range_max=fraction)
    return InfoNCELoss(temperature, select=select, **keywords)


def easiest(fraction: Number = 0.95, *, temperature: Temperature = 0.2, **keywords: Any) -> InfoNCELoss:
    """InfoNCE with the easiest `fraction` of each query's negatives, for a control experiment without the hard ones.

        kept: ranks [floor((1 - fraction) M), M) of the M valid negatives, rank 0 being the hardest

    Parameters
    ----------
    fraction : float or schedule
        The fraction of the negatives to keep.
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of MoCo v2.
    **keywords
        Other arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

    References
    ----------
    Cai et al. 2020 (arXiv 2010.06682).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.easiest(0.95)(query, key, queue)
    """
    return InfoNCELoss(temperature, select=scheduled(easiest_select, fraction=fraction), **keywords)


def easiest_select(fraction: float) -> Select:
    """The Select for the easiest `fraction`."""
    return Select(1.0 - checks.require_scalar("easiest", "fraction", fraction), 1.0)


def ring(
    outer: Number = 0.1,
    inner: Number = 0.1,
    *,
    inner_of: str = "outer",
    sample: int | None = None,
    replace: bool = False,
    temperature: Temperature = 0.07,
    **keywords: Any,
) -> InfoNCELoss:
    """InfoNCE with a ring of negatives: the hardest `outer`, without the very hardest of them (Ring).

        kept: ranks [floor(inner outer M), floor(outer M))         inner_of="outer";  M valid negatives, rank 0 is the hardest
              ranks [floor(inner M), floor(outer M))               inner_of="all"

    Parameters
    ----------
    outer : float or schedule
        The fraction of negatives at which the ring ends. The published schedules go from 1.0 to 0.1:
        ``linear(1.0, 0.1, steps)``, ``step(1.0, 0.1, steps)`` or ``exponential(1.0, 0.1)``.
    inner : float or schedule
        The fraction of the hardest negatives to leave out.
    inner_of : str
        Whether `inner` is a fraction of the hardest `outer` (``"outer"``) or of all negatives (``"all"``).
    sample : int, optional
        The number of negatives to draw from the ring for each query. The published NCE loss draws 4,095 with replacement. As
        in that code, the sum is not rescaled.
    replace : bool
        Whether to draw with replacement.
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of MoCo v1.
    **keywords
        Other arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

    Notes
    -----
    The public code has the exponential schedule and ``"all"``, but because of errors it never uses them: it reads a
    configuration key that is never set, and has a condition ``x or True``.

    References
    ----------
    Wu et al. 2020 (arXiv 2010.02037; mhw32/contrastive-ring-public src/objectives/moco.py).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss_of = negmine.recipes.ring(negmine.recipes.linear(1.0, 0.1, 1000), 0.1)
    >>> loss = loss_of(query, key, queue, step=500)
    """
    checks.require_choice("ring", "inner_of", inner_of, ("outer", "all"))
    select = scheduled(ring_select, outer=outer, inner=inner, inner_of=inner_of, sample=sample, replace=replace)
    return InfoNCELoss(temperature, select=select, **keywords)


def ring_select(outer: float, inner: float, inner_of: str, sample: int | None, replace: bool) -> Select:
    """The Select for a ring: the hardest `outer` without its innermost part."""
    outer, inner = (checks.require_scalar("ring", name, value) for name, value in (("outer", outer), ("inner", inner)))
    return Select(inner * outer if inner_of == "outer" else inner, outer, sample=sample, replace=replace)


def margin_pos(
    margin: Number = 0.05, hardest: Number | None = None, *, temperature: Temperature = 0.02, **keywords: Any
) -> InfoNCELoss:
    """InfoNCE without negatives above the positive's score minus a margin (TopK-MarginPos of NV-Retriever).

        kept: negatives with s <= s_pos - margin

    Parameters
    ----------
    margin : float or schedule
        The margin. With a negative margin, such as -0.1 in the mask of Qwen3-Embedding, only negatives that are clearly above
        the positive are removed.
    hardest : int, float or schedule, optional
        If given, only the hardest of the remaining negatives are kept: this number (int) or this fraction (float) of them.
    temperature : float, Tensor or schedule
        The scores are divided by it.
    **keywords
        Other arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

    References
    ----------
    NV-Retriever (arXiv 2407.15831); Qwen3-Embedding (arXiv 2506.05176).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.margin_pos(0.05)(query, key, queue)
    """
    select = scheduled(Select, range_max=hardest, absolute_margin=margin)
    return InfoNCELoss(temperature, select=select, **keywords)


def perc_pos(
    percentage: Number = 0.95, hardest: Number | None = None, *, temperature: Temperature = 0.02, **keywords: Any
) -> InfoNCELoss:
    """InfoNCE without negatives above a percentage of the positive's score (TopK-PercPos of NV-Retriever).

        kept: negatives with s <= s_pos - |s_pos| (1 - percentage)

    Parameters
    ----------
    percentage : float or schedule
        The percentage as a fraction; 0.95 means 95 %. Because of the absolute value in the formula, the threshold is below
        s_pos even if s_pos is negative.
    hardest : int, float or schedule, optional
        If given, only the hardest of the remaining negatives are kept: this number (int) or this fraction (float) of them.
    temperature : float, Tensor or schedule
        The scores are divided by it.
    **keywords
        Other arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

    References
    ----------
    NV-Retriever (arXiv 2407.15831).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.perc_pos(0.95)(query, key, queue)
    """
    select = scheduled(perc_pos_select, percentage=percentage, hardest=hardest)
    return InfoNCELoss(temperature, select=select, **keywords)


def gist(
    margin: Number = 0.0, *, relative: bool = False, temperature: Temperature = 0.01, **keywords: Any
) -> MethodLoss:
    """InfoNCE without the negatives that a guide model considers false (GISTEmbed).

        kept: g_j <= g_pos - margin (|g_pos| if relative)

    Parameters
    ----------
    margin : float or schedule
        How far the guide's score of a negative must be below that of the positive.
    relative : bool
        Whether the margin is a fraction of the absolute value of the positive's score.
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of sentence-transformers.
    **keywords
        Other arguments of the loss: reduction, seed and backend.

    Returns
    -------
    MethodLoss
        The loss. Call it as ``loss(query, positive_key, negative_keys, guide_query=..., guide_positive=..., guide_keys=...)``,
        with the guide's embeddings of the same texts. Leave out guide_keys for in-batch negatives.

    Notes
    -----
    `negmine.Guide` is the same mask for any loss. sentence-transformers computes g_pos (1 - margin) for its relative
    margin, which is above g_pos if g_pos is negative.

    References
    ----------
    Solatorio 2024 (arXiv 2402.16829; sentence-transformers GISTEmbedLoss).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> guide = {"guide_query": torch.randn(8, 32), "guide_positive": torch.randn(8, 32), "guide_keys": torch.randn(100, 32)}
    >>> loss_of = negmine.recipes.gist(0.1)
    >>> loss = loss_of(query, key, torch.randn(100, 16), **guide)
    """
    return MethodLoss(methods.gist, temperature=temperature, margin=margin, relative=relative, **keywords)


def perc_pos_select(percentage: float, hardest: int | float | None) -> Select:
    """The Select for scores below `percentage` of the positive's score."""
    return Select(0, hardest, relative_margin=1.0 - checks.require_scalar("perc_pos", "percentage", percentage))
