"""The option objects Select, Mix, Weight and FalseNegatives, and the objects Negatives and Guide that hold tensors.

The first four are frozen dataclasses of numbers, so the same object can be used for every batch, device and backend. Their
constructors raise an error for an invalid value. Negatives and Guide hold the tensors of one call.
"""

import math
import re
from copy import copy
from dataclasses import KW_ONLY, dataclass, field
from functools import cache
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor


def is_int(value: Any) -> bool:
    """True for an int that fits into 64 bits and is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_real(value: Any) -> bool:
    """True for a finite int or float that is not a bool."""
    # Comparisons instead of math.isfinite, because Dynamo traces this function.
    return (is_int(value) or isinstance(value, float)) and -math.inf < value < math.inf


def plain(value: Any) -> Any:
    """Convert a NumPy scalar to a Python number and a tensor of one element to a 0-d tensor. Other values are unchanged."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor) and value.dim() and value.numel() == 1:
        return value.reshape(())
    return value


def is_scalar(value: Any) -> TypeGuard[Tensor]:
    """True for a 0-d floating tensor, such as a schedule returns. Its value is not checked."""
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def plain_fields(options: Any, *names: str) -> None:
    """Apply `plain` to the named fields of a frozen dataclass."""
    for name in names:
        value = getattr(options, name)
        if isinstance(value, (np.generic, Tensor)):
            object.__setattr__(options, name, plain(value))


MAX_DESCRIPTION = 200  # characters


class Phrase(str):
    """Words in an error message about what was given. `describe` does not quote them, unlike a string that a user gave."""


def kind_of(value: Any) -> Phrase:
    """The type of a value in words."""
    if value is None:
        return Phrase("None")
    if isinstance(value, np.ndarray):
        return Phrase("a NumPy array")
    name = type(value).__name__
    return Phrase(f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}")


def not_a_tensor(value: Any) -> Phrase:
    """The type of a value in words, with advice if torch.as_tensor converts it."""
    advice = ", which torch.as_tensor converts" if isinstance(value, (list, tuple, np.ndarray)) else ""
    return Phrase(kind_of(value) + advice)


