"""The option objects: Select, Mix, Weight and FalseNegatives say how negatives are treated, Negatives and Guide which there are.

The first four are frozen dataclasses that hold numbers only, so that the same object serves every batch, device and backend; each
refuses an invalid value when it is made. Negatives and Guide hold the tensors of one call.
"""

import math
from copy import copy
from dataclasses import KW_ONLY, dataclass, field
from functools import cache
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor


def is_int(value: Any) -> bool:
    """True for a whole number of 64 bits that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_real(value: Any) -> bool:
    """True for a finite int or float that is no bool."""
    return (
        is_int(value) or isinstance(value, float)
    ) and -math.inf < value < math.inf  # no math.isfinite: Dynamo traces this


def plain(value: Any) -> Any:
    """A scalar as a Python number or a 0-d tensor; NumPy scalars and tensors of one element are converted."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor) and value.dim() and value.numel() == 1:
        return value.reshape(())
    return value


def is_scalar(value: Any) -> TypeGuard[Tensor]:
    """True for a 0-d floating tensor, such as a schedule gives, whose value is the caller's to keep in range."""
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def plain_fields(options: Any, *names: str) -> None:
    """The named fields of a frozen dataclass under `plain`."""
    for name in names:
        value = getattr(options, name)
        if isinstance(value, (np.generic, Tensor)):
            object.__setattr__(options, name, plain(value))


def _require(options: Any, good: bool, name: str, wanted: str, came: Any) -> None:
    if not good:
        raise ValueError(f"{type(options).__name__}: {name} must be {wanted}, got {came!r}")


QUANTILES = 4096  # intervals of the tabulated Beta quantile function


@cache
def beta_quantiles(concentration: float) -> Tensor | None:
    """Quantile function of Beta(concentration, concentration) at 0, 1/4096, ..., 1: (4097,) fp32; None for the uniform case.

    Interpolated from the distribution function on a grid that is dense at both ends, where the density may diverge.
    """
    if concentration == 1.0:
        return None
    # x = t^p / (t^p + (1 - t)^p) with p = max(1, 1 / concentration) makes the integrand bounded at both ends.
    power = max(1.0, 1.0 / concentration)
    t = torch.linspace(0.0, 1.0, 400_001, dtype=torch.float64, device="cpu")
    low, high = t**power, (1.0 - t) ** power
    x = low / (low + high)
    mid = (t[1:] + t[:-1]) / 2
    log_density = concentration * power * (mid.log() + (1.0 - mid).log()) - mid.log() - (1.0 - mid).log()
    log_density = log_density - 2 * concentration * torch.logaddexp(power * mid.log(), power * (1.0 - mid).log())
    mass = torch.cat(
        [torch.zeros(1, dtype=torch.float64, device="cpu"), (log_density - log_density.max()).exp().cumsum(0)]
    )
    wanted = torch.linspace(0.0, 1.0, QUANTILES + 1, dtype=torch.float64, device="cpu") * mass[-1]
    right = torch.searchsorted(mass, wanted).clamp(1, len(mass) - 1)
    span = (mass[right] - mass[right - 1]).clamp_min(torch.finfo(torch.float64).tiny)
    part = ((wanted - mass[right - 1]) / span).clamp(0, 1)
    quantile = x[right - 1] + part * (x[right] - x[right - 1])
    return (
        (quantile + 1.0 - quantile.flip(0)) / 2
    ).float()  # the distribution is symmetric; rounding at the far end is not


