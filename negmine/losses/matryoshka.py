"""matryoshka: InfoNCE on several prefix widths of the same vectors. The widest prefix selects the negatives."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine import reference
from negmine.losses.info_nce import Plan, Share, merged, run_pools
from negmine.ops import checks
from negmine.ops.accumulate import each_widened, narrowed
from negmine.ops.backends import choose
from negmine.ops.first_derivative import fused
from negmine.ops.negatives import check_negatives, check_pools, option_of, pools_in
from negmine.ops.own_keys import choose_for_keys
from negmine.ops.pool import Pool, hide_masked_rows
from negmine.ops.prefix_logsumexp import MAX_WIDTHS, PrefixLogSumExp
from negmine.ops.vectors import promoted, scale_of, score_of_positive, widened
from negmine.ops.windows import Draw
from negmine.options import Negatives, Select, Weight, is_int, is_real
from negmine.selection import check_select, learned_bias, mined, summing_ops

OP = "matryoshka"
OPTIONS = ("select", "weight")  # options that a Negatives may set for its own pool


class MatryoshkaStats(NamedTuple):
    """The statistics that `matryoshka` returns in addition to the loss. They have no gradient.

    Attributes
    ----------
    losses : Tensor (W, B)
        The unweighted loss of each row at each width.

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> loss, stats = negmine.losses.matryoshka(query, key, widths=[4, 8, 16], return_stats=True)
    >>> stats.losses.shape
    torch.Size([3, 8])
    """

    losses: Tensor  # (W, B)


def matryoshka(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any = None,
    *,
    widths: Sequence[int],
    weights: Sequence[float] | None = None,
    normalize: bool = False,
    temperature: float | Tensor = 0.07,
    select: Select | None = None,
    weight: Weight | None = None,
    query_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    decoupled: bool = False,
    reduction: str = "mean",
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
    backend: str | None = None,
    return_stats: bool = False,
) -> Any:
    """The weighted sum of InfoNCE at several prefix widths of the vectors (Matryoshka representations).

        loss = sum over w in widths of weights_w info_nce(query[:, :w], positive_key[:, :w], negative_keys[:, :w])

    Parameters
    ----------
    query, positive_key : Tensor (B, D)
        As in `info_nce`.
    negative_keys : Tensor, MoCoQueue, Negatives, None, or a list of these
        As in `info_nce`; `mix` of a `Negatives` must be None.
    widths : sequence of int
        The widths W, ascending, from 1 to D; for example (64, 128, 256, D).
    weights : sequence of float, optional
        The weight of each width. The default is 1 for all.
    normalize : bool
        Whether to divide each prefix by its norm, for cosine scores at every width. MatryoshkaLoss of sentence-transformers
        does this if its inner loss uses cosine scores.
    temperature : float or Tensor
        As in `info_nce`.
    select : Select, optional
        The negatives to keep at all widths, selected by the scores at the largest width. Its sample must not be drawn with
        replacement.
    weight : Weight, optional
        Weights for the negatives, computed from the scores at each width.
    query_ids, query_labels : Tensor (B,), optional
        As in `info_nce`.
    decoupled, reduction : optional
        As in `info_nce`.
    seed, step, row_offset : int or Tensor
        As in `info_nce`.
    backend : str, optional
        As in `info_nce`.
    return_stats : bool
        Whether to return MatryoshkaStats too.

    Returns
    -------
    Tensor () or (B,)
        The loss: float32, or float64 for float64 input.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    Notes
    -----
    Gradients are those of `info_nce`, summed over the widths in fp32 and rounded once. Those of the query are computed in the
    forward pass, so keys that do not require grad may be overwritten before backward.

    On the CPU, one pass over shared keys computes the loss and the gradient of the query at up to 16 widths. For the widths
    32, 64, 128 and 256 this takes about 1.7 times as long as the width 256 alone. In Triton, as many widths share a pass as
    registers allow. For keys (B, M, D), and with `weight` or `normalize`, there is one pass for each width. With `select`, a
    (B, K) bool mask and the list of selected keys are stored; with `normalize`, a copy of the keys at each width. The
    gradient of the keys needs one pass for each width, in backward.

    References
    ----------
    Kusupati et al. 2022 (arXiv 2205.13147).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.losses.matryoshka(query, key, queue, widths=[4, 8, 16], normalize=True, temperature=0.2)
    """
    listed = pools_in(OP, negative_keys) if isinstance(negative_keys, (list, tuple)) else [negative_keys]
    if len(listed) > 1:
        pools = check_pools(OP, query, positive_key, listed, query_ids, query_labels, OPTIONS)
    else:
        tags = query_ids, query_labels
        pools = [
            check_negatives(
                OP, query, positive_key, listed[0], *tags, own_keys=True, options=OPTIONS, with_bias=True
            )
        ]  # fmt: skip
    checks.require_positive(OP, positive_key, query)
    temperature = checks.require_temperature(OP, temperature)
    checks.require_options(OP, select=select, weight=weight)
    for name, value in (("normalize", normalize), ("decoupled", decoupled), ("return_stats", return_stats)):
        checks.require_bool(OP, name, value)
    checks.require_choice(OP, "reduction", reduction, checks.REDUCTIONS)
    draw = Draw(*checks.require_draw(OP, seed, step, row_offset))
    widths = _checked_widths(widths, query)
    views = [_prefix(width, normalize) for width in widths]
    weights = _checked_weights(weights, len(views))
    selects = [option_of(given, "select", select) for given in listed]
    for each in selects:
        check_select(OP, each, positive_key, query)
        if each is not None and each.replace:
            raise checks.refuse(OP, "select", "without replace, because a negative is kept at most once", each)
    if normalize:
        query, positive_key = widened(query), widened(positive_key)
        pools = [(widened(keys), pool) for keys, pool in pools]
    pools = [
        (keys, pool) if each is None else _kept(views[-1], query, positive_key, keys, pool, each, backend, at)
        for each, (keys, pool), at in zip(selects, pools, map(draw.of_pool, range(len(pools))), strict=True)
    ]
    plan = Plan(None, None, weight, None, decoupled, draw)
    others = [replace(given, select=None) if isinstance(given, Negatives) else given for given in listed]
    plans = [plan.for_pool(given, number) for number, given in enumerate(others)]
    each = None
    if not normalize and all(plan.weight is None for plan in plans) and 1 < len(widths) <= MAX_WIDTHS:
        each = _in_one_pass(query, positive_key, pools, widths, decoupled, temperature, backend)
    if each is None:
        results = run_pools(OP, plans, query, positive_key, pools, None, None, temperature, backend, views)
        each = [rows for rows, _ in results]
    rows = sum(factor * loss for factor, loss in zip(weights, each, strict=True))
    assert isinstance(rows, Tensor)
    loss = reference.reduced(rows, reduction)
    return (loss, MatryoshkaStats(torch.stack([loss.detach() for loss in each]))) if return_stats else loss


def _in_one_pass(
    query: Tensor, positive_key: Tensor, pools: list[tuple[Tensor, Pool]], widths: list[int], decoupled: bool,
    temperature: float | Tensor, backend: str | None,
) -> list[Tensor] | None:  # fmt: skip
    """The loss (B,) at each width, computed by the op prefix_logsumexp.

    None if the keys of a pool are not shared by all queries, or if its backend does not have the op.
    """
    query, positive_key, *every = promoted(query, positive_key, *(keys for keys, _ in pools))
    if any(keys.dim() == 3 for keys in every):
        return None
    chosen = [
        choose(
            OP, summing_ops("logsumexp", keys, pool.bias), backend, (query, positive_key, keys), "prefix_logsumexp", pool.extra
        )
        for keys, (_, pool) in zip(every, pools, strict=True)
    ]  # fmt: skip
    if not all(kernels is not None and kernels.has("prefix_logsumexp") for kernels in chosen):
        return None
    chosen = [narrowed(kernels, query, positive_key, keys) for kernels, keys in zip(chosen, every, strict=True)]
    query, positive_key, *every = each_widened(query, positive_key, *every)
    scale = scale_of(temperature, query)
    shares: list[list[Share]] = [[] for _ in widths]
    for kernels, keys, (_, pool) in zip(chosen, every, pools, strict=True):
        bias, pool = learned_bias(pool)
        lse, num_kept = fused(PrefixLogSumExp, query, keys, scale, bias, tuple(widths), kernels, *pool)  # (W, B), (B,)
        has_negative, zeros = num_kept > 0, torch.zeros_like(num_kept)
        for at, share in enumerate(shares):
            share.append(Share(lse[at], has_negative, None, num_kept, zeros, ~has_negative))
    scores = [score_of_positive(query[:, :width], positive_key[:, :width]) for width in widths]  # (B,) each
    return [merged(share, score * scale, decoupled, False)[0] for share, score in zip(shares, scores, strict=True)]


def _checked_widths(widths: Any, query: Tensor) -> list[int]:
    D = query.shape[1]
    given = list(widths) if isinstance(widths, (list, tuple)) else []
    fits = [is_int(width) and 0 < width <= D for width in given]
    if not fits or not all(fits) or any(a >= b for a, b in pairwise(given)):
        raise checks.refuse(OP, "widths", f"a list of ascending ints from 1 to query's D = {D}", widths)
    return given


def _checked_weights(weights: Any, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if not isinstance(weights, (list, tuple)) or len(weights) != count or not all(map(is_real, weights)):
        raise checks.refuse(OP, "weights", f"a list with a finite number for each of the {count} widths", weights)
    return list(weights)


def _prefix(width: int, normalize: bool) -> Callable[[Tensor], Tensor]:
    """The prefixes (..., width) of vectors (..., D)."""
    if normalize:
        return lambda vectors: F.normalize(vectors[..., :width], dim=-1)
    return lambda vectors: vectors[..., :width]


def _kept(
    widest: Callable[[Tensor], Tensor], query: Tensor, positive_key: Tensor, keys: Tensor, pool: Pool, select: Select,
    backend: str | None, draw: Draw,
) -> tuple[Tensor, Pool]:  # fmt: skip
    """The keys, and a pool with a (B, K) mask of the columns that `select` keeps by the scores of the widest prefix."""
    K = keys.shape[-2]
    N = max(1, select.widest(K) if select.sample is None else select.sample)
    needed = ("mine_hardest", "rank_thresholds", "count_negatives")
    with torch.no_grad():
        q, positive, n = promoted(*(widest(vectors.detach()) for vectors in (query, positive_key, keys)))
        kernels = choose_for_keys(OP, needed, backend, (q, n), n, pool)
        index = mined(kernels, q, n, pool, N, select, score_of_positive(q, positive), draw)[1]  # (B, N)
        nowhere = torch.zeros(len(q), K + 1, dtype=torch.bool, device=q.device)
        mask = nowhere.scatter(1, index.masked_fill(index < 0, K), True)[:, :K].contiguous()  # (B, K)
    return hide_masked_rows(keys, pool), Pool(mask, bias=pool.bias)
