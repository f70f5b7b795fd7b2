"""Sums over the keys of all ranks, which are sent around a ring. A rank stores its own keys and those of one other rank.

Each rank has as many keys as queries. Key b is the positive of query b and not one of its negatives. The log-sum-exps over the
keys of each rank, and the weighted means of keys that give the gradient of the queries, are merged in the order in which the keys
arrive. In backward, the keys are sent around the ring again together with their gradients, which return to the rank of the keys.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine import reference
from negmine.collectives import Ranks
from negmine.ops.backends import Kernels
from negmine.ops.first_derivative import first_derivative_only
from negmine.ops.pool import Pool, usable
from negmine.ops.vectors import for_kernels, widened


def _passing_by(ranks: Ranks, query: Tensor, keys: Tensor) -> Iterator[tuple[Tensor, Pool]]:
    """The keys (B, D) of each rank, starting with this rank, and the pool without each query's positive."""
    own = torch.arange(len(query), device=query.device)  # (B,)
    for owner, chunk in ranks.ring(keys):
        yield chunk, Pool(query_ids=own, negative_ids=own) if owner == ranks.rank else Pool()


def _grad_keys(ranks: Ranks, query: Tensor, keys: Tensor, of_one_rank: Callable[[Tensor, Pool], Tensor]) -> Tensor:
    """The gradient (B, D) of this rank's keys, summed over all ranks.

    of_one_rank(keys, pool) is the contribution of this rank's queries to the gradient of some keys.
    """
    receive = None
    for chunk, pool in _passing_by(ranks, query, keys):
        own_part = of_one_rank(chunk, pool)
        receive = ranks.pass_on(own_part if receive is None else own_part + receive(), tag=1)
    assert receive is not None
    return receive()


class RingLogSumExp(torch.autograd.Function):
    """The log-sum-exp (B,) of scale * s over the keys of all ranks except the query's own positive.

    If kernels is None, dense products are used. query_dtype and keys_dtype are the storage dtypes; keys are sent in keys_dtype.
    """

    @staticmethod
    def forward(ctx, query, keys, scale, kernels, ranks, query_dtype, keys_dtype):
        q, own = for_kernels(query).to(query_dtype), for_kernels(keys).to(keys_dtype)
        lse = torch.full((len(q),), -torch.inf, dtype=scale.dtype, device=q.device)  # (B,)
        mean = torch.zeros_like(q, dtype=scale.dtype)  # (B, D)
        for chunk, pool in _passing_by(ranks, q, own):
            part, part_mean = _log_sum(kernels, q, chunk, scale, pool)
            merged = torch.logaddexp(lse, part)
            shift = merged.masked_fill(merged == -torch.inf, 0.0)
            mean = mean * (lse - shift).exp()[:, None] + part_mean * (part - shift).exp()[:, None]
            lse = merged
        ctx.kernels, ctx.ranks = kernels, ranks
        ctx.dtypes = query.dtype, keys.dtype
        ctx.save_for_backward(q, own, scale, lse, mean)
        return lse

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_lse):
        q, own, scale, lse, mean = ctx.saved_tensors
        weight = d_lse * scale  # (B,)
        d_query = (weight[:, None] * mean).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        d_keys = d_scale = None
        if ctx.needs_input_grad[1]:
            numbers = scale, lse, weight
            d_keys = _grad_keys(
                ctx.ranks, q, own, lambda chunk, pool: _log_sum_grad_keys(ctx.kernels, q, chunk, *numbers, pool)
            ).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            d_scale = (d_lse * (q.to(mean.dtype) * mean).sum(1)).sum()
        return d_query, d_keys, d_scale, None, None, None, None


