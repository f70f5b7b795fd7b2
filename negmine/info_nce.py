"""info_nce: the contrastive loss over a queue of negatives, with its gradient, without the (B, K) matrix.

Fused path: x_pos is a row-wise product; the negatives enter as log-sum-exps that a kernel returns together with their softmax
means, so that every gradient is known in the forward pass and the queue may be overwritten before backward. What is left is
arithmetic on (B,) tensors, differentiated by autograd, or left to the op info_nce where a backend has it. The dense definition
is negmine/reference.py.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine import backends, checks, order, reference
from negmine.derivatives import first_only
from negmine.false_negatives import Found, find, without
from negmine.listed import listed, own
from negmine.logsumexp import LogSumExp, LogSumExpPair, MeanScore, scale_of
from negmine.mixing import deepest, draws_of, hard_index, mixed_logsumexp, parents_of
from negmine.options import FalseNegatives, Mix, Select, Weight
from negmine.pool import Pool, bounded, check_pool, readable, sampled, to_sum, usable
from negmine.selection import for_kernels, frozen, score_of_positive, working


class InfoNCEStats(NamedTuple):
    """What info_nce returns beside the loss; none carries gradient."""

    logsumexp: Tensor  # (B,) log of the denominator
    positive_rank: Tensor  # (B,) int64: valid negatives scored above the positive, whatever select keeps
    num_negatives: Tensor  # (B,) int64: real negatives in the denominator
    clamped: Tensor  # (B,) bool: Weight's floor is active, the row's negatives get no gradient
    num_empty: Tensor  # () int64: rows without any negative, whose loss is 0


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    select: Select | None = None,
    mix: Mix | None = None,
    weight: Weight | None = None,
    false_negatives: FalseNegatives | None = None,
    support: Tensor | None = None,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    negative_mask: Tensor | None = None,
    decoupled: bool = False,
    reduction: str = "mean",
    seed: int = 0,
    step: int = 0,
    row_offset: int = 0,
    backend: str | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, InfoNCEStats]:
    """InfoNCE of each query against its positive and a queue of negatives (MoCo, He et al. 2020, moco/builder.py).

        loss_b = -x_b + log(exp(x_b) + sum over kept j of exp(x_bj)),   x = inner product / temperature

    query (B, D): carries gradient. positive_key (B, D): carries gradient where it requires it.
    negative_keys (K, D) shared by all queries, or (B, M, D) each query's own. Keys that require grad
        get one. Frozen keys may be overwritten between forward and backward: the gradient is computed in the forward pass.
    temperature: a number above 0, or a 0-d floating tensor that receives gradient. MoCo v1: 0.07, v2: 0.2.
    select: which negatives stay; mix: which synthetic ones are added; weight: how they weigh; see those classes.
    false_negatives with support (B, V, D): negatives found by other views of the same image are cancelled or attracted.
    query_ids (B,) and negative_ids (K,), query_labels (B,) and negative_labels (K,): equal = not a negative.
    negative_mask (K,) or (B, K) bool: True = usable. Masked negatives leave the pool before ranking, and the denominator.
    decoupled: the positive leaves the denominator (Yeh et al. 2021, arXiv 2110.06848); the loss may be negative.
    reduction: "mean" over the B rows, "sum" or "none".
    seed, step, row_offset: the key of mix's and select.sample's draws and the global index of the first query.
    backend: None chooses; "cuda", "triton", "cpu" or "reference" insists.

    Vectors are used as given (normalise them for cosine scores). Returns the loss, fp32 (float64 for float64 input), 0-d or
    (B,); with return_stats also InfoNCEStats. A row without negatives has loss 0 and no gradient, and is counted. Selection,
    mixing and masks carry no gradient; weights do unless weight.detach. Double backward is refused.
    Raises ValueError or TypeError for input that does not fit, before any work.
    """
    op = "info_nce"
    checks.require_query_and_keys(op, query, negative_keys, own_keys=True)
    checks.require_positive(op, positive_key, query)
    checks.require_temperature(op, temperature)
    checks.require_options(op, select=select, mix=mix, weight=weight, false_negatives=false_negatives)
    if (false_negatives is None) != (support is None):
        given, missing = ("support", "false_negatives") if support is not None else ("false_negatives", "support")
        raise checks.refuse(op, missing, f"given together with {given}", None)
    if support is not None:
        checks.require_vectors(op, "support", support, "(B, V, D)", (3,), query)
        if support.shape[0] != query.shape[0] or support.shape[1] == 0:
            raise checks.refuse(
                op, "support", f"of shape (B, V, D) with query's B = {query.shape[0]} and V of 1 or more", support
            )
    checks.require_bool(op, "decoupled", decoupled)
    checks.require_bool(op, "return_stats", return_stats)
    checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
    checks.require_draw(op, seed, step, row_offset)
    masks = (negative_mask, query_ids, negative_ids, query_labels, negative_labels)
    pool = check_pool(op, query, negative_keys, *masks)
    needed = _ops_for(negative_keys, select, mix, weight, false_negatives)
    ops = backends.choose(op, needed, backend, (query, positive_key, negative_keys), also=backends.SPARED)
    options: dict[str, Any] = {"select": select, "mix": mix, "weight": weight, "false_negatives": false_negatives}
    stats: InfoNCEStats | None
    if ops is None:
        allowed = usable(pool, query, negative_keys)
        rows, found = reference.info_nce(
            working(query),
            working(positive_key),
            frozen(negative_keys, allowed),
            temperature=temperature,
            usable=allowed,
            **options,
            support=None if support is None else working(support),
            decoupled=decoupled,
            seed=seed,
            step=step,
            row_offset=row_offset,
        )
        stats = InfoNCEStats(**found)
    else:
        rows, stats = fused(
            ops,
            query,
            positive_key,
            negative_keys,
            temperature,
            pool,
            **options,
            support=support,
            decoupled=decoupled,
            draw=(seed, step, row_offset),
            want_rank=return_stats,
        )
    loss = reference.reduced(rows, reduction)
    return loss if stats is None or not return_stats else (loss, stats)


def _ops_for(
    negative_keys: Tensor,
    select: Select | None,
    mix: Mix | None,
    weight: Weight | None,
    false_negatives: FalseNegatives | None,
) -> tuple[str, ...]:
    """The kernels that a call needs."""
    needed = dict.fromkeys(backends.summing(negative_keys), True)
    mixes, samples = mix is not None and mix.total > 0, select is not None and select.sample is not None
    needed["rank_thresholds"] = needed["count_negatives"] = select is not None
    needed["mine_hardest"] = mixes or (false_negatives is not None and false_negatives.top_k is not None)
    needed["logsumexp_mine"] = mixes
    needed["mix_logsumexp"] = mixes
    needed["logsumexp_pair"] = weight is not None and weight.beta > 0
    attracts = false_negatives is not None and false_negatives.mode == "attract"
    lists = negative_keys.dim() == 3 or samples or attracts or (mix is not None and mixes and not mix.detach)
    needed["listed_logsumexp"] = needed["listed_grad_keys"] = lists
    return tuple(op for op, is_needed in needed.items() if is_needed)


def fused(
    ops: backends.Launchers,
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor,
    temperature: float | Tensor,
    masks: Pool,
    *,
    select: Select | None = None,
    mix: Mix | None = None,
    weight: Weight | None = None,
    false_negatives: FalseNegatives | None = None,
    support: Tensor | None = None,
    decoupled: bool = False,
    draw: tuple[int, int, int] = (0, 0, 0),
    want_rank: bool = False,
) -> tuple[Tensor, InfoNCEStats | None]:
    """Loss (B,) and, where the ranks are wanted, statistics from the kernels `ops`; meaning as reference.info_nce."""
    scale = scale_of(temperature, query)
    lists = listed(ops)
    ops = own(ops) if negative_keys.dim() == 3 else ops
    found: Found | None = None
    if false_negatives is not None and support is not None:
        negative_keys = readable(negative_keys, masks)  # the mask less what is found is (B, K)
        with torch.no_grad():
            found = find(ops, support.detach(), negative_keys.detach(), false_negatives, masks)
            masks = without(masks, found.mask)
    apart = (
        weight is not None
        or (select is not None and select.sample is not None)
        or (mix is not None and not mix.detach)
        or (false_negatives is not None and false_negatives.mode == "attract")
    )
    if ops.info_nce is not None and not apart and not torch.compiler.is_compiling():
        return finished(ops, query, positive_key, negative_keys, scale, masks, select, mix, decoupled, draw, want_rank)
    positive_score = score_of_positive(query, positive_key)  # (B,)
    x_positive = positive_score * scale  # (B,)
    q, keys = for_kernels(query), for_kernels(negative_keys)
    pivot = positive_score.detach() if want_rank else None
    mixes, paired = mix is not None and mix.total > 0, weight is not None and weight.beta > 0
    kept_by, columns = ops, tuple(masks)
    also: int | Tensor | None = (
        None  # found by the pass that sums: negatives so deep, or the columns between these ranks
    )
    with torch.no_grad():
        if select is not None:
            score = positive_score.detach()
            if select.sample is not None:
                window = bounded(ops, q, keys, masks, select, score)
                places = sampled(ops, q, keys, window, select, *draw)  # (B, sample)
                kept_by, columns = lists, (order.unpack(places)[1], False)
            elif paired:
                columns = tuple(bounded(ops, q, keys, masks, select, score))
            else:
                window, also = to_sum(ops, q, keys, masks, select, score)
                columns = tuple(window)
        elif mix is not None and mixes and not paired:
            also = deepest(mix, ops.rows(negative_keys))

    if weight is not None and paired:
        scales = torch.stack([scale * (1.0 + weight.beta), scale * weight.beta])  # (2,)
        (lse, importance), kept, above = LogSumExpPair.apply(query, negative_keys, scales, pivot, kept_by, *columns)
    else:
        lse, kept, above, met = LogSumExp.apply(query, negative_keys, scale, pivot, also, kept_by, *columns)
        importance = None
    if want_rank and kept_by is lists:  # the rank is among all valid negatives, not among those drawn
        above = ops.logsumexp(q, keys, scale.detach(), pivot, False, *masks)[3]
    some = kept > 0  # (B,)
    clamped = torch.zeros_like(some)
    if weight is not None:
        if importance is None:
            importance = kept.clamp_min(1).float().log()  # LSE of zeros
        log_sum, clamped = reference.log_weighted_sum(
            lse.masked_fill(~some, 0.0),
            importance.masked_fill(~some, 0.0),
            x_positive,
            kept.clamp_min(1),
            1.0 / scale,
            weight,
        )
        lse, clamped = log_sum.masked_fill(~some, -torch.inf), clamped & some
    if mix is not None and mixes:
        with torch.no_grad():
            mined = isinstance(also, int)  # met (B, also) then
            index = parents_of(met, mix) if mined else hard_index(ops, q, keys, mix, masks)  # (B, hard)
        lse_mixed = mixed_logsumexp(ops, query, negative_keys, scale, index, mix, draw)  # (B,)
        some = some | (index >= 0).any(1)
        both = torch.logaddexp(lse.masked_fill(~some, 0.0), lse_mixed.masked_fill(~some, 0.0))
        lse = both.masked_fill(~some, -torch.inf)

    pull, extra = x_positive, None  # (B,) mean of the positive logits; log-sum-exp of the attracted ones
    if false_negatives is not None and found is not None and false_negatives.mode == "attract":
        by, them = (ops, tuple(Pool(found.mask))) if found.columns is None else (lists, (found.columns, False))
        extra, count, *_ = LogSumExp.apply(query, negative_keys, scale, None, None, by, *them)
        mean_score, _ = MeanScore.apply(query, negative_keys, by, *them)
        pull = (x_positive + count * mean_score * scale) / (1 + count)
    if decoupled:
        rows = torch.where(some, lse.masked_fill(~some, 0.0) - pull, 0.0 * x_positive)
        denominator = lse
    elif extra is None:
        rows = -F.logsigmoid(x_positive - lse)  # softplus of the difference: accurate where the loss is tiny
        denominator = torch.logaddexp(x_positive.detach(), lse.detach())
    else:
        total = torch.logaddexp(torch.logaddexp(x_positive, extra), lse)  # (B,)
        rows = torch.where(some, total - pull, 0.0 * x_positive)
        denominator = torch.where(some, total, x_positive).detach()
    if not want_rank:
        return rows, None
    return rows, InfoNCEStats(denominator.detach(), above, kept, clamped, (~some).sum())


class Finished(torch.autograd.Function):
    """Rows (B,) of the loss in one op, with their denominators (B,), kept (B,) and above (B,); every gradient is known at once.

    d row / d query, / d scale come with the rows; d row / d positive = -weight query; the keys' is a second kernel, run only for
    keys that require grad. mixes: the parents (B, hard) and draws of synthetic negatives, or None.
    """

    @staticmethod
    def forward(ctx, query, positive_key, negative_keys, scale, pivot, decoupled, mixes, ops, *pool):
        wants = ctx.needs_input_grad
        q, positive, keys = (for_kernels(t) for t in (query, positive_key, negative_keys))
        factor, want_gradient = scale.detach(), wants[0] or wants[3]
        mixed = (None, None)
        if mixes is not None:
            mixed = ops.mix_logsumexp(q, keys, mixes[0], factor, want_gradient, *mixes[1])
        rows, d_query, d_scale, weight, lse, *found = ops.info_nce(
            q, positive, keys, factor, pivot, want_gradient, decoupled, *mixed, *pool
        )
        *tensors, ctx.same_label = pool
        ctx.ops, ctx.width, ctx.positive = ops, len(pool), positive_key.dtype
        ctx.save_for_backward(
            query, scale, d_query, d_scale, weight, lse,
            positive_key if wants[1] else None, *((negative_keys, *tensors) if wants[2] else ()),
        )  # fmt: skip
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)  # three launches of zeros
        return rows, *found

    @staticmethod
    @first_only
    def backward(ctx, d_rows, *_):
        query, scale, d_query, d_scale, weight, lse, _, *rest = ctx.saved_tensors
        wants = ctx.needs_input_grad
        if d_rows is None:  # what came after drops the loss
            return (None,) * len(wants)
        to_query = to_positive = to_keys = to_scale = None
        if wants[0]:  # written in the query's dtype by the product itself
            to_query = torch.mul(d_query, d_rows[:, None], out=torch.empty_like(query))  # (B, D)
        pull = d_rows * weight if wants[1] or wants[2] else weight  # (B,)
        if wants[1]:
            to_positive = (-pull[:, None] * query).to(ctx.positive)  # (B, D)
        if wants[2]:
            negative_keys, *tensors = rest
            q, keys = for_kernels(query), for_kernels(negative_keys)
            to_keys = ctx.ops.logsumexp_grad_keys(q, keys, scale, lse, pull, *tensors, ctx.same_label)
            to_keys = to_keys.to(negative_keys.dtype)  # (K, D)
        if wants[3]:
            to_scale = (d_rows * d_scale).sum()
        return to_query, to_positive, to_keys, to_scale, None, None, None, None, *([None] * ctx.width)


def finished(
    ops: backends.Launchers,
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor,
    scale: Tensor,
    masks: Pool,
    select: Select | None,
    mix: Mix | None,
    decoupled: bool,
    draw: tuple[int, int, int],
    want_rank: bool,
) -> tuple[Tensor, InfoNCEStats | None]:
    """`fused` by the op info_nce, for what it covers; statistics where the ranks are wanted, too."""
    q, keys, columns, mixes, score = for_kernels(query), for_kernels(negative_keys), masks, None, None
    with torch.no_grad():
        if want_rank or (select is not None and select.has_margin):
            score = score_of_positive(query, positive_key)  # (B,)
        if select is not None:
            columns = bounded(ops, q, keys, masks, select, score)
        if mix is not None and mix.total:
            mixes = hard_index(ops, q, keys, mix, masks), draws_of(mix, query.device, *draw)
    pivot = score if want_rank else None
    rows, total, kept, above = Finished.apply(
        query, positive_key, negative_keys, scale, pivot, decoupled, mixes, ops, *columns
    )
    if not want_rank:
        return rows, None
    some = kept > 0 if mixes is None else (kept > 0) | (mixes[0] >= 0).any(1)  # (B,)
    return rows, InfoNCEStats(total, above, kept, torch.zeros_like(some), (~some).sum())