@dataclass(frozen=True)
class Select:
    """Which of a query's negatives to keep: score filters, then a window of ranks, then a random sample.

        pool    = negatives left by the masks with min_score <= s <= max_score, s <= s_pos - absolute_margin,
                  s <= s_pos - |s_pos| * relative_margin                                  (s is the raw inner product)
        window  = ranks [range_min, range_max) of the pool, hardest first; equal scores rank by the lower index
        kept    = window, or `sample` members of it

    A float is a fraction of the query's own pool and an int is a rank: ``Select(0, 1.0)`` keeps all, ``Select(0, 1)`` one
    negative.

    Parameters
    ----------
    range_min, range_max : int, float or None
        Ranks if int, fractions if float. Both ends are rounded down, and a window of fractions keeps at least one negative
        of a pool that has any. ``range_max=None`` is the end of the pool.
    min_score, max_score : float, optional
        Bounds of the raw inner product. Equality keeps.
    absolute_margin, relative_margin : float, optional
        How far below the positive's score a negative must stay. NV-Retriever's MarginPos is ``absolute_margin=0.05`` and
        its PercPos ``relative_margin=0.05``; Qwen3's mask is ``absolute_margin=-0.1``. The absolute value keeps the
        threshold below a positive whose score is negative.
    sample : int, optional
        How many members of the window to draw for each query. A draw depends on seed, step and the query's global row only.
    replace : bool
        Draw with replacement: a negative drawn twice counts twice.

    Raises
    ------
    ValueError
        For an invalid value, such as ``range_max=1.5`` or ``range_min > range_max``.

    Notes
    -----
    Each number but `sample` may be a 0-d tensor, as schedules return: floating for a fraction or a score, int64 for a rank.
    Its value is not read, so it is not checked. No gradient flows through selection. A NaN score is never kept.

    References
    ----------
    Ranges of difficulty: Cai et al. 2020 (arXiv 2010.06682). Rings: Wu et al. 2020 (arXiv 2010.02037). Margins:
    NV-Retriever (arXiv 2407.15831), Qwen3-Embedding (arXiv 2506.05176).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> hardest = negmine.Select(0, 0.05)
    >>> loss, stats = negmine.info_nce(query, key, queue, select=hardest, return_stats=True)
    >>> int(stats.num_negatives[0])
    5
    """

    range_min: int | float | Tensor = 0
    range_max: int | float | Tensor | None = None
    _: KW_ONLY
    min_score: float | Tensor | None = None
    max_score: float | Tensor | None = None
    absolute_margin: float | Tensor | None = None
    relative_margin: float | Tensor | None = None
    sample: int | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        scores = ("min_score", "max_score", "absolute_margin", "relative_margin")
        plain_fields(self, "range_min", "range_max", "sample", "replace", *scores)
        low, high = self.range_min, self.range_max
        good: Any = (is_int(low) and low >= 0) or (isinstance(low, float) and 0.0 <= low < 1.0) or _is_bound(low)
        _require(self, good, "range_min", "a rank (int, 0 or more) or a fraction (float in [0, 1))", low)
        good = (
            high is None
            or (is_int(high) and high >= 1)
            or (isinstance(high, float) and 0.0 < high <= 1.0)
            or _is_bound(high)
        )
        _require(
            self, good, "range_max", "a rank (int, 1 or more), a fraction (float in (0, 1]; 0.05 is 5 %) or None", high
        )
        if isinstance(low, (int, float)) and isinstance(high, (int, float)) and type(low) is type(high):
            _require(self, low < high, "range_min", f"below range_max={high!r}", low)
        for name in scores:
            value = getattr(self, name)
            _require(self, value is None or is_real(value) or is_scalar(value), name, "a finite number or None", value)
        least, most = self.min_score, self.max_score
        if isinstance(least, (int, float)) and isinstance(most, (int, float)):
            _require(self, least <= most, "min_score", f"at most max_score={most!r}", least)
        _require(
            self,
            self.sample is None or (is_int(self.sample) and self.sample >= 1),
            "sample",
            "an int of 1 or more, or None",
            self.sample,
        )
        _require(self, isinstance(self.replace, bool), "replace", "True or False", self.replace)
        _require(
            self, not self.replace or self.sample is not None, "replace", "False unless sample is given", self.replace
        )

    @property
    def has_margin(self) -> bool:
        """True where the filter needs the positive's score."""
        return self.absolute_margin is not None or self.relative_margin is not None

    @property
    def has_filter(self) -> bool:
        return self.has_margin or self.min_score is not None or self.max_score is not None

    @property
    def starts_late(self) -> bool:
        """True where the window leaves out the hardest."""
        return isinstance(self.range_min, Tensor) or self.range_min != 0

    @property
    def ends_early(self) -> bool:
        """True where the window leaves out the easiest; the rank 1 does, the fraction 1.0 does not."""
        high = self.range_max
        return high is not None and (isinstance(high, Tensor) or is_int(high) or high < 1.0)

    @property
    def needs_pool_size(self) -> bool:
        """True where the ranks depend on the size of the pool, or on a tensor."""
        return any(isinstance(bound, (float, Tensor)) for bound in (self.range_min, self.range_max))

    def highest_score(self, positive_score: Tensor) -> Tensor:
        """positive_score (B,) -> (B,): the largest score that the filters keep, +inf where none limits it."""
        top = torch.full_like(positive_score, math.inf)  # (B,)
        if self.max_score is not None:
            top = top.clamp_max(self.max_score)
        if self.absolute_margin is not None:
            top = top.minimum(positive_score - self.absolute_margin)
        if self.relative_margin is not None:
            top = top.minimum(positive_score - positive_score.abs() * self.relative_margin)
        return top

    def window(self, count: Any) -> tuple[Any, Any]:
        """count (B,) int64, the size of each pool -> first, end (B,) int64: ranks [first, end), end <= count.

        An int instead, the size of every pool, gives ints.
        """
        if not isinstance(count, Tensor):
            device = next(
                (bound.device for bound in (self.range_min, self.range_max) if isinstance(bound, Tensor)), None
            )
            count = count if device is None else torch.full((), count, device=device)
        on_host = not isinstance(count, Tensor)
        larger, smaller = (max, min) if on_host else (torch.maximum, torch.minimum)

        def rank(bound: int | float | Tensor) -> Any:
            if isinstance(bound, Tensor) and not bound.is_floating_point():
                return bound.expand_as(count)
            if not is_int(bound):
                return int(count * bound) if on_host else (count.double() * bound).long()  # floor: both are positive
            return bound if on_host else torch.full_like(count, int(bound))

        first = rank(self.range_min)
        end = count if self.range_max is None else rank(self.range_max)
        if any(isinstance(bound, float) or is_scalar(bound) for bound in (self.range_min, self.range_max)):
            end = larger(end, first + 1)
        return first, smaller(end, count)

    def widest(self, K: int) -> int:
        """The most negatives that a window of any pool of up to K can hold."""
        low, high = self.range_min, 1.0 if self.range_max is None else self.range_max
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            return K
        if isinstance(low, float) and isinstance(high, float):
            return min(K, math.ceil(K * (high - low)) + 2)  # both ends are rounded, and one negative stays
        first = 0 if isinstance(low, float) else low
        end = max(math.ceil(K * high), first + 1) if isinstance(high, float) else high
        return max(0, min(K, end) - first)


