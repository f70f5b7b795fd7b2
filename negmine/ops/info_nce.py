"""The op info_nce, which computes the InfoNCE loss and its gradients, and its autograd function."""

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
    """x_b = scale * q_b . positive_b. The negatives are the columns of the pool, or those between two of its ranks if `ranks` is
    given, as in logsumexp. If hard > 0 and pairs + with_query > 0, the synthetic negatives that mix_logsumexp draws from the
    ranks [skip, skip + hard) of the pool are added. ranks and hard > 0 cannot be combined.
    lse_b = log-sum-exp of scale * s + bias over all negatives. num_kept, num_above and sort_keys are as in logsumexp.
    num_mixed_b = pairs + with_query if the query has a negative to mix, else 0.
    rows_b = log(1 + exp(lse_b - x_b)), or lse_b - x_b if decoupled; 0, without gradient, if there is no negative.
    d_query and d_scale: the gradients of rows_b with respect to q_b and scale.
    weight_b = scale * d rows_b / d lse_b, the weight for logsumexp_grad_keys. The gradient of the positive is -weight_b q_b.
    total_b = log(exp(x_b) + exp(lse_b)), or lse_b if decoupled.""",
)


class InfoNCE(torch.autograd.Function):
    """The loss of each row (B,). With a pivot, also total, num_kept, num_above and num_mixed (B,), which have no gradient.

    The gradients with respect to query and scale are computed in the forward pass. The gradient with respect to positive_key is
    -weight * query. The gradients of the keys and of the bias are computed in backward by other kernels, only if they are needed.
    bias is the bias of the pool if it requires grad, else None. arguments are pivot, decoupled, ranks, hard, skip and the draws,
    in the order of the op.
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
        counts = [] if pivot is None else counts  # each output costs time in autograd
        ctx.mark_non_differentiable(*counts)
        ctx.set_materialize_grads(False)  # outputs without a gradient get None instead of zeros
        return rows, *counts

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_rows, *_):
        query, scale, d_query, d_scale, weight, lse, *rest = ctx.saved_tensors
        wants_query, wants_positive, wants_keys, wants_scale, wants_bias, *_ = ctx.needs_input_grad
        if d_rows is None:  # the loss does not contribute to what is differentiated
            return (None,) * 8
        to_query = to_positive = to_keys = to_scale = to_bias = None
        if wants_query:  # the product is written in the dtype of the query
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
            sums = scale[None], lse[None], (factor / scale)[None]  # grad_bias takes several scales, here one
            to_bias = grad_bias(ctx.kernels, query, negative_keys, *sums, (*tensors, ctx.same_label))  # (K,)
        return to_query, to_positive, to_keys, to_scale, to_bias, None, None, None
