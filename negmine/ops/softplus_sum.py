"""The op softplus_sum, and its autograd function."""

import torch

from negmine.ops.first_derivative import first_derivative_only
from negmine.ops.registry import declare
from negmine.ops.vectors import for_kernels

SOFTPLUS_SUM = declare(
    "softplus_sum(query: vectors[B, D], negative_keys: vectors[K, D], scale: fp32[], offset: fp32[], want_sigmoid_keys: bool, "
    "*pool) -> total: fp32[B], sigmoid_keys: fp32[B if want_sigmoid_keys else 0, D], sigmoid_sum: fp32[B], num_kept: int64[B]",
    """l_bk = scale * s_bk + offset + bias_k. total_b = sum over the pool of log(1 + exp(l_bk)), 0 if the pool is empty;
    sigmoid_keys_b = sum over the pool of sigmoid(l_bk) n_k; sigmoid_sum_b = sum over the pool of sigmoid(l_bk);
    num_kept_b = number of columns in the pool. Small terms keep the relative precision of fp32: where l is far below 0,
    log(1 + e^l) is about e^l and is not rounded to 0.""",
)


class SoftplusSum(torch.autograd.Function):
    """total_b (B,) = sum over b's pool of log(1 + exp(l_bk)), l_bk = scale * s_bk + offset + bias_k.

    d total / d query = scale * sigmoid_keys, d total / d scale = query . sigmoid_keys and d total / d offset = sigmoid_sum are
    computed in the forward pass. d total / d negative_keys = scale * sigmoid(l_bk) query_b and d total / d bias = sigmoid(l_bk)
    are computed in backward by other kernels, only if the keys or the bias require grad. bias is the bias of the pool if it
    requires grad, else None.
    """

    @staticmethod
    def forward(ctx, query, negative_keys, scale, offset, bias, kernels, *pool):
        want_sigmoid_keys = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        numbers = scale.detach(), offset.detach()
        total, sigmoid_keys, sigmoid_sum, _ = kernels.softplus_sum(
            for_kernels(query), for_kernels(negative_keys), *numbers, want_sigmoid_keys, *pool
        )
        *tensors, ctx.same_label = pool
        ctx.kernels, ctx.width = kernels, len(pool)
        keys = (negative_keys, *tensors) if ctx.needs_input_grad[1] or ctx.needs_input_grad[4] else ()
        ctx.save_for_backward(query, *numbers, sigmoid_keys, sigmoid_sum, *keys)
        return total

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_total):
        query, scale, offset, sigmoid_keys, sigmoid_sum, *rest = ctx.saved_tensors
        d_query = d_keys = d_scale = d_offset = d_bias = None
        if ctx.needs_input_grad[0]:
            d_query = ((d_total * scale)[:, None] * sigmoid_keys).to(query.dtype)  # (B, D)
        if rest:
            keys, *tensors = rest
            pool = (*tensors, ctx.same_label)
        if ctx.needs_input_grad[1]:
            d_keys = ctx.kernels.softplus_sum_grad_keys(
                for_kernels(query), for_kernels(keys), scale, offset, d_total * scale, *pool
            )
            d_keys = d_keys.to(keys.dtype)  # (K, D)
        if ctx.needs_input_grad[2]:
            d_scale = (d_total * (query.float() * sigmoid_keys).sum(1)).sum()
        if ctx.needs_input_grad[3]:
            d_offset = (d_total * sigmoid_sum).sum()
        if ctx.needs_input_grad[4]:
            q, n = for_kernels(query), for_kernels(keys)
            d_bias = ctx.kernels.softplus_sum_grad_bias(q, n, scale, offset, d_total, *pool)  # (K,), or (B, M) of lists
        return d_query, d_keys, d_scale, d_offset, d_bias, None, *([None] * ctx.width)