def _is_bound(value: Any) -> bool:
    """True for a 0-d tensor that can be a rank or a fraction."""
    return is_scalar(value) or (isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.int64)


@dataclass(frozen=True)
class Mix:
    """Synthetic negatives of each query, mixed from its hardest ones (MoCHi).

        pairs        h = m / ||m||,  m = c n_a + (1 - c) n_b,   c in pair_range,   a, b drawn from ranks [skip, skip + hard)
        with_query   h = m / ||m||,  m = c q + (1 - c) n_b,     c in query_range

    They are added to the negatives of the loss; none is removed.

    Parameters
    ----------
    hard : int
        How many of the hardest negatives are mixed.
    pairs, with_query : int
        How many synthetic negatives of each kind a query gets.
    skip : int
        Leave out this many of the very hardest, which are the likeliest false negatives.
    pair_range, query_range : tuple of float
        The smallest and the largest coefficient c.
    concentration : float
        c = low + (high - low) * Beta(concentration, concentration); 1 is uniform.
    distinct : bool
        The two parents of a pair differ wherever the query has two to choose from.
    detach : bool
        The synthetic negatives carry no gradient, as in every public implementation. With False, the query and the keys in
        them do.

    Raises
    ------
    ValueError
        For an invalid value.

    Notes
    -----
    Parents are mined from the negatives left by the masks, whatever `select` keeps. A query without negatives gets none.

    References
    ----------
    Kalantidis et al. 2020 (arXiv 2010.01028).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.info_nce(query, key, queue, mix=negmine.Mix(hard=20, pairs=10, with_query=5))
    """

    hard: int = 1024
    pairs: int = 1024
    with_query: int = 128
    _: KW_ONLY
    skip: int = 0
    pair_range: tuple[float, float] = (0.0, 1.0)
    query_range: tuple[float, float] = (0.0, 0.5)
    concentration: float = 1.0
    distinct: bool = True
    detach: bool = True
    # The quantile table of the coefficients, (4097,) fp32 or None: made once here, so that a compiled step only reads it.
    quantiles: Tensor | None = field(init=False, repr=False, compare=False, default=None)
    enabled: Tensor | None = field(init=False, repr=False, compare=False, default=None)  # () bool, None = True

    def __post_init__(self) -> None:
        plain_fields(self, "hard", "pairs", "with_query", "skip", "concentration", "distinct", "detach")
        _require(self, is_int(self.hard) and self.hard >= 1, "hard", "an int of 1 or more", self.hard)
        for name in ("pairs", "with_query", "skip"):
            value = getattr(self, name)
            _require(self, is_int(value) and value >= 0, name, "an int of 0 or more", value)
        for name in ("pair_range", "query_range"):
            value = getattr(self, name)
            good = isinstance(value, tuple) and len(value) == 2 and all(is_real(v) for v in value)
            _require(
                self, good and 0.0 <= value[0] <= value[1] <= 1.0, name, "(low, high) with 0 <= low <= high <= 1", value
            )
        _require(
            self,
            is_real(self.concentration) and self.concentration > 0,
            "concentration",
            "a number above 0",
            self.concentration,
        )
        for name in ("distinct", "detach"):
            _require(self, isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        object.__setattr__(self, "quantiles", beta_quantiles(self.concentration))

    @property
    def total(self) -> int:
        """S, the synthetic negatives of each query."""
        return self.pairs + self.with_query

    def enabled_where(self, condition: Tensor) -> "Mix":
        """The same, adding nothing where condition () bool is False: a warm-up whose end is known on the device alone."""
        made = copy(self)
        object.__setattr__(made, "enabled", condition)
        return made


@dataclass(frozen=True)
class Weight:
    """How much each negative counts: an importance exponent, and a prior of false negatives.

        R  = N * sum_j exp((1 + beta) x_j) / sum_j exp(beta x_j)                          x_j = s_j / T, over N kept negatives
        Ng = max((R - tau_plus * N * exp(x_pos)) / (1 - tau_plus), N * exp(-1 / T))       the floor only where tau_plus > 0
        loss = -log(exp(x_pos) / (exp(x_pos) + Ng))

    Parameters
    ----------
    beta : float or Tensor
        0 or more; larger values weigh hard negatives more. beta multiplies s / T.
    tau_plus : float or Tensor
        In [0, 1): the expected share of false negatives. Start from 1 / number of classes or less. With a queue of nearly
        random vectors 0.1 puts nearly every row at the floor, and such a row's negatives get no gradient: watch `clamped`
        in the statistics. The floor assumes unit vectors.
    detach : bool
        Keep the weights exp(beta x) out of the gradient. The official code, and the default, does not.

    Raises
    ------
    ValueError
        For an invalid value. A 0-d tensor, as schedules return, is not read and so not checked.

    References
    ----------
    beta: HCL, Robinson et al. 2020 (arXiv 2010.04592; joshr17/HCL image/main.py). tau_plus: Chuang et al. 2020 (arXiv
    2007.00224; chingyaoc/DCL main.py).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.info_nce(query, key, queue, weight=negmine.Weight(beta=0.5, tau_plus=0.01))
    """

    beta: float | Tensor = 0.0
    tau_plus: float | Tensor = 0.0
    _: KW_ONLY
    detach: bool = False

    def __post_init__(self) -> None:
        plain_fields(self, "beta", "tau_plus", "detach")
        beta, tau_plus = self.beta, self.tau_plus
        good: Any = is_scalar(beta) or (is_real(beta) and beta >= 0)
        _require(self, good, "beta", "a number of 0 or more", beta)
        good = is_scalar(tau_plus) or (is_real(tau_plus) and 0 <= tau_plus < 1)
        _require(self, good, "tau_plus", "a number in [0, 1)", tau_plus)
        _require(self, isinstance(self.detach, bool), "detach", "True or False", self.detach)

    @property
    def sharpens(self) -> bool:
        """True where beta may be above 0."""
        return isinstance(self.beta, Tensor) or self.beta > 0

    @property
    def debiases(self) -> bool:
        """True where tau_plus may be above 0."""
        return isinstance(self.tau_plus, Tensor) or self.tau_plus > 0


@dataclass(frozen=True)
class FalseNegatives:
    """False negatives, found by further views of the query's own image: removed, or made positives.

        f_j = max (or mean) over views v of support_v . n_j;   F = { j among the query's top_k largest f : f_j > threshold }

    Parameters
    ----------
    top_k : int or None
        How many candidates a query has; None: only the threshold decides.
    threshold : float or None
        The score above which a candidate is a false negative; None: only the rank decides.
    mode : str
        ``"eliminate"``: F leaves the pool and the denominator. ``"attract"``: F leaves the pool and becomes further
        positives, with loss = -(x_pos + sum_F x_f) / (1 + |F|) + LSE(x_pos, x_F, negatives).
    reduce : str
        ``"max"`` or ``"mean"`` over the views. The maximum ignores a view's NaN, the mean does not.

    Raises
    ------
    ValueError
        For an invalid value.

    Notes
    -----
    f is a raw inner product and carries no gradient; equal f rank by the lower index. The paper's views come from the key
    encoder. F is stored as a (B, K) bool mask. ``top_k=None`` scores the queue in pieces, outside the kernels.

    References
    ----------
    Huynh et al. 2022 (arXiv 2011.11765; google-research/fnc).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue, views = negmine.MoCoQueue(16, 100), torch.randn(8, 3, 16)
    >>> loss = negmine.info_nce(query, key, queue, false_negatives=negmine.FalseNegatives(5, 0.7), support=views)
    """

    top_k: int | None = 10
    threshold: float | Tensor | None = 0.7
    _: KW_ONLY
    mode: str = "eliminate"
    reduce: str = "max"

    def __post_init__(self) -> None:
        plain_fields(self, "top_k", "threshold")
        _require(
            self,
            self.top_k is None or (is_int(self.top_k) and self.top_k >= 1),
            "top_k",
            "an int of 1 or more, or None",
            self.top_k,
        )
        threshold = self.threshold
        good = threshold is None or is_real(threshold) or is_scalar(threshold)
        _require(self, good, "threshold", "a finite number or None", threshold)
        _require(
            self,
            self.top_k is not None or self.threshold is not None,
            "top_k",
            "given where threshold is None",
            self.top_k,
        )
        _require(self, self.mode in ("eliminate", "attract"), "mode", "'eliminate' or 'attract'", self.mode)
        _require(self, self.reduce in ("max", "mean"), "reduce", "'max' or 'mean'", self.reduce)


@dataclass(frozen=True, eq=False)
class Guide:
    """False negatives, found by a second model: keys that it scores above the positive are masked (GISTEmbed).

        g_j = query . keys_j,   g_pos = query . positive
        key j is masked where g_j > g_pos - margin, or with `relative` where g_j > g_pos - |g_pos| margin

    Parameters
    ----------
    query, positive : Tensor (B, G)
        The second model's embeddings of the queries and of their positives. G may differ from D.
    keys : Tensor (K, G) or (B, M, G), or None
        Its embeddings of the keys; (B, M, G) beside keys that are each query's own; None for in-batch negatives, which are
        `positive`.
    margin : float
        How far below the positive's score a key may come. Negative values mask less.
    relative : bool
        The margin is a fraction of the positive's score.

    Raises
    ------
    TypeError, ValueError
        For input that does not fit.

    Notes
    -----
    The comparison is strict, and a NaN masks nothing. The positive itself is never masked. Scores are raw inner products;
    no gradient flows through them. fp32, bf16, fp16 and float64 mix freely; float64 counts as such where the query of the
    loss is float64, and is rounded to fp32 elsewhere.

    Kernels compute the scores tile by tile in every pass over shared keys, so no (B, K) mask is stored. For keys (B, M, D)
    a (B, M) mask is.

    References
    ----------
    Solatorio 2024 (arXiv 2402.16829).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> keys, guide_keys = torch.randn(100, 16), torch.randn(100, 32)
    >>> guide = negmine.Guide(torch.randn(8, 32), torch.randn(8, 32), guide_keys, margin=0.1)
    >>> loss = negmine.info_nce(query, key, negmine.Negatives(keys, guide=guide))
    """

    query: Tensor
    positive: Tensor
    keys: Tensor | None
    _: KW_ONLY
    margin: float = 0.0
    relative: bool = False

    def __post_init__(self) -> None:
        for name, dims, shapes in (
            ("query", (2,), "(B, G)"),
            ("positive", (2,), "(B, G)"),
            ("keys", (2, 3), "(K, G) or (B, M, G)"),
        ):
            value = getattr(self, name)
            if name == "keys" and value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"Guide: {name} must be a tensor, got {type(value).__name__}")
            got = f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
            if not value.is_floating_point():
                raise TypeError(f"Guide: {name} must be a floating tensor, got {got}")
            if value.dim() not in dims or value.shape[-1] != self.query.shape[-1] or value.shape[-1] == 0:
                raise ValueError(f"Guide: {name} must be of shape {shapes} with G of 1 or more, query's G, got {got}")
        if self.positive.shape != self.query.shape:
            shape = tuple(self.positive.shape)
            raise ValueError(f"Guide: positive must be of query's shape {tuple(self.query.shape)}, got {shape}")
        plain_fields(self, "margin")
        _require(self, is_scalar(self.margin) or is_real(self.margin), "margin", "a finite number", self.margin)
        _require(self, isinstance(self.relative, bool), "relative", "True or False", self.relative)