class RingSoftplusSum(torch.autograd.Function):
    """total (B,): the sum of log(1 + exp(scale * s + offset)) over the keys of all ranks except the query's positive.

    The arguments are those of RingLogSumExp.
    """

    @staticmethod
    def forward(ctx, query, keys, scale, offset, kernels, ranks, query_dtype, keys_dtype):
        q, own = for_kernels(query).to(query_dtype), for_kernels(keys).to(keys_dtype)
        sums: Any = (0.0, 0.0, 0.0)  # total (B,), sigmoid_keys (B, D), sigmoid_sum (B,)
        for chunk, pool in _passing_by(ranks, q, own):
            part = _softplus(kernels, q, chunk, scale, offset, pool)
            sums = [total + more for total, more in zip(sums, part, strict=True)]
        total, sigmoid_keys, sigmoid_sum = sums
        ctx.kernels, ctx.ranks = kernels, ranks
        ctx.dtypes = query.dtype, keys.dtype
        ctx.save_for_backward(q, own, scale, offset, sigmoid_keys, sigmoid_sum)
        return total

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_total):
        q, own, scale, offset, sigmoid_keys, sigmoid_sum = ctx.saved_tensors
        weight = d_total * scale  # (B,)
        d_query = (weight[:, None] * sigmoid_keys).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        d_keys = None
        if ctx.needs_input_grad[1]:
            numbers = scale, offset, weight
            d_keys = _grad_keys(
                ctx.ranks, q, own, lambda chunk, pool: _softplus_grad_keys(ctx.kernels, q, chunk, *numbers, pool)
            ).to(ctx.dtypes[1])
        d_scale = (d_total * (q.to(sigmoid_keys.dtype) * sigmoid_keys).sum(1)).sum()
        return d_query, d_keys, d_scale, (d_total * sigmoid_sum).sum(), None, None, None, None


def _dense(query: Tensor, keys: Tensor, pool: Pool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query and keys in the dtype of the computation, scores (B, K), and the pairs outside the pool (B, K)."""
    query, keys = widened(query), widened(keys)
    scores, allowed = reference.scores_of(query, keys), usable(pool, query, keys)
    return query, keys, scores, torch.zeros_like(scores, dtype=torch.bool) if allowed is None else ~allowed


def _log_sum(kernels: Kernels | None, query: Tensor, keys: Tensor, scale: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """The log-sum-exp (B,) over the pool, and the mean of its keys weighted by the softmax (B, D)."""
    if kernels is not None:
        lse, mean, *_ = kernels.logsumexp(query, keys, scale[None], None, True, 0, None, *pool)
        return lse[0], mean[0]
    _, keys, scores, outside = _dense(query, keys, pool)
    x = (scale * scores).masked_fill(outside, -torch.inf)  # (B, K)
    return x.logsumexp(1), x.softmax(1).masked_fill(outside, 0.0) @ keys


def _log_sum_grad_keys(
    kernels: Kernels | None, query: Tensor, keys: Tensor, scale: Tensor, lse: Tensor, weight: Tensor, pool: Pool
) -> Tensor:
    """(K, D): the sum over queries of weight_b exp(scale s - lse_b) query_b over the pool."""
    if kernels is not None:
        return kernels.logsumexp_grad_keys(query, keys, scale, lse, weight, *pool)
    query, _, scores, outside = _dense(query, keys, pool)
    p = (scale * scores - lse[:, None]).exp().masked_fill(outside, 0.0)  # (B, K)
    return (weight[:, None] * p).T @ query


def _softplus(
    kernels: Kernels | None, query: Tensor, keys: Tensor, scale: Tensor, offset: Tensor, pool: Pool
) -> tuple[Tensor, Tensor, Tensor]:
    """total (B,), sigmoid_keys (B, D) and sigmoid_sum (B,) of the pool."""
    if kernels is not None:
        return kernels.softplus_sum(query, keys, scale, offset, True, *pool)[:3]
    _, keys, scores, outside = _dense(query, keys, pool)
    x = scale * scores + offset  # (B, K)
    sigmoid = x.sigmoid().masked_fill(outside, 0.0)
    return (-F.logsigmoid(-x)).masked_fill(outside, 0.0).sum(1), sigmoid @ keys, sigmoid.sum(1)


def _softplus_grad_keys(
    kernels: Kernels | None, query: Tensor, keys: Tensor, scale: Tensor, offset: Tensor, weight: Tensor, pool: Pool
) -> Tensor:
    """(K, D): the sum over queries of weight_b sigmoid(scale s + offset) query_b over the pool."""
    if kernels is not None:
        return kernels.softplus_sum_grad_keys(query, keys, scale, offset, weight, *pool)
    query, _, scores, outside = _dense(query, keys, pool)
    return (weight[:, None] * (scale * scores + offset).sigmoid().masked_fill(outside, 0.0)).T @ query
