"""Synthetic negatives: the vectors themselves, and the log-sum-exp of their logits without the vectors."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from negmine import backends, checks, reference
from negmine.derivatives import first_only
from negmine.listed import rows_of
from negmine.options import Mix
from negmine.pool import Pool, check_pool, pieces, usable
from negmine.selection import for_kernels, working

PIECE = 1 << 22  # numbers of the mixes that are in memory at one time where gradient flows through them


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


def deepest(mix: Mix, K: int) -> int:
    """How many places to mine so that ranks [skip, skip + hard) of each pool are among them."""
    return min(mix.skip + mix.hard, max(K, mix.skip + 1))


def parents_of(mined: Tensor, mix: Mix) -> Tensor:
    """The parents to draw from: index (B, deepest) of mine_hardest -> (B, hard) int64, -1 past the pool's end."""
    return mined[:, mix.skip :].contiguous()


def hard_index(ops: backends.Launchers, query: Tensor, negative_keys: Tensor, mix: Mix, pool: Pool) -> Tensor:
    """The parents to draw from, by a mining of their own: (B, hard) int64."""
    return parents_of(ops.mine_hardest(query, negative_keys, deepest(mix, ops.rows(negative_keys)), *pool)[1], mix)


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


def _mixed_rows(query: Tensor, keys: Tensor, parents: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For a few queries: mixes h = m / max(||m||, eps) (B, S, D), scores q . h (B, S) and d score / d m (B, S, D)."""
    q, c = query.float(), coefficients[:, :, None]  # (B, D), (B, S, 1)
    keys = keys if len(keys) else query.new_zeros(1, query.shape[1])  # parents are -1 then
    a, b = (
        torch.where(side[:, :, None] < 0, q[:, None], keys[side.clamp_min(0)].float()) for side in parents.unbind(2)
    )  # (B, S, D) each; one that is absent reads no key
    m = c * a + (1 - c) * b
    norm = m.norm(dim=2, keepdim=True)  # (B, S, 1)
    length = norm.clamp_min(1e-12)
    h = m / length
    score = (h * q[:, None]).sum(2)  # (B, S)
    turned = q[:, None] - torch.where(norm < 1e-12, 0.0, score[:, :, None]) * h
    return h, score, turned / length


class FollowedMixLogSumExp(torch.autograd.Function):
    """MixLogSumExp with the gradient that flows through the synthetic negatives to the query in them and to the keys.

    d lse / d m_s = scale p_s (q - (q . h_s) h_s) / ||m_s||, of which the first parent receives c_s and the second 1 - c_s.
    The mixes are made a few queries at a time, at most PIECE numbers of them; keys that require grad make them again in backward.
    """

    @staticmethod
    def forward(ctx, query, scale, negative_keys, parents, coefficients, ops):
        absent = parents[:, :, 1] < 0  # (B, S)
        lse = torch.empty(len(query), dtype=torch.float32, device=query.device)
        d_query, d_scale = torch.empty(query.shape, dtype=torch.float32, device=query.device), torch.empty_like(lse)
        for part in pieces(parents.shape[1] * query.shape[1], parents.shape[0], PIECE):
            c = coefficients[part]
            h, score, d_m = _mixed_rows(query[part], negative_keys, parents[part], c)
            x = (scale * score).masked_fill(absent[part], -torch.inf)
            lse[part] = x.logsumexp(1) if x.shape[1] else -torch.inf
            p = (x - lse[part, None]).exp().masked_fill(absent[part], 0.0)  # (B, S)
            inside = p * c * (parents[part, :, 0] < 0)  # (B, S) the query's own share of its mixes
            d_query[part] = scale * ((p[:, :, None] * h).sum(1) + (inside[:, :, None] * d_m).sum(1))
            d_scale[part] = (p * score).sum(1)
        ctx.ops = ops
        rest = (negative_keys, parents, coefficients, lse) if ctx.needs_input_grad[2] else ()
        ctx.save_for_backward(query, scale, d_query, d_scale, *rest)
        return lse

    @staticmethod
    @first_only
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
                d_keys += ctx.ops.listed_grad_keys(d_m.flatten(0, 1), to.flatten(0, 1), share.flatten(0, 1), K)
            d_keys = d_keys.to(negative_keys.dtype)
        d_query = (d_lse[:, None] * d_query).to(query.dtype) if ctx.needs_input_grad[0] else None
        return d_query, (d_lse * d_scale).sum() if ctx.needs_input_grad[1] else None, d_keys, None, None, None


def mixed_logsumexp(
    ops: backends.Launchers,
    query: Tensor,
    negative_keys: Tensor,
    scale: Tensor,
    index: Tensor,
    mix: Mix,
    draw: tuple[int, int, int],
) -> Tensor:
    """lse (B,) of the synthetic negatives of parents index (B, hard), under the key `draw` of seed, step and row_offset."""
    if mix.detach:
        draws = draws_of(mix, query.device, *draw)
        return MixLogSumExp.apply(query, scale, negative_keys.detach(), index, ops, draws)
    keys, rows = rows_of(negative_keys, index)
    parents, coefficients = reference.mix_draws(rows, mix, torch.float32, *draw)
    return FollowedMixLogSumExp.apply(query, scale, keys, parents, coefficients, ops)


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
    the vectors carry gradient to query and negative_keys. A query without negatives gets zero vectors and
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
    ops = backends.choose(op, ("mine_hardest", "mix_negatives"), backend, (query, negative_keys))
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
        if mix.detach or not (query.requires_grad or negative_keys.requires_grad):
            return Mixed(*ops.mix_negatives(q, keys, index, *draws_of(mix, query.device, seed, step, row_offset)))
        parents, coefficients = reference.mix_draws(index, mix, torch.float32, seed, step, row_offset)
    vectors = reference.mixed(working(query), negative_keys, parents, coefficients)
    return Mixed(vectors.to(query.dtype), parents, coefficients)