@dataclass(frozen=True, eq=False)
class Negatives:
    """One pool of negatives: keys with their ids, labels, mask and bias, and options of their own.

    A plain tensor of keys stands for ``Negatives(keys)``.

    Parameters
    ----------
    keys : Tensor (K, D) or (B, M, D), MoCoQueue, or None
        Keys shared by all queries, keys of each query, a queue, or None for in-batch negatives: the positives of the other
        rows.
    ids, labels : Tensor (K,) or (B, M), optional
        Whole numbers. A key whose id equals the query's (`query_ids` of the loss) is ignored as a negative, and so is one
        whose label equals the query's. -1 is unknown and equals nothing.
    mask : Tensor (K,), (B, K) or (B, M), bool, optional
        True = usable. A masked key leaves the ranking and the denominator, and may hold anything.
    bias : Tensor (K,) or (B, M), floating, optional
        Added to the logit, score / temperature + bias, and to no score: rankings, margins and the importance of `Weight`
        leave it out. It carries gradient where it requires it. For in-batch negatives (B,), one for each row's positive.
    guide : Guide, optional
        A second model's embeddings, which mask false negatives.
    select, mix, weight : Select, Mix, Weight, optional
        How this pool is treated; None = as the loss says for all pools. ``Select()``, ``Mix(pairs=0, with_query=0)`` and
        ``Weight()`` do nothing.

    Raises
    ------
    TypeError
        For anything but tensors, option objects or None. The losses check shapes and dtypes, which depend on the query.

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> negatives = negmine.Negatives(torch.randn(100, 16), ids=torch.arange(100))
    >>> loss = negmine.info_nce(query, key, negatives, query_ids=torch.arange(8))
    """

    keys: Any
    _: KW_ONLY
    ids: Tensor | None = None
    labels: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    guide: Guide | None = None
    select: Select | None = None
    mix: Mix | None = None
    weight: Weight | None = None

    def __post_init__(self) -> None:
        for name in ("ids", "labels", "mask", "bias"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"Negatives: {name} must be a tensor or None, got {type(value).__name__}")
        for name, kind in (("guide", Guide), ("select", Select), ("mix", Mix), ("weight", Weight)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(
                    f"Negatives: {name} must be a negmine.{kind.__name__} or None, got {type(value).__name__}"
                )
        if self.keys is None and (self.ids is not None or self.labels is not None):
            raise ValueError(
                "Negatives: ids and labels must be None for in-batch negatives, which have the queries' own"
            )
