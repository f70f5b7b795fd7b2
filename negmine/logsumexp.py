"""logsumexp: the differentiable sum that most contrastive losses are arithmetic on, without the (B, K) matrix.

LogSumExp and MeanScore carry the gradients that the forward pass already knows. A `pool` is whatever tail of arguments the
launchers in `ops` take: a Pool (negmine/pool.py), or a list (negmine/listed.py).
"""

from typing import Any

import torch
from torch import Tensor

from negmine import backends, checks, order, reference_methods
from negmine.derivatives import first_only
from negmine.listed import listed
from negmine.options import Select
from negmine.pool import Pool, between, bounded, check_pool, sampled, to_sum, usable
from negmine.selection import for_kernels, frozen, score_of_positive, working


def scale_of(temperature: float | Tensor, query: Tensor) -> Tensor:
    """1 / temperature as the 0-d fp32 tensor that kernels read; carries the temperature's gradient."""
    if isinstance(temperature, Tensor):
        return temperature.to(device=query.device, dtype=torch.float32).reciprocal()
    return torch.full((), 1.0 / temperature, dtype=torch.float32, device=query.device)


class LogSumExp(torch.autograd.Function):
    """lse_b (B,) = log sum over b's pool of exp(scale * s_bk), with kept (B,) and above (B,) of the kernel.

    also: N, and found (B, N) is the index of mine_hardest, from the same pass; or ranks (B, 2), and only the columns between
    them are summed, whose first and last places are found (B, 2); or None, and found is empty.
    d lse / d query = scale * mean, d lse / d scale = query . mean, both known after the forward pass;
    d lse / d negative_keys = scale * p_bk query_b is a second kernel, run only for keys that require grad.
    """

    @staticmethod
    def forward(ctx, query, negative_keys, scale, pivot, also, ops, *pool):
        want_mean = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        q, keys = for_kernels(query), for_kernels(negative_keys)
        rest = (scale.detach(), pivot, want_mean, *pool)
        if also is None:
            lse, mean, kept, above = ops.logsumexp(q, keys, *rest)
            found = kept.new_empty(0)  # no None: a compiled backward asks every output for its gradient
        elif isinstance(also, Tensor):
            lse, mean, kept, above, found = ops.logsumexp_window(q, keys, also, *rest)
            pool = between(Pool(*pool), *found.unbind(1))
        else:
            lse, mean, kept, above, _, found = ops.logsumexp_mine(q, keys, also, *rest)
        *tensors, ctx.same_label = pool
        ctx.ops, ctx.width = ops, len(pool)
        wants_keys = ctx.needs_input_grad[1]
        ctx.save_for_backward(query, scale, lse, mean, *((negative_keys, *tensors) if wants_keys else ()))
        ctx.mark_non_differentiable(kept, above, found)
        return lse, kept, above, found

    @staticmethod
    @first_only
    def backward(ctx, d_lse, _d_kept, _d_above, _d_found):
        query, scale, lse, mean, *rest = ctx.saved_tensors
        d_query = d_keys = d_scale = None
        if ctx.needs_input_grad[0]:
            d_query = ((d_lse * scale)[:, None] * mean).to(query.dtype)  # (B, D)
        if ctx.needs_input_grad[1]:
            negative_keys, *tensors = rest
            pool = (*tensors, ctx.same_label)
            weight = d_lse * scale  # (B,)
            d_keys = ctx.ops.logsumexp_grad_keys(
                for_kernels(query), for_kernels(negative_keys), scale, lse, weight, *pool
            )
            d_keys = d_keys.to(negative_keys.dtype)  # (K, D)
        if ctx.needs_input_grad[2]:
            d_scale = (d_lse * (query.float() * mean).sum(1)).sum()
        return d_query, d_keys, d_scale, None, None, None, *([None] * ctx.width)


class LogSumExpPair(torch.autograd.Function):
    """lse (2, B): LogSumExp at the two scales (2,) in one pass, with kept (B,) and above (B,)."""

    @staticmethod
    def forward(ctx, query, negative_keys, scale, pivot, ops, *pool):
        want_mean = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        keys = for_kernels(negative_keys)
        lse, mean, kept, above = ops.logsumexp_pair(for_kernels(query), keys, scale.detach(), pivot, want_mean, *pool)
        *tensors, ctx.same_label = pool
        ctx.ops, ctx.width = ops, len(pool)
        wants_keys = ctx.needs_input_grad[1]
        ctx.save_for_backward(query, scale, lse, mean, *((negative_keys, *tensors) if wants_keys else ()))
        ctx.mark_non_differentiable(kept, above)
        return lse, kept, above

    @staticmethod
    @first_only
    def backward(ctx, d_lse, _d_kept, _d_above):
        query, scale, lse, mean, *rest = ctx.saved_tensors
        d_query = d_keys = d_scale = None
        weight = d_lse * scale[:, None]  # (2, B)
        if ctx.needs_input_grad[0]:
            d_query = (weight[:, :, None] * mean).sum(0).to(query.dtype)  # (B, D)
        if ctx.needs_input_grad[1]:
            negative_keys, *tensors = rest
            vectors = for_kernels(query), for_kernels(negative_keys)
            each = [
                ctx.ops.logsumexp_grad_keys(*vectors, scale[i], lse[i], weight[i], *tensors, ctx.same_label)
                for i in range(2)
            ]
            d_keys = (each[0] + each[1]).to(negative_keys.dtype)  # (K, D)
        if ctx.needs_input_grad[2]:
            d_scale = (d_lse * (query.float() * mean).sum(2)).sum(1)
        return d_query, d_keys, d_scale, None, None, *([None] * ctx.width)


