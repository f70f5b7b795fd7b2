"""Which negatives stay: rank windows and limits below the positive."""

from typing import Any

from negmine.losses import InfoNCELoss, methods
from negmine.losses.methods import MethodLoss
from negmine.options import Select
from negmine.recipes.schedules import Number, Temperature, scheduled


def hardest(
    fraction: Number = 0.05, *, skip: Number = 0.0, temperature: Temperature = 0.2, **keywords: Any
) -> InfoNCELoss:
    """The hardest `fraction` of each query's negatives, without the hardest `skip`.

        kept: ranks [floor(skip M), floor(fraction M)) of the M valid negatives

    Parameters
    ----------
    fraction : float, int or schedule
        The end of the window: a fraction of the query's negatives if float, a rank if int.
    skip : float, int or schedule
        The start of the window. `skip=0.001` leaves out the hardest 0.1 %.
    temperature : float, Tensor or schedule
        Divides the scores; 0.2 as in MoCo v2.
    **keywords
        Further arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss, to call with query, positive key, negatives and masks.

    Notes
    -----
    Which share is unnecessary depends on the sizes of the classes; the paper's value is for ImageNet.

    References
    ----------
    Cai et al. 2020 (arXiv 2010.06682): the hardest 5 % are nearly sufficient, and the hardest 0.1 % unnecessary.

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.hardest(0.05, skip=0.001)(query, key, queue)
    """
    select = scheduled(Select, range_min=skip, range_max=fraction)
    return InfoNCELoss(temperature, select=select, **keywords)


def easiest(fraction: Number = 0.95, *, temperature: Temperature = 0.2, **keywords: Any) -> InfoNCELoss:
    """Only the easiest `fraction` of each query's negatives: the control that shows what the hard ones are worth.

    Parameters
    ----------
    fraction : float or schedule
        The share of the negatives that is kept.
    temperature : float, Tensor or schedule
        Divides the scores; 0.2 as in MoCo v2.
    **keywords
        Further arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss, to call with query, positive key, negatives and masks.

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
    return Select(1.0 - fraction, 1.0)


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
    """A ring of difficulty: the hardest `outer`, without the innermost part of those.

        kept: ranks [floor(inner outer M), floor(outer M))         inner_of="outer"
              ranks [floor(inner M), floor(outer M))               inner_of="all"

    Parameters
    ----------
    outer : float or schedule
        The hardest fraction that is kept. The published schedules go from 1.0 to 0.1: `linear(1.0, 0.1, steps)`,
        `step(1.0, 0.1, steps)` or `exponential(1.0, 0.1)`.
    inner : float or schedule
        The fraction that is left out at the hardest end.
    inner_of : str
        ``"outer"``: inner is a fraction of the outer window; ``"all"``: of all negatives.
    sample : int, optional
        Draw this many negatives of the ring for each query; the public NCE loss draws 4,095 with replacement. As there, the
        sum is not rescaled.
    replace : bool
        Draw with replacement.
    temperature : float, Tensor or schedule
        Divides the scores; 0.07, as in MoCo v1.
    **keywords
        Further arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss, to call with query, positive key, negatives and masks.

    Notes
    -----
    The public code never uses its exponential schedule, because it reads a configuration key that is never set, and never
    uses "all", because of an `x or True`.

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
    if inner_of not in ("outer", "all"):
        raise ValueError(f"ring: inner_of must be 'outer' or 'all', got {inner_of!r}")
    select = scheduled(ring_select, outer=outer, inner=inner, inner_of=inner_of, sample=sample, replace=replace)
    return InfoNCELoss(temperature, select=select, **keywords)


def ring_select(outer: float, inner: float, inner_of: str, sample: int | None, replace: bool) -> Select:
    """The Select for a ring: the hardest `outer` without its innermost part."""
    return Select(inner * outer if inner_of == "outer" else inner, outer, sample=sample, replace=replace)


def margin_pos(
    margin: Number = 0.05, hardest: Number | None = None, *, temperature: Temperature = 0.02, **keywords: Any
) -> InfoNCELoss:
    """No negative above the positive's score minus a margin (NV-Retriever's TopK-MarginPos).

    Parameters
    ----------
    margin : float or schedule
        Negatives with s > s_pos - margin are removed. A negative margin is the mask of Qwen3-Embedding: -0.1 removes only
        negatives that are clearly above the positive.
    hardest : int, float or schedule, optional
        If given, keep only this many, or this fraction, of the hardest that remain.
    temperature : float, Tensor or schedule
        Divides the scores; 0.02.
    **keywords
        Further arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss, to call with query, positive key, negatives and masks.

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
    """No negative above a percentage of the positive's score (NV-Retriever's TopK-PercPos).

    Parameters
    ----------
    percentage : float or schedule
        Negatives with s > s_pos - |s_pos| (1 - percentage) are removed. Because of the absolute value, the threshold is below
        s_pos even if s_pos is negative.
    hardest : int, float or schedule, optional
        If given, keep only this many, or this fraction, of the hardest that remain.
    temperature : float, Tensor or schedule
        Divides the scores; 0.02.
    **keywords
        Further arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss, to call with query, positive key, negatives and masks.

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
        How far below the guide's score of the positive a negative must stay.
    relative : bool
        The margin is a fraction of that score.
    temperature : float, Tensor or schedule
        Divides the scores; 0.01, as in sentence-transformers.
    **keywords
        Further arguments of `MethodLoss`, such as reduction, seed or backend.

    Returns
    -------
    MethodLoss
        The loss, to call with guide_query=, guide_positive= and, except for in-batch negatives, guide_keys=.

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
    return Select(0, hardest, relative_margin=1.0 - percentage)
