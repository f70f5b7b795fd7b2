"""The op prefix_logsumexp, log-sum-exps over prefixes of the vectors at several widths, and its autograd function."""

from collections.abc import Sequence

import torch

from negmine.ops.first_derivative import first_derivative_only
from negmine.ops.logsumexp import grad_bias, grad_keys
from negmine.ops.registry import declare
from negmine.ops.vectors import for_kernels

MAX_WIDTHS = 16

PREFIX_LOGSUMEXP = declare(
    "prefix_logsumexp(query: vectors[B, D], negative_keys: vectors[K, D], widths: ints[W], scale: fp32[], want_mean: bool, "
    "*pool) -> lse: fp32[W, B], mean: fp32[W, B if want_mean else 0, D], num_kept: int64[B]",
    f"""The results of logsumexp for query[:, :w] and negative_keys[:, :w] at each w of widths, in one pass. mean is 0 beyond the
    width. widths are ascending, from 1 to D, at most {MAX_WIDTHS}. lower and upper must be None. The scores of a width are sums
    over the segments between widths, so their rounding may differ from that of logsumexp.""",
)


class PrefixLogSumExp(torch.autograd.Function):
    """lse (W, B) at each of several widths, and num_kept (B,).

    As in LogSumExp, the gradients of query and scale are computed in the forward pass, and those of the keys and the bias in
    backward by other kernels, one width after the other. widths: ascending ints. bias is the bias of the pool if it requires
    grad, else None.
    """

    @staticmethod
    def forward(ctx, query, negative_keys, scale, bias, widths: Sequence[int], kernels, *pool):
        want_mean = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        lse, mean, num_kept = kernels.prefix_logsumexp(
            for_kernels(query), for_kernels(negative_keys), widths, scale.detach(), want_mean, *pool
        )
        *tensors, ctx.same_label = pool
        ctx.kernels, ctx.width, ctx.widths = kernels, len(pool), widths
        saves_keys = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(query, scale, lse, mean, *((negative_keys, *tensors) if saves_keys else ()))
        ctx.mark_non_differentiable(num_kept)
        return lse, num_kept

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_lse, _):
        query, scale, lse, mean, *rest = ctx.saved_tensors
        d_query = d_keys = d_scale = d_bias = None
        weight = d_lse * scale  # (W, B)
        if ctx.needs_input_grad[0]:
            d_query = torch.einsum("wb,wbd->bd", weight, mean).to(query.dtype)  # (B, D)
        if ctx.needs_input_grad[2]:
            d_scale = (d_lse * (query.float() * mean).sum(2)).sum()
        if rest:
            keys, *tensors = rest
            pool = (*tensors, ctx.same_label)
            if ctx.needs_input_grad[1]:
                d_keys = torch.zeros_like(keys, dtype=torch.float32)  # (K, D)
            for at, width in enumerate(ctx.widths):
                q, prefix = query[:, :width], keys[:, :width]
                if d_keys is not None:
                    sums, factor = lse[at : at + 1], weight[at : at + 1]
                    d_keys[:, :width] += grad_keys(ctx.kernels, q, prefix, scale[None], sums, factor, pool)
                if ctx.needs_input_grad[3]:
                    sums, factor = lse[at : at + 1], d_lse[at : at + 1]
                    at_width = grad_bias(ctx.kernels, q, prefix, scale[None], sums, factor, pool)  # (K,)
                    d_bias = at_width if d_bias is None else d_bias + at_width
            d_keys = None if d_keys is None else d_keys.to(keys.dtype)
        return d_query, d_keys, d_scale, d_bias, None, None, *([None] * ctx.width)
