"""Published treatments of negatives, each as one function that returns the configured loss module.

    loss = negmine.recipes.hardest(0.05)
    loss(query, queue_key, queue.keys, query_ids=ids, negative_ids=queue.ids)

Every option may be a schedule: a callable of the step that returns the value (InfoNCELoss evaluates it at every call). Defaults
are the papers' own where they suit a queue; a docstring says where they do not. Every recipe takes InfoNCELoss's other
keywords (reduction, seed, backend, return_stats).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from negmine.losses import InfoNCELoss, SupConLoss
from negmine.options import FalseNegatives, Mix, Select, Weight
from negmine.triplet_recipes import batch_hard, ephn, facenet, multi_similarity, simans, vse_plus_plus  # noqa: F401

Temperature = float | Tensor | Callable[[int], float]
Fraction = float | Callable[[int], float]


def _at(value: Any, step: int) -> Any:
    return value(step) if callable(value) else value


def moco_v1(temperature: Temperature = 0.07, **keywords: Any) -> InfoNCELoss:
    """MoCo (He et al. 2020, arXiv 1911.05722; facebookresearch/moco moco/builder.py): the whole queue, T = 0.07.

    loss = -x_pos + log(exp(x_pos) + sum_j exp(x_j)),   x = s / T
    """
    return InfoNCELoss(temperature, **keywords)


def moco_v2(temperature: Temperature = 0.2, **keywords: Any) -> InfoNCELoss:
    """MoCo v2 (Chen et al. 2020, arXiv 2003.04297; `--moco-t 0.2`): the loss of v1 at T = 0.2."""
    return InfoNCELoss(temperature, **keywords)


def hardest(
    fraction: Fraction = 0.05, *, skip: float = 0.0, temperature: Temperature = 0.2, **keywords: Any
) -> InfoNCELoss:
    """The hardest `fraction` of each query's negatives, without the hardest `skip` (Cai et al. 2020, arXiv 2010.06682).

    Keeps ranks [floor(skip M), floor(fraction M)) of the M valid negatives. The paper finds the hardest 5 % nearly sufficient
    and the hardest 0.1 % (skip=0.001) unnecessary; on data with other class sizes than ImageNet's the latter share differs.
    """
    if callable(fraction):
        return InfoNCELoss(temperature, select=lambda step: Select(skip, fraction(step)), **keywords)
    return InfoNCELoss(temperature, select=Select(skip, fraction), **keywords)


def easiest(fraction: float = 0.95, *, temperature: Temperature = 0.2, **keywords: Any) -> InfoNCELoss:
    """The easiest `fraction` alone (Cai et al. 2020): the control that shows what the hard negatives are worth."""
    return InfoNCELoss(temperature, select=Select(1.0 - fraction, 1.0), **keywords)


def ring(
    outer: Fraction = 0.1,
    inner: float = 0.1,
    *,
    sample: int | None = None,
    replace: bool = False,
    temperature: Temperature = 0.07,
    **keywords: Any,
) -> InfoNCELoss:
    """Ring, conditional negatives (Wu et al. 2020, arXiv 2010.02037; mhw32/contrastive-ring-public src/objectives/moco.py).

    Keeps ranks [floor(inner outer M), floor(outer M)): the hardest `outer`, without the innermost `inner` of those. The
    published schedule moves the outer bound: outer=linear(1.0, 0.1, steps). sample: draw that many of the ring for each query
    (the paper's NCE form draws 4,095 with replacement); the partition is not rescaled, as in the public code.
    """

    def select(step: int) -> Select:
        bound = _at(outer, step)
        return Select(inner * bound, bound, sample=sample, replace=replace)

    return InfoNCELoss(temperature, select=select if callable(outer) else select(0), **keywords)


def mochi(
    hard: int = 1024,
    pairs: int = 1024,
    with_query: int = 128,
    *,
    warmup_steps: int = 0,
    temperature: Temperature = 0.2,
    skip: int = 0,
    distinct: bool = True,
    detach: bool = True,
    **keywords: Any,
) -> InfoNCELoss:
    """MoCHi (Kalantidis et al. 2020, arXiv 2010.01028): MoCo v2 plus `pairs` and `with_query` synthetic negatives a query.

    `Mix` states the formulas. warmup_steps: train without them first (10 to 15 epochs in the paper). No official code exists;
    one public port indexes every query's mixes into query 0's hard set, which tests/test_rules.py would fail.
    """
    mix = Mix(hard, pairs, with_query, skip=skip, distinct=distinct, detach=detach)
    if warmup_steps:
        return InfoNCELoss(temperature, mix=lambda step: mix if step >= warmup_steps else None, **keywords)
    return InfoNCELoss(temperature, mix=mix, **keywords)


def debiased(tau_plus: float = 0.01, *, temperature: Temperature = 0.5, **keywords: Any) -> InfoNCELoss:
    """Debiased contrastive loss (Chuang et al. 2020, arXiv 2007.00224; chingyaoc/DCL main.py).

        Ng = max((sum_j exp(x_j) - tau_plus N exp(x_pos)) / (1 - tau_plus), N exp(-1 / T))

    The paper's tau_plus = 0.1 is a prior for 10 classes in a batch. Against a queue of near-random vectors it clamps nearly
    every row, whose negatives then get no gradient; the default here is 0.01, and `clamped` in the statistics tells.
    """
    return InfoNCELoss(temperature, weight=Weight(tau_plus=tau_plus), **keywords)


def hcl(
    beta: float | Callable[[int], float] = 1.0,
    tau_plus: float = 0.01,
    *,
    detach: bool = False,
    temperature: Temperature = 0.5,
    **keywords: Any,
) -> InfoNCELoss:
    """Hard negatives by reweighting (Robinson et al. 2020, arXiv 2010.04592; joshr17/HCL image/main.py, not its printed figure).

    w_j = exp(beta x_j) / mean exp(beta x), debiased as above; beta multiplies s / T. The gradient flows through the weights
    unless detach. beta may be a schedule: the public `--anneal down` is linear(1.0, 0.0, steps).
    """
    if callable(beta):
        return InfoNCELoss(temperature, weight=lambda step: Weight(beta(step), tau_plus, detach=detach), **keywords)
    return InfoNCELoss(temperature, weight=Weight(beta, tau_plus, detach=detach), **keywords)


def decoupled(temperature: Temperature = 0.1, **keywords: Any) -> InfoNCELoss:
    """Decoupled contrastive learning, DCL (Yeh et al. 2021, arXiv 2110.06848): the positive leaves the denominator.

    loss = -x_pos + log sum_j exp(x_j), which may be negative. One log-sum-exp over all negatives, as in the paper's formula.
    """
    return InfoNCELoss(temperature, decoupled=True, **keywords)


def false_negative_cancellation(
    top_k: int | None = 10,
    threshold: float | None = 0.7,
    *,
    mode: str = "eliminate",
    reduce: str = "max",
    temperature: Temperature = 0.1,
    **keywords: Any,
) -> InfoNCELoss:
    """False negative cancellation (Huynh et al., arXiv 2011.11765; google-research/fnc objective.py). Call with support=views.

    The public code has attraction only; elimination, the default here, is the safer one with one key an image in a queue.
    """
    found = FalseNegatives(top_k, threshold, mode=mode, reduce=reduce)
    return InfoNCELoss(temperature, false_negatives=found, **keywords)


def sup_con(positives: str = "out", *, temperature: float | Tensor = 0.07, **keywords: Any) -> SupConLoss:
    """SupCon (Khosla et al. 2020, arXiv 2004.11362; HobbitLong/SupContrast losses.py): every key of the same label attracts.

    positives="out" takes the mean outside the logarithm, which the paper found far better than "in". Against a queue, give it the
    current keys and the queue concatenated, as zhangyifei01/MoCo-v2-SupContrast does; label -1 is unknown.
    """
    return SupConLoss(temperature, positives=positives, **keywords)


def margin_pos(
    margin: float = 0.05, hardest: int | float | None = None, *, temperature: Temperature = 0.02, **keywords: Any
) -> InfoNCELoss:
    """NV-Retriever's TopK-MarginPos (arXiv 2407.15831): drop s > s_pos - margin, then keep the `hardest` of what is left.

    A negative margin is Qwen3-Embedding's mask (arXiv 2506.05176): margin=-0.1 drops what is clearly above the positive.
    """
    return InfoNCELoss(temperature, select=Select(0, hardest, absolute_margin=margin), **keywords)


def perc_pos(
    percentage: float = 0.95, hardest: int | float | None = None, *, temperature: Temperature = 0.02, **keywords: Any
) -> InfoNCELoss:
    """NV-Retriever's TopK-PercPos (arXiv 2407.15831): drop s above `percentage` of the positive's score.

    The threshold is s_pos - |s_pos| (1 - percentage), which stays below a positive whose score is negative.
    """
    return InfoNCELoss(temperature, select=Select(0, hardest, relative_margin=1.0 - percentage), **keywords)


def linear(start: float, end: float, steps: int) -> Callable[[int], float]:
    """A schedule for any option: from start to end over `steps`, then end."""
    return lambda step: start + (end - start) * min(step / steps, 1.0)
