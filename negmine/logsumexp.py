"""The log-sum-exp over each query's columns, and their mean score, with the gradients that the forward pass already knows.

A `pool` is whatever tail of arguments the launchers in `ops` take: a Pool (negmine/pool.py), or a list (negmine/listed.py).
"""

import torch
from torch import Tensor

from negmine.mining import for_kernels


def scale_of(temperature: float | Tensor, query: Tensor) -> Tensor:
    """1 / temperature as the 0-d fp32 tensor that kernels read; carries the temperature's gradient."""
    if isinstance(temperature, Tensor):
        return temperature.to(device=query.device, dtype=torch.float32).reciprocal()
    return torch.full((), 1.0 / temperature, dtype=torch.float32, device=query.device)


class LogSumExp(torch.autograd.Function):
    """lse_b (B,) = log sum over b's pool of exp(scale * s_bk), with kept (B,) and above (B,) of the kernel.

    d lse / d query = scale * mean, d lse / d scale = query . mean, both known after the forward pass;
    d lse / d negative_keys = scale * p_bk query_b is a second kernel, run only for keys that require grad.
    """

    @staticmethod
    def forward(ctx, query, negative_keys, scale, pivot, ops, *pool):
        want_mean = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        keys = for_kernels(negative_keys)
        lse, mean, kept, above = ops.logsumexp(for_kernels(query), keys, scale.detach(), pivot, want_mean, *pool)
        *tensors, ctx.same_label = pool
        ctx.ops, ctx.width = ops, len(pool)
        wants_keys = ctx.needs_input_grad[1]
        ctx.save_for_backward(query, scale, lse, mean, *((negative_keys, *tensors) if wants_keys else ()))
        ctx.mark_non_differentiable(kept, above)
        return lse, kept, above

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_lse, _d_kept, _d_above):
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
    @torch.autograd.function.once_differentiable
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