def describe(value: Any, most: int = MAX_DESCRIPTION) -> str:
    """A short description of a value for error messages, in one line and with at most `most` characters.

    It is the dtype, shape and device of a tensor, the dtype and shape of a NumPy array, the tuples of a list of shapes joined by
    "or", and else the repr.
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array of shape {value.shape}"
    try:
        if isinstance(value, Phrase):
            text = str(value)
        elif isinstance(value, list) and value and all(isinstance(item, tuple) for item in value[:MAX_DESCRIPTION]):
            text = " or ".join(dict.fromkeys(map(str, value[:MAX_DESCRIPTION])))
        else:
            text = repr(value)
    except Exception:  # the repr of any class may fail
        text = f"an object of type {type(value).__name__}"
    text = re.sub(r"\s*\n\s*", " ", text)
    return text if len(text) <= most else text[: most - 3] + "..."


def _require(options: Any, good: bool, name: str, wanted: str, came: Any) -> None:
    if not good:
        raise ValueError(f"{type(options).__name__}: {name} must be {wanted}, got {describe(came)}")


QUANTILES = 4096  # intervals of the tabulated Beta quantile function


@cache
def beta_quantiles(concentration: float) -> Tensor | None:
    """The quantile function of Beta(concentration, concentration) at 0, 1/4096, ..., 1: (4097,) fp32, None if it is uniform.

    It is interpolated from the distribution function on a grid that is dense at both ends, where the density may diverge.
    """
    if concentration == 1.0:
        return None
    # Substituting x = t^p / (t^p + (1 - t)^p) with p = max(1, 1 / concentration) makes the integrand bounded at both ends.
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
    # The distribution is symmetric, but its rounding near 1 is not.
    return ((quantile + 1.0 - quantile.flip(0)) / 2).float()


@dataclass(frozen=True)
class Select:
    """The negatives of a query to keep: score filters, then a window of ranks, then a random sample.

        pool    = the negatives that the masks allow, with min_score <= s <= max_score, s <= s_pos - absolute_margin and
                  s <= s_pos - |s_pos| * relative_margin                                  (s is the raw inner product)
        window  = ranks [range_min, range_max) of the pool, hardest first; of equal scores, the lower index ranks first
        kept    = the window, or `sample` random members of it

    A float is a fraction of the query's pool, and an int is a rank. For example, ``Select(0, 1.0)`` keeps all negatives, but
    ``Select(0, 1)`` keeps one.

    Parameters
    ----------
    range_min, range_max : int, float or None
        The first rank of the window and the rank after its last, as ranks (int) or fractions (float). Fractions of the pool
        are rounded down to ranks, but a window of fractions keeps at least one negative if the pool is not empty. None means
        the end of the pool.
    min_score, max_score : float, optional
        The smallest and the largest score to keep, as raw inner products.
    absolute_margin, relative_margin : float, optional
        How far the score of a negative must be below that of the positive. For example, MarginPos of NV-Retriever is
        ``absolute_margin=0.05``, its PercPos is ``relative_margin=0.05``, and the mask of Qwen3 is ``absolute_margin=-0.1``.
        With a relative margin the threshold is below the positive's score even if that is negative.
    sample : int, optional
        The number of negatives to draw from the window for each query. A draw depends only on seed, step and the global
        index of the query.
    replace : bool
        Whether to draw with replacement. A negative that is drawn twice counts twice.

    Raises
    ------
    ValueError
        If a value is invalid, such as ``range_max=1.5`` or ``range_min > range_max``.

    Notes
    -----
    Each number except `sample` may be a 0-d tensor, as schedules return: floating for a fraction or a score, int64 for a
    rank. The value of a tensor is not checked. Selection has no gradient. Negatives with a NaN score are never kept.

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
        """True if the filters need the score of the positive."""
        return self.absolute_margin is not None or self.relative_margin is not None

    @property
    def has_filter(self) -> bool:
        return self.has_margin or self.min_score is not None or self.max_score is not None

    @property
    def starts_late(self) -> bool:
        """True if the window may leave out the hardest negatives."""
        return isinstance(self.range_min, Tensor) or self.range_min != 0

    @property
    def ends_early(self) -> bool:
        """True if the window may leave out the easiest negatives. It does so for rank 1, but not for the fraction 1.0."""
        high = self.range_max
        return high is not None and (isinstance(high, Tensor) or is_int(high) or high < 1.0)

    @property
    def needs_pool_size(self) -> bool:
        """True if the ranks depend on the size of the pool or on a tensor."""
        return any(isinstance(bound, (float, Tensor)) for bound in (self.range_min, self.range_max))

    def highest_score(self, positive_score: Tensor) -> Tensor:
        """positive_score (B,) -> (B,): the largest score that the filters keep, +inf if there is no limit."""
        top = torch.full_like(positive_score, math.inf)  # (B,)
        if self.max_score is not None:
            top = top.clamp_max(self.max_score)
        if self.absolute_margin is not None:
            top = top.minimum(positive_score - self.absolute_margin)
        if self.relative_margin is not None:
            top = top.minimum(positive_score - positive_score.abs() * self.relative_margin)
        return top

    def window(self, count: Any) -> tuple[Any, Any]:
        """The ranks [first, end) that are kept of pools with `count` negatives, with end <= count.

        count is (B,) int64, and the results are too. An int, the size of all pools, gives ints unless a bound is a tensor.
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
        """The largest possible number of negatives in the window of a pool with at most K negatives."""
        low, high = self.range_min, 1.0 if self.range_max is None else self.range_max
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            return K
        if isinstance(low, float) and isinstance(high, float):
            return min(K, math.ceil(K * (high - low)) + 2)  # both ends are rounded, and at least one negative is kept
        first = 0 if isinstance(low, float) else low
        end = max(math.ceil(K * high), first + 1) if isinstance(high, float) else high
        return max(0, min(K, end) - first)


def _is_bound(value: Any) -> bool:
    """True for a 0-d tensor that can be a rank or a fraction."""
    return is_scalar(value) or (isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.int64)


@dataclass(frozen=True)
class Mix:
    """Synthetic negatives for each query, mixed from its hardest negatives (MoCHi).

        pairs        h = m / ||m||,  m = c n_a + (1 - c) n_b,   c in pair_range,   a, b drawn from ranks [skip, skip + hard)
        with_query   h = m / ||m||,  m = c q + (1 - c) n_b,     c in query_range,  b drawn from ranks [skip, skip + hard)

    q is the query, and n_a is its negative at rank a. The loss has the synthetic negatives h in addition to the negatives of
    the pool.

    Parameters
    ----------
    hard : int
        The number of hardest negatives from which the two parents are drawn.
    pairs, with_query : int
        The number of synthetic negatives of each kind for a query.
    skip : int
        The number of very hardest negatives to leave out, because they are the most likely false negatives.
    pair_range, query_range : tuple of float
        The smallest and the largest coefficient c.
    concentration : float
        The coefficients are c = low + (high - low) * Beta(concentration, concentration). 1 is the uniform distribution.
    distinct : bool
        Whether the two parents of a pair must differ, if the query has at least two negatives.
    detach : bool
        True treats the synthetic negatives as constants, as the published implementations do. With False, the gradient flows
        through them to the keys and to the query that is mixed into them.

    Raises
    ------
    ValueError
        If a value is invalid.

    Notes
    -----
    The parents are the hardest of all negatives that the masks allow, whatever `select` keeps. A query without negatives gets
    no synthetic negatives.

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
    # The quantile table of the coefficients, (4097,) fp32 or None. It is computed here once, so a compiled step only reads it.
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
        """S, the number of synthetic negatives of each query."""
        return self.pairs + self.with_query

    def enabled_where(self, condition: Tensor) -> "Mix":
        """A copy that adds no synthetic negatives while condition, a () bool tensor, is False. Schedules use it for a warm-up."""
        changed = copy(self)
        object.__setattr__(changed, "enabled", condition)
        return changed


