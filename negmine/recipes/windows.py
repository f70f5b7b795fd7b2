"""Which negatives stay: rank windows and limits below the positive."""

from typing import Any

from negmine.losses import InfoNCELoss, methods
from negmine.losses.methods import MethodLoss
from negmine.options import Select
from negmine.recipes.schedules import Number, Temperature, scheduled


def hardest(
    fraction: Number = 0.05, *, skip: Number = 0.0, temperature: Temperature = 0.2, **keywords: Any
) -> InfoNCELoss:
    """The hardest `fraction` of each query's negatives, without the hardest `skip` (Cai et al. 2020, arXiv 2010.06682).

    Keeps ranks [floor(skip M), floor(fraction M)) of the M valid negatives. The paper finds the hardest 5 % nearly sufficient
    and the hardest 0.1 % (skip=0.001) unnecessary; on data with other class sizes than ImageNet's the latter share differs.
    """
    select = scheduled(Select, range_min=skip, range_max=fraction)
    return InfoNCELoss(temperature, select=select, **keywords)


def easiest(fraction: Number = 0.95, *, temperature: Temperature = 0.2, **keywords: Any) -> InfoNCELoss:
    """The easiest `fraction` alone (Cai et al. 2020): the control that shows what the hard negatives are worth."""
    return InfoNCELoss(temperature, select=scheduled(easiest_select, fraction=fraction), **keywords)


def easiest_select(fraction: float) -> Select:
    """The easiest `fraction` of one step."""
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
    """Ring, conditional negatives (Wu et al. 2020, arXiv 2010.02037; mhw32/contrastive-ring-public src/objectives/moco.py).

    Keeps ranks [floor(inner outer M), floor(outer M)): the hardest `outer`, without the innermost `inner` of those; with
    inner_of="all" without the innermost `inner` of all M. The published schedules move the outer bound from 1.0 to 0.1:
    linear(1.0, 0.1, steps), step(1.0, 0.1, steps), exponential(1.0, 0.1), whose public form is over after 45 steps (see there);
    cosine is ours. sample: draw that many of the ring for each query (the public NCE form draws 4,095 with replacement); the
    partition is not rescaled, as there. That code also reads a configuration key that is never written, so that its
    exponential schedule never runs, and its `x or True` makes inner_of="all" unreachable.
    """
    if inner_of not in ("outer", "all"):
        raise ValueError(f"ring: inner_of must be 'outer' or 'all', got {inner_of!r}")
    select = scheduled(ring_select, outer=outer, inner=inner, inner_of=inner_of, sample=sample, replace=replace)
    return InfoNCELoss(temperature, select=select, **keywords)


def ring_select(outer: float, inner: float, inner_of: str, sample: int | None, replace: bool) -> Select:
    """The ring of one step: the hardest `outer` without its innermost part."""
    return Select(inner * outer if inner_of == "outer" else inner, outer, sample=sample, replace=replace)


def margin_pos(
    margin: Number = 0.05, hardest: Number | None = None, *, temperature: Temperature = 0.02, **keywords: Any
) -> InfoNCELoss:
    """NV-Retriever's TopK-MarginPos (arXiv 2407.15831): drop s > s_pos - margin, then keep the `hardest` of what is left.

    A negative margin is Qwen3-Embedding's mask (arXiv 2506.05176): margin=-0.1 drops what is clearly above the positive.
    """
    select = scheduled(Select, range_max=hardest, absolute_margin=margin)
    return InfoNCELoss(temperature, select=select, **keywords)


def perc_pos(
    percentage: Number = 0.95, hardest: Number | None = None, *, temperature: Temperature = 0.02, **keywords: Any
) -> InfoNCELoss:
    """NV-Retriever's TopK-PercPos (arXiv 2407.15831): drop s above `percentage` of the positive's score.

    The threshold is s_pos - |s_pos| (1 - percentage), which stays below a positive whose score is negative.
    """
    select = scheduled(perc_pos_select, percentage=percentage, hardest=hardest)
    return InfoNCELoss(temperature, select=select, **keywords)


def gist(
    margin: Number = 0.0, *, relative: bool = False, temperature: Temperature = 0.01, **keywords: Any
) -> MethodLoss:
    """GISTEmbed (Solatorio 2024, arXiv 2402.16829; sentence-transformers GISTEmbedLoss): a guide model names false negatives.

    Call with guide_query=, guide_positive= and, but for in-batch negatives, guide_keys=, the guide's embeddings. margin_strategy
    "absolute" and "relative" are `relative`; see negmine/losses/methods.py, gist, for what differs.
    """
    return MethodLoss(methods.gist, temperature=temperature, margin=margin, relative=relative, **keywords)


def perc_pos_select(percentage: float, hardest: int | float | None) -> Select:
    """The window below `percentage` of the positive's score at one step."""
    return Select(0, hardest, relative_margin=1.0 - percentage)
