"""The op mix_logsumexp, and the autograd functions of log-sum-exps over synthetic negatives."""

import torch
from torch import Tensor

from negmine.ops.first_derivative import first_derivative_only
from negmine.ops.pool import pieces
from negmine.ops.registry import declare
from negmine.ops.vectors import for_kernels

PIECE = 1 << 22  # how many numbers of synthetic negatives are in memory at one time if they need gradients

MIX_LOGSUMEXP = declare(
    "mix_logsumexp(query: vectors[B, D], negative_keys: vectors[K, D], hard_index: int64[B, N], scale: fp32[], want_mean: bool, "
    "*draws) -> lse: fp32[B], mean: fp32[B if want_mean else 0, D]",
    """The log-sum-exp of scale * q_b . h over the S synthetic negatives h of each query, and their mean, weighted by the softmax.
    The synthetic negatives (B, S, D) are never stored.""",
)


class MixLogSumExp(torch.autograd.Function):
    """lse_b (B,) = log sum over the synthetic negatives h of query b of exp(scale * query_b . h), with detached h.

    d lse / d query = scale * mean and d lse / d scale = query . mean, where mean is the mean of the h weighted by their softmax
    probabilities. It is computed in the forward pass.
    """

    @staticmethod
    def forward(ctx, query, scale, negative_keys, parents_index, kernels, draws):
        want_mean = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        keys = for_kernels(negative_keys)
        lse, mean = kernels.mix_logsumexp(for_kernels(query), keys, parents_index, scale.detach(), want_mean, *draws)
        ctx.save_for_backward(query, scale, mean)
        return lse

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_lse):
        query, scale, mean = ctx.saved_tensors
        d_query = d_scale = None
        if ctx.needs_input_grad[0]:
            d_query = ((d_lse * scale)[:, None] * mean).to(query.dtype)  # (B, D)
        if ctx.needs_input_grad[1]:
            d_scale = (d_lse * (query.float() * mean).sum(1)).sum()
        return d_query, d_scale, None, None, None, None


def _mixed_rows(query: Tensor, keys: Tensor, parents: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Synthetic negatives h = m / max(||m||, eps) (B, S, D), their scores q . h (B, S) and d score / d m (B, S, D)."""
    q, c = query.float(), coefficients[:, :, None]  # (B, D), (B, S, 1)
    keys = keys if len(keys) else query.new_zeros(1, query.shape[1])  # without keys, all parents are -1
    a, b = (
        torch.where(side[:, :, None] < 0, q[:, None], keys[side.clamp_min(0)].float()) for side in parents.unbind(2)
    )  # (B, S, D) each; a parent of -1 is the query
    m = c * a + (1 - c) * b
    norm = m.norm(dim=2, keepdim=True)  # (B, S, 1)
    length = norm.clamp_min(1e-12)
    h = m / length
    score = (h * q[:, None]).sum(2)  # (B, S)
    gradient = q[:, None] - torch.where(norm < 1e-12, 0.0, score[:, :, None]) * h
    return h, score, gradient / length


class DifferentiatedMixLogSumExp(torch.autograd.Function):
    """MixLogSumExp with the gradient through the synthetic negatives, to the keys and to the query that is mixed into them.

    d lse / d m_s = scale p_s (q - (q . h_s) h_s) / ||m_s||, of which the first parent receives c_s and the second 1 - c_s.
    The synthetic negatives are computed for a few queries at a time, at most PIECE numbers. If the keys require grad, they are
    computed again in backward.
    """

    @staticmethod
    def forward(ctx, query, scale, negative_keys, parents, coefficients, kernels):
        absent = parents[:, :, 1] < 0  # (B, S)
        lse = torch.empty(len(query), dtype=torch.float32, device=query.device)
        d_query, d_scale = torch.empty(query.shape, dtype=torch.float32, device=query.device), torch.empty_like(lse)
        for part in pieces(parents.shape[1] * query.shape[1], parents.shape[0], PIECE):
            c = coefficients[part]
            h, score, d_m = _mixed_rows(query[part], negative_keys, parents[part], c)
            x = (scale * score).masked_fill(absent[part], -torch.inf)
            lse[part] = x.logsumexp(1) if x.shape[1] else -torch.inf
            p = (x - lse[part, None]).exp().masked_fill(absent[part], 0.0)  # (B, S)
            inside = p * c * (parents[part, :, 0] < 0)  # (B, S) p times the share of the query in the mix
            d_query[part] = scale * ((p[:, :, None] * h).sum(1) + (inside[:, :, None] * d_m).sum(1))
            d_scale[part] = (p * score).sum(1)
        ctx.kernels = kernels
        rest = (negative_keys, parents, coefficients, lse) if ctx.needs_input_grad[2] else ()
        ctx.save_for_backward(query, scale, d_query, d_scale, *rest)
        return lse

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_lse):
        query, scale, d_query, d_scale, *rest = ctx.saved_tensors
        d_keys = None
        if ctx.needs_input_grad[2]:
            negative_keys, parents, coefficients, lse = rest
            K, D = negative_keys.shape
            d_keys = torch.zeros(K, D, dtype=torch.float32, device=query.device)
            for part in pieces(parents.shape[1] * D, parents.shape[0], PIECE):
                c, to = coefficients[part], parents[part]
                _, score, d_m = _mixed_rows(query[part], negative_keys, to, c)
                p = (scale * score - lse[part, None]).exp().masked_fill(to[:, :, 1] < 0, 0.0)  # (B, S)
                share = (d_lse[part, None] * scale * p)[:, :, None] * torch.stack([c, 1 - c], 2)  # (B, S, 2)
                d_keys += ctx.kernels.gathered_grad_keys(d_m.flatten(0, 1), to.flatten(0, 1), share.flatten(0, 1), K)
            d_keys = d_keys.to(negative_keys.dtype)
        d_query = (d_lse[:, None] * d_query).to(query.dtype) if ctx.needs_input_grad[0] else None
        return d_query, (d_lse * d_scale).sum() if ctx.needs_input_grad[1] else None, d_keys, None, None, None