@dataclass(frozen=True)
class Weight:
    """Weights for negatives: importance weights for hard negatives (HCL), and a correction for false negatives (DCL).

        R  = N * sum_j exp((1 + beta) x_j) / sum_j exp(beta x_j)                          x = score / T, over N kept negatives
        Ng = max((R - tau_plus * N * exp(x_pos)) / (1 - tau_plus), N * exp(-1 / T))       the maximum only if tau_plus > 0
        loss = -log(exp(x_pos) / (exp(x_pos) + Ng))                                       T = temperature

    Parameters
    ----------
    beta : float or Tensor
        The exponent of the importance weights exp(beta x_j), 0 or more. Larger values give hard negatives more weight.
    tau_plus : float or Tensor
        The expected fraction of false negatives, in [0, 1). Start with at most 1 / number of classes. If the keys of the
        queue are nearly random, 0.1 puts almost every row at the lower limit N * exp(-1 / T), where the negatives of the row
        get no gradient; check `clamped` in the statistics of `info_nce`. The lower limit assumes unit vectors.
    detach : bool
        True treats the weights exp(beta x) as constants in the gradient. The default, False, is what the official code does.

    Raises
    ------
    ValueError
        If a value is invalid. The value of a 0-d tensor, as schedules return, is not checked.

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
        """True if beta may be above 0."""
        return isinstance(self.beta, Tensor) or self.beta > 0

    @property
    def debiases(self) -> bool:
        """True if tau_plus may be above 0."""
        return isinstance(self.tau_plus, Tensor) or self.tau_plus > 0


@dataclass(frozen=True)
class FalseNegatives:
    """False negatives, detected with additional views of the query's image, and then removed or used as positives.

        f_j = max (or mean) over v of support_v . key_j         for each key j of the pool
        F   = the keys j with f_j > threshold among the top_k keys with the largest f

    The loss takes `support` (B, V, D), the embeddings of V additional views of each query. F is found for each query.

    Parameters
    ----------
    top_k : int or None
        The number of keys with the largest f that may be false negatives. None means all keys.
    threshold : float, Tensor or None
        The score f above which these keys are false negatives. None means that all of them are.
    mode : str
        ``"eliminate"`` removes F from the pool and from the denominator. ``"attract"`` removes F from the pool and uses its
        keys as further positives: loss = -(x_pos + sum over F of x_f) / (1 + |F|) + log(exp(x_pos) + sum over F of exp(x_f) +
        sum over the negatives of exp(x_j)), with the logits x.
    reduce : str
        ``"max"`` or ``"mean"`` over the views. The maximum ignores NaN scores, the mean does not.

    Raises
    ------
    ValueError
        If a value is invalid.

    Notes
    -----
    f is a raw inner product without gradient. Of equal f, the one with the lower index ranks first. In the paper, the views
    are encoded by the key encoder. F is stored as a (B, K) bool mask. With ``top_k=None`` the queue is scored in pieces by
    PyTorch instead of the kernels.

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
            "given if threshold is None",
            self.top_k,
        )
        _require(self, self.mode in ("eliminate", "attract"), "mode", "'eliminate' or 'attract'", self.mode)
        _require(self, self.reduce in ("max", "mean"), "reduce", "'max' or 'mean'", self.reduce)


