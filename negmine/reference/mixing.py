"""Synthetic negatives: their random draws (kernels/README.md, "Draws") and their vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine.ops import philox
from negmine.options import Mix
from negmine.reference.selection import mine_hardest


def mix_draws(
    hard_index: Tensor, mix: Mix, dtype: torch.dtype, seed: int, step: int | Tensor, row_offset: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Draw parents (B, S, 2) int64 (-1 = the query) and coefficients (B, S) from hard_index (B, hard).

    kernels/README.md states how.
    """
    device = hard_index.device
    hard_index = only_if_enabled(hard_index, mix)
    count = (hard_index >= 0).sum(1, keepdim=True)  # (B, 1)
    slots = torch.arange(mix.total, device=device)  # (S,)
    rows = torch.arange(len(hard_index), device=device) + row_offset  # (B,)
    u0, u1, u2, _ = philox.words(rows, slots, philox.STREAM_MIX, seed, step)  # (B, S) each
    is_pair = slots < mix.pairs  # (S,)

    first = philox.below(u0, count)  # (B, S)
    must_differ = mix.distinct & is_pair & (count > 1)  # (B, S)
    second = philox.below(u1, count - must_differ.long())
    second = second + (must_differ & (second >= first)).long()
    parents = torch.stack([hard_index.gather(1, first), hard_index.gather(1, second)], 2)  # (B, S, 2)
    parents[:, :, 0] = parents[:, :, 0].masked_fill(~is_pair, -1)

    table = None if mix.quantiles is None else mix.quantiles.to(device, non_blocking=True)  # (4097,)
    fraction = philox.unit(u2, table).to(dtype)  # (B, S)
    low, high = (torch.where(is_pair, p, w) for p, w in zip(mix.pair_range, mix.query_range, strict=True))  # (S,) each
    return parents, (low + (high - low) * fraction).to(dtype).masked_fill(count == 0, 0.0)


def only_if_enabled(hard_index: Tensor, mix: Mix) -> Tensor:
    """hard_index (B, hard) if the mix is enabled, else -1 everywhere."""
    return hard_index if mix.enabled is None else torch.where(mix.enabled, hard_index, -1)


def mixed(query: Tensor, negative_keys: Tensor, parents: Tensor, coefficients: Tensor) -> Tensor:
    """Vectors (B, S, D) of the given parents (B, S, 2) and coefficients (B, S); zeros if there is no second parent."""
    if negative_keys.shape[-2] == 0:
        return query.new_zeros(*coefficients.shape, query.shape[1])
    rows = torch.arange(len(query), device=query.device)[:, None]  # (B, 1), used for keys (B, M, D)
    n_a, n_b = (
        negative_keys[column] if negative_keys.dim() == 2 else negative_keys[rows, column]
        for column in parents.clamp_min(0).unbind(2)
    )  # (B, S, D) each
    n_a = torch.where((parents[:, :, :1] >= 0), n_a, query[:, None, :])
    vectors = F.normalize(coefficients[:, :, None] * n_a + (1 - coefficients[:, :, None]) * n_b, dim=2, eps=1e-12)
    return vectors.masked_fill(parents[:, :, 1:] < 0, 0.0)


def mix_negatives(
    query: Tensor,
    negative_keys: Tensor,
    mix: Mix,
    usable: Tensor | None = None,
    *,
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """vectors (B, S, D), parents (B, S, 2) int64 (-1 = the query), coefficients (B, S) of the first parent.

    Pairs come first, then mixes with the query. A query without negatives has parents -1, coefficients 0 and vectors 0.
    """
    _, hard_index = mine_hardest(query.detach(), negative_keys.detach(), mix.skip + mix.hard, usable)
    parents, coefficients = mix_draws(hard_index[:, mix.skip :], mix, query.dtype, seed, step, row_offset)
    vectors = mixed(query, negative_keys, parents, coefficients)
    return (vectors.detach() if mix.detach else vectors), parents, coefficients