class MeanScore(torch.autograd.Function):
    """score_b (B,) = mean over b's pool of s_bk, and kept (B,): what logsumexp returns as its mean at scale 0."""

    @staticmethod
    def forward(ctx, query, keys, ops, *pool):
        zero = torch.zeros((), dtype=torch.float32, device=query.device)
        lse, mean, kept, _ = ops.logsumexp(for_kernels(query), for_kernels(keys), zero, None, True, *pool)
        *tensors, ctx.same_label = pool
        ctx.ops, ctx.width = ops, len(pool)
        ctx.save_for_backward(query, zero, lse, mean, *((keys, *tensors) if ctx.needs_input_grad[1] else ()))
        ctx.mark_non_differentiable(kept)
        return (query.float() * mean).sum(1), kept

    @staticmethod
    @first_only
    def backward(ctx, d_score, _d_kept):
        query, zero, lse, mean, *rest = ctx.saved_tensors
        d_query = d_keys = None
        if ctx.needs_input_grad[0]:
            d_query = (d_score[:, None] * mean).to(query.dtype)  # (B, D)
        if ctx.needs_input_grad[1]:
            keys, *tensors = rest
            pool = (*tensors, ctx.same_label)
            d_keys = ctx.ops.logsumexp_grad_keys(for_kernels(query), for_kernels(keys), zero, lse, d_score, *pool)
            d_keys = d_keys.to(keys.dtype)  # (K, D)
        return d_query, d_keys, None, *([None] * ctx.width)


def logsumexp(
    query: Tensor,
    negative_keys: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    positive_key: Tensor | None = None,
    select: Select | None = None,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    negative_mask: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    row_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Log-sum-exp of each query's logits over its negatives, with gradients to query, negative_keys and temperature.

        lse_b = log sum over kept k of exp(s_bk / temperature),   s = query . negative_key

    query (B, D), negative_keys (K, D), temperature, select, masks, seed, step, row_offset, backend: as in info_nce.
    positive_key (B, D): needed only where select has a margin; it gets no gradient here.

    Returns (B,) fp32 (float64 for float64 input): -inf, without gradient, where the pool is empty. A loss is then arithmetic on
    it: InfoNCE is softplus(lse - s_pos / T). The gradient is computed in the forward pass, so frozen keys may be overwritten
    before backward. Selection and masks carry no gradient. Raises ValueError or TypeError for input that does not fit.
    """
    checks.require_temperature("logsumexp", temperature)
    masks = (negative_mask, query_ids, negative_ids, query_labels, negative_labels)
    return pooled(
        "logsumexp", query, negative_keys, temperature, positive_key, select, masks, (seed, step, row_offset), backend
    )


def pooled(
    op: str,
    query: Tensor,
    negative_keys: Tensor,
    temperature: float | Tensor,
    positive_key: Tensor | None,
    select: Select | None,
    masks: tuple[Tensor | None, ...],
    draw: tuple[int, int, int],
    backend: str | None,
) -> Tensor:
    """logsumexp under the name of the op that called it."""
    args = (query, negative_keys, positive_key, select, masks, draw, backend)
    ops, pool, ranks, dense = columns(op, backends.summing(negative_keys), *args, spared=("logsumexp_window",))
    if ops is None:
        return reference_methods.logsumexp(working(query), frozen(negative_keys, dense["usable"]), temperature, **dense)
    return LogSumExp.apply(query, negative_keys, scale_of(temperature, query), None, ranks, ops, *pool)[0]


def columns(
    op: str,
    kernels: tuple[str, ...],
    query: Tensor,
    negative_keys: Tensor,
    positive_key: Tensor | None,
    select: Select | None,
    masks: tuple[Any, ...],
    draw: tuple[int, int, int],
    backend: str | None,
    spared: tuple[str, ...] = (),
) -> tuple[backends.Launchers | None, tuple[Any, ...], Tensor | None, dict[str, Any]]:
    """Which columns an op over the queue sees, checked: launchers with a pool or a list, or None and the reference's keywords.

    spared: what it can do without. With logsumexp_window among them there may be ranks (B, 2), which narrow the pool further.
    """
    checks.require_query_and_keys(op, query, negative_keys)
    checks.require_options(op, select=select)
    checks.require_draw(op, *draw)
    tensors: tuple[Tensor, ...] = (query, negative_keys)
    if positive_key is not None:
        checks.require_positive(op, positive_key, query)
        tensors = (query, positive_key, negative_keys)
    elif select is not None and select.has_margin:
        raise checks.refuse(op, "positive_key", "given where select has a margin", None)
    pool = check_pool(op, query, negative_keys, *masks)
    windowed = ("rank_thresholds", "count_negatives") if select is not None else ()
    samples = select is not None and select.sample is not None
    lists = ("listed_logsumexp", "listed_grad_keys") if samples else ()
    ops = backends.choose(op, (*kernels, *windowed, *lists), backend, tensors, also=spared)
    with torch.no_grad():
        anchor = None if positive_key is None else score_of_positive(query, positive_key)  # (B,)
        if ops is None:
            allowed = usable(pool, query, negative_keys)
            return None, pool, None, {"usable": allowed, "positive_score": anchor, "select": select, "draw": draw}
        if select is None:
            return ops, pool, None, {}
        q, keys = for_kernels(query), for_kernels(negative_keys)
        if not samples:
            return ops, *to_sum(ops, q, keys, pool, select, anchor), {}
        window = bounded(ops, q, keys, pool, select, anchor)
        places = sampled(ops, q, keys, window, select, *draw)  # (B, sample)
    return listed(ops), (order.unpack(places)[1], False), None, {}