@dataclass(frozen=True, eq=False)
class Guide:
    """False negatives, detected by a second model: keys that it scores higher than the positive are masked (GISTEmbed).

        g_j = query . keys_j,   g_pos = query . positive
        key j is masked if g_j > g_pos - margin, or with `relative` if g_j > g_pos - |g_pos| * margin

    Parameters
    ----------
    query, positive : Tensor (B, G)
        The second model's embeddings of the queries and of their positives. G may differ from D.
    keys : Tensor (K, G) or (B, M, G), or None
        The second model's embeddings of the negative keys, with a row for each key. None for in-batch negatives, whose
        embeddings are `positive`.
    margin : float or Tensor
        With 0, the keys that score higher than the positive are masked. A larger margin also masks keys that score lower, by
        less than the margin. A negative margin masks only keys that score higher by more than its absolute value.
    relative : bool
        Whether the margin is multiplied by the absolute value of the positive's score.

    Raises
    ------
    TypeError, ValueError
        If an argument has a wrong type, shape, dtype or value.

    Notes
    -----
    The comparison is strict, and a NaN score masks nothing. The positive itself is never masked. Scores are raw inner
    products without gradient. fp32, bf16, fp16 and float64 may be mixed; float64 is rounded to fp32 unless the query of the
    loss is float64.

    For shared keys (K, D) the kernels compute the scores tile by tile in every pass, so no (B, K) mask is stored. For keys
    (B, M, D) a (B, M) mask is stored.

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
                raise TypeError(f"Guide: {name} must be a tensor, got {not_a_tensor(value)}")
            if not value.is_floating_point():
                raise TypeError(f"Guide: {name} must be a floating tensor, got {describe(value)}")
            if value.dim() not in dims or value.shape[-1] == 0:
                raise ValueError(f"Guide: {name} must be of shape {shapes} with G of 1 or more, got {describe(value)}")
            if value.shape[-1] != self.query.shape[-1]:
                wanted = f"of shape {shapes} with query's G = {self.query.shape[-1]}"
                raise ValueError(f"Guide: {name} must be {wanted}, got {describe(value)}")
        if self.positive.shape != self.query.shape:
            wanted = f"of query's shape {tuple(self.query.shape)}"
            raise ValueError(f"Guide: positive must be {wanted}, got {describe(self.positive)}")
        plain_fields(self, "margin")
        _require(self, is_scalar(self.margin) or is_real(self.margin), "margin", "a finite number", self.margin)
        _require(self, isinstance(self.relative, bool), "relative", "True or False", self.relative)


@dataclass(frozen=True, eq=False)
class Negatives:
    """One pool of negatives: keys with their ids, labels, mask, bias and guide, and with options for this pool.

    A tensor of keys means the same as ``Negatives(keys)``.

    Parameters
    ----------
    keys : Tensor (K, D) or (B, M, D), MoCoQueue, or None
        Keys shared by all queries (K, D), a list of keys for each query (B, M, D), a queue, or None for in-batch negatives:
        the positives of the other rows.
    ids, labels : Tensor (K,) or (B, M), optional
        Integer tensors. A key is not a negative of a query if its id equals that of the query (`query_ids` of the loss) or
        its label equals that of the query (`query_labels`). -1 means unknown and is equal to nothing.
    mask : Tensor (K,), (B, K) or (B, M), bool, optional
        False removes a key from the ranking and the denominator. Masked keys may hold any values, NaN included.
    bias : Tensor (K,) or (B, M), floating, optional
        Added to the logits: logit = score / temperature + bias. It does not change scores, rankings, margins or the
        importance weights of `Weight`. It gets a gradient if it requires grad. For in-batch negatives it is (B,), one element
        for each positive.
    guide : Guide, optional
        A second model's embeddings, which mask false negatives.
    select, mix, weight : Select, Mix, Weight, optional
        The options for this pool. None uses those of the loss. ``Select()``, ``Mix(pairs=0, with_query=0)`` and ``Weight()``
        switch them off for this pool.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a tensor, an option object or None, or if ids or labels are given without keys. The losses check
        shapes and dtypes, which depend on the query.

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
                raise TypeError(f"Negatives: {name} must be a tensor or None, got {not_a_tensor(value)}")
        for name, kind in (("guide", Guide), ("select", Select), ("mix", Mix), ("weight", Weight)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"Negatives: {name} must be a negmine.{kind.__name__} or None, got {describe(value)}")
        if self.keys is None and (self.ids is not None or self.labels is not None):
            raise ValueError(
                "Negatives: ids and labels must be None for in-batch negatives, which have query_ids and query_labels"
            )
