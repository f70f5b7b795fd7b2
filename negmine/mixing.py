"""Synthetic negatives: the vectors themselves, and the log-sum-exp of their logits without the vectors."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from negmine import backends, checks, reference
from negmine.derivatives import first_only
from negmine.mining import for_kernels, working
from negmine.options import Mix
from negmine.pool import Pool, check_pool, usable


class Mixed(NamedTuple):
    """What mix_negatives returns; pairs come first, then the mixes with the query."""

    vectors: Tensor  # (B, S, D)
    parents: Tensor  # (B, S, 2) int64, -1 = the query itself, or no parent where the pool is empty
    coefficients: Tensor  # (B, S) fp32, the share of the first parent


@cache
def _on_device(table: Tensor, device: torch.device) -> Tensor:
    """Copied once: a copy from pageable memory can be neither captured in a CUDA graph nor made without waiting."""
    return table.to(device)


def draws_of(mix: Mix, device: torch.device, seed: int, step: int, row_offset: int) -> tuple:
    """The draw arguments that every mixing kernel takes, in the order of kernels/README.md."""
    table = mix.quantiles  # (4097,) or None
    if table is not None and table.device != device:
        table = table.to(device) if torch.compiler.is_compiling() else _on_device(table, device)
    return (mix.pairs, mix.with_query, *mix.pair_range, *mix.query_range, mix.distinct, table, seed, step, row_offset)


def hard_index(ops: backends.Launchers, query: Tensor, negative_keys: Tensor, mix: Mix, pool: Pool) -> Tensor:
    """The parents to draw from: ranks [skip, skip + hard) of each pool, (B, hard) int64, -1 past its end."""
    deepest = min(mix.skip + mix.hard, max(len(negative_keys), mix.skip + 1))
    return ops.mine_hardest(query, negative_keys, deepest, *pool)[1][:, mix.skip :].contiguous()


class MixLogSumExp(torch.autograd.Function):
    """lse_b (B,) = log sum over the synthetic negatives h of b of exp(scale * query_b . h), the h detached.

    The softmax mean of the h is kept from the forward pass: d lse / d query = scale * mean, d lse / d scale = query . mean.
    """

    @staticmethod
    def forward(ctx, query, scale, negative_keys, parents_index, ops, draws):
        want_mean = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        keys = for_kernels(negative_keys)
        lse, mean = ops.mix_logsumexp(for_kernels(query), keys, parents_index, scale.detach(), want_mean, *draws)
        ctx.save_for_backward(query, scale, mean)
        return lse

    @staticmethod
    @first_only
    def backward(ctx, d_lse):
        query, scale, mean = ctx.saved_tensors
        d_query = d_scale = None
        if ctx.needs_input_grad[0]:
            d_query = ((d_lse * scale)[:, None] * mean).to(query.dtype)  # (B, D)
        if ctx.needs_input_grad[1]:
            d_scale = (d_lse * (query.float() * mean).sum(1)).sum()
        return d_query, d_scale, None, None, None, None


def mix_negatives(
    query: Tensor,
    negative_keys: Tensor,
    mix: Mix,
    *,
    seed: int = 0,
    step: int = 0,
    row_offset: int = 0,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    negative_mask: Tensor | None = None,
    backend: str | None = None,
) -> Mixed:
    """Mix new negatives for each query from its hardest ones (MoCHi, Kalantidis et al. 2020); `Mix` states the formulas.

    query (B, D), negative_keys (K, D), masks: as in mine_hardest. `info_nce(mix=..., seed=..., step=...)` uses exactly these
    draws. They are counter-based: a function of (seed, step), the global row (row_offset + b) and the slot, whatever the
    backend, batch split or world size.
    seed, step: ints in [0, 2**32); row_offset: the global index of the first query, rank * B in data-parallel training.

    Returns Mixed(vectors (B, S, D) in query's dtype, parents (B, S, 2) int64, coefficients (B, S) fp32). With mix.detach=False
    the vectors carry gradient to query and negative_keys (on the reference). A query without negatives gets zero vectors and
    parents -1. Raises ValueError or TypeError for input that does not fit.
    """
    op = "mix_negatives"
    checks.require_query_and_keys(op, query, negative_keys)
    if mix is None:
        raise checks.refuse(op, "mix", "a negmine.Mix", None, TypeError)
    checks.require_options(op, mix=mix)
    checks.require_draw(op, seed, step, row_offset)
    masks = (negative_mask, query_ids, negative_ids, query_labels, negative_labels)
    pool = check_pool(op, query, negative_keys, *masks)
    dense = "" if mix.detach or not (query.requires_grad or negative_keys.requires_grad) else "mix.detach=False"
    ops = backends.choose(op, ("mine_hardest", "mix_negatives"), backend, (query, negative_keys), dense)
    if ops is None:
        vectors, parents, coefficients = reference.mix_negatives(
            working(query),
            working(negative_keys),
            mix,
            usable(pool, query, negative_keys),
            seed=seed,
            step=step,
            row_offset=row_offset,
        )
        return Mixed(vectors.to(query.dtype), parents, coefficients.float())
    with torch.no_grad():
        q, keys = for_kernels(query), for_kernels(negative_keys)
        index = hard_index(ops, q, keys, mix, pool)
        return Mixed(*ops.mix_negatives(q, keys, index, *draws_of(mix, query.device, seed, step, row_offset)))
