"""The op logsumexp, and the autograd functions that call it."""

from typing import Any

import torch
from torch import Tensor

from negmine.ops.first_derivative import first_derivative_only
from negmine.ops.pool import Pool, narrow
from negmine.ops.registry import declare
from negmine.ops.vectors import for_kernels

LOGSUMEXP = declare(
    "logsumexp(query: vectors[B, D], negative_keys: vectors[K, D], scales: fp32[S], pivot?: fp32[B], want_mean: bool, N: int, "
    "ranks?: int64[B, 2], *pool) -> lse: fp32[S, B], mean: fp32[S, B if want_mean else 0, D], num_kept: int64[B], "
    "num_above: int64[B], scores: fp32[B, N], index: int64[B, N], sort_keys: int64[B, 0 if ranks is None else 2]",
    """lse_sb  = log sum over the pool of exp(x_sbk), x = scale_s * s_bk + bias_k; -inf if the pool is empty.
    mean_sb = sum over the pool of p_bk n_k, p = exp(x_sbk - lse_sb); zeros if the pool is empty. If query and keys are bf16, p
    may be rounded to bf16 in this product.
    num_kept_b = number of columns in the pool. num_above_b = number of columns that the masks allow (whatever the bounds) with
    s_bk > pivot_b, zeros if pivot is None.
    N > 0: scores and index are bit-identical to those of mine_hardest for the same pool.
    ranks: only the columns between the first and the last rank of the pool, both included, are summed and counted. A last rank
    past the end of the pool means its end. sort_keys = rank_thresholds(ranks). If the last rank is below the first, or the first
    is negative or past the end, both sort keys are INT64_MIN and nothing is summed. ranks and N > 0 cannot be combined.
    A NaN score in a pool without bounds makes lse NaN; otherwise a score of +inf makes lse +inf, and the mean may be NaN.""",
)


class LogSumExp(torch.autograd.Function):
    """lse (S, B) = log sum over each pool of exp(scale_s * s_bk + bias_k), and num_kept (B,), num_above (B,), index (B, N).

    d lse / d query = scale * mean and d lse / d scale = query . mean are computed in the forward pass. d lse / d negative_keys
    = scale * p_bk query_b and d lse / d bias = p_bk are computed in backward by other kernels, only if the keys or the bias
    require grad. bias is the bias of the pool if it requires grad, else None. pool is a Pool, or Columns for kernels over lists.
    """

    @staticmethod
    def forward(ctx, query, negative_keys, scales, bias, pivot, N, ranks, kernels, *pool):
        want_mean = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        lse, mean, num_kept, num_above, _, index, sort_keys = kernels.logsumexp(
            for_kernels(query), for_kernels(negative_keys), scales.detach(), pivot, want_mean, N, ranks, *pool
        )
        if ranks is not None:
            pool = narrow(Pool(*pool), *sort_keys.unbind(1))
        *tensors, ctx.same_label = pool
        ctx.kernels, ctx.width = kernels, len(pool)
        saves_keys = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(query, scales, lse, mean, *((negative_keys, *tensors) if saves_keys else ()))
        ctx.mark_non_differentiable(num_kept, num_above, index)
        return lse, num_kept, num_above, index

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_lse, *_):
        query, scales, lse, mean, *rest = ctx.saved_tensors
        d_query = d_keys = d_scales = d_bias = None
        weight = d_lse * scales[:, None]  # (S, B)
        if ctx.needs_input_grad[0]:
            d_query = (weight[:, :, None] * mean).sum(0).to(query.dtype)  # (B, D)
        if rest:
            negative_keys, *tensors = rest
            pool = (*tensors, ctx.same_label)
        if ctx.needs_input_grad[1]:
            d_keys = grad_keys(ctx.kernels, query, negative_keys, scales, lse, weight, pool)
        if ctx.needs_input_grad[2]:
            d_scales = (d_lse * (query.float() * mean).sum(2)).sum(1)  # (S,)
        if ctx.needs_input_grad[3]:
            d_bias = grad_bias(ctx.kernels, query, negative_keys, scales, lse, d_lse, pool)
        return d_query, d_keys, d_scales, d_bias, None, None, None, None, *([None] * ctx.width)


def grad_bias(
    kernels: Any, query: Tensor, negative_keys: Tensor, scales: Tensor, lse: Tensor, weight: Tensor, pool: tuple
) -> Tensor:
    """The gradient of the bias: the sum over s and, for a queue, over queries of weight_sb p_sbk.

    (K,) fp32 for a queue, (B, M) for lists and for keys (B, M, D). weight and lse are (S, B).
    """
    q, keys = for_kernels(query), for_kernels(negative_keys)
    parts = zip(scales.unbind(0), lse.unbind(0), weight.unbind(0), strict=True)
    each = [kernels.logsumexp_grad_bias(q, keys, scale, sums, factor, *pool) for scale, sums, factor in parts]
    return each[0] if len(each) == 1 else torch.stack(each).sum(0)


def grad_keys(
    kernels: Any, query: Tensor, negative_keys: Tensor, scales: Tensor, lse: Tensor, weight: Tensor, pool: tuple
) -> Tensor:
    """The gradient (K, D) of log-sum-exps at several scales, in the dtype of the keys. weight and lse are (S, B)."""
    q, keys = for_kernels(query), for_kernels(negative_keys)
    parts = zip(scales.unbind(0), lse.unbind(0), weight.unbind(0), strict=True)
    each = [kernels.logsumexp_grad_keys(q, keys, scale, sums, factor, *pool) for scale, sums, factor in parts]
    total = each[0] if len(each) == 1 else torch.stack(each).sum(0)
    return total.to(negative_keys.dtype)


class MeanScore(torch.autograd.Function):
    """score_b (B,) = mean over b's pool of s_bk, and num_kept (B,), computed from the mean of logsumexp at scale 0."""

    @staticmethod
    def forward(ctx, query, keys, kernels, *pool):
        zero = torch.zeros(1, dtype=torch.float32, device=query.device)
        lse, mean, num_kept, *_ = kernels.logsumexp(
            for_kernels(query), for_kernels(keys), zero, None, True, 0, None, *pool
        )
        *tensors, ctx.same_label = pool
        ctx.kernels, ctx.width = kernels, len(pool)
        ctx.save_for_backward(query, zero, lse, mean[0], *((keys, *tensors) if ctx.needs_input_grad[1] else ()))
        ctx.mark_non_differentiable(num_kept)
        return (query.float() * mean[0]).sum(1), num_kept

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_score, _d_kept):
        query, zero, lse, mean, *rest = ctx.saved_tensors
        d_query = d_keys = None
        if ctx.needs_input_grad[0]:
            d_query = (d_score[:, None] * mean).to(query.dtype)  # (B, D)
        if ctx.needs_input_grad[1]:
            keys, *tensors = rest
            d_keys = grad_keys(ctx.kernels, query, keys, zero, lse, d_score[None], (*tensors, ctx.same_label))
        return d_query, d_keys, None, *([None] * ctx.width)
