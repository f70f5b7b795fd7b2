"""The op info_nce, a whole step of the InfoNCE loss, and the autograd function over it."""

import torch

from negmine.ops.first_derivative import first_derivative_only
from negmine.ops.logsumexp import grad_bias
from negmine.ops.pool import narrow
from negmine.ops.registry import declare
from negmine.ops.vectors import for_kernels

INFO_NCE = declare(
    "info_nce(query: vectors[B, D], positive_key: vectors[B, D], negative_keys: vectors[K, D], scale: fp32[], pivot?: fp32[B], "
    "want_gradient: bool, decoupled: bool, ranks?: int64[B, 2], hard: int, skip: int, *draws, *pool) "
    "-> rows: fp32[B], d_query: fp32[B if want_gradient else 0, D], d_scale: fp32[B if want_gradient else 0], weight: fp32[B], "
    "lse: fp32[B], total: fp32[B], num_kept: int64[B], num_above: int64[B], num_mixed: int64[B], "
    "sort_keys: int64[B, 0 if ranks is None else 2]",
    """x_b = scale * q_b . positive_b. The negatives are those of the pool, between two of its ranks where `ranks` is given, as
    in logsumexp; and, where hard > 0 and pairs + with_query > 0, the synthetic ones that mix_logsumexp draws from ranks
    [skip, skip + hard) of the pool. ranks and hard > 0 do not go together.
    lse_b = log-sum-exp of scale * s + bias over all of them; num_kept, num_above, sort_keys as in logsumexp; num_mixed_b =
    pairs + with_query where the query has a parent to mix, else 0.
    rows_b = log(1 + exp(lse_b - x_b)), or lse_b - x_b where decoupled; 0, without gradient, where there is no negative.
    d_query, d_scale: of rows_b by q_b and by scale.
    weight_b = scale * d rows_b / d lse_b: what logsumexp_grad_keys takes; the positive's gradient is -weight_b q_b.
    total_b = log(exp(x_b) + exp(lse_b)), or lse_b where decoupled.""",
)


class InfoNCE(torch.autograd.Function):
    """The op info_nce: loss of each row (B,), and with a pivot total, num_kept, num_above and num_mixed (B,), without gradient.

    The gradients of the rows with respect to query and scale are computed in the forward pass, and that with respect to
    positive_key is -weight query. The gradients of the keys and of the bias are second kernels, which run only if those require
    grad. bias is that of the pool if it requires grad, else None.
    arguments are pivot, decoupled, ranks, hard, skip and the draws, as the op takes them.
    """

    @staticmethod
    def forward(ctx, query, positive_key, negative_keys, scale, bias, kernels, arguments, pool):
        wants_query, _, wants_keys, wants_scale, wants_bias, *_ = ctx.needs_input_grad
        pivot, *rest = arguments
        q, positive, keys = for_kernels(query), for_kernels(positive_key), for_kernels(negative_keys)
        rows, d_query, d_scale, weight, lse, *counts, sort_keys = kernels.info_nce(
            q, positive, keys, scale.detach(), pivot, wants_query or wants_scale, *rest, *pool
        )
        ctx.kernels, ctx.positive_dtype = kernels, positive_key.dtype
        saved = [query, scale, d_query, d_scale, weight, lse]
        if wants_keys or wants_bias:
            if sort_keys.shape[1]:
                pool = narrow(pool, *sort_keys.unbind(1))
            *tensors, ctx.same_label = pool
            saved += [negative_keys, *tensors]
        ctx.save_for_backward(*saved)
        counts = [] if pivot is None else counts  # each output costs a call of autograd
        ctx.mark_non_differentiable(*counts)
        ctx.set_materialize_grads(False)  # outputs without a gradient get None instead of zeros
        return rows, *counts

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_rows, *_):
        query, scale, d_query, d_scale, weight, lse, *rest = ctx.saved_tensors
        wants_query, wants_positive, wants_keys, wants_scale, wants_bias, *_ = ctx.needs_input_grad
        if d_rows is None:  # the loss does not contribute to the result
            return (None,) * 8
        to_query = to_positive = to_keys = to_scale = to_bias = None
        if wants_query:  # the product writes it in the dtype of the query
            to_query = torch.mul(d_query, d_rows[:, None], out=torch.empty_like(query))  # (B, D)
        if wants_positive or wants_keys or wants_bias:
            factor = d_rows * weight  # (B,)
        if wants_positive:
            to_positive = (-factor[:, None] * query).to(ctx.positive_dtype)  # (B, D)
        if wants_keys or wants_bias:
            negative_keys, *tensors = rest
        if wants_keys:
            q, keys = for_kernels(query), for_kernels(negative_keys)
            to_keys = ctx.kernels.logsumexp_grad_keys(q, keys, scale, lse, factor, *tensors, ctx.same_label)
            to_keys = to_keys.to(negative_keys.dtype)  # (K, D)
        if wants_scale:
            to_scale = (d_rows * d_scale).sum()
        if wants_bias:
            sums = scale[None], lse[None], (factor / scale)[None]  # of one scale
            to_bias = grad_bias(ctx.kernels, query, negative_keys, *sums, (*tensors, ctx.same_label))  # (K,)
        return to_query, to_positive, to_keys, to_scale, to_bias, None, None, None
