"""SynCo: six kinds of synthetic negatives. The mixing kernel computes four of them; two are computed from gathered vectors."""

from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine import reference
from negmine.losses.methods import TAGS, Logits, draw_of, logits, reduced
from negmine.ops import backends, checks, philox
from negmine.ops.accumulate import narrowed
from negmine.ops.column_lists import gather_rows
from negmine.ops.first_derivative import fused
from negmine.ops.mix_logsumexp import MixLogSumExp
from negmine.ops.negatives import check_negatives
from negmine.ops.pool import usable
from negmine.ops.vectors import for_kernels, promoted, scale_of, widened
from negmine.ops.windows import Draw
from negmine.options import is_int, is_real, is_scalar, plain_fields
from negmine.reference.selection import row_logsumexp


@dataclass(frozen=True)
class Kinds:
    """The numbers of synthetic negatives of each kind for SynCo.

    Each is computed from a negative n, drawn from the `hard` hardest negatives of the query q, and divided by its norm.

        interpolated   a q + (1 - a) n          a in [0, 0.5)      as with_query in MoCHi
        extrapolated   q + b (n - q)            b in [1, 1.5)      easier than n, because it is farther from q in that direction
        mixed          g n_a + (1 - g) n_b      g in [0, 1)        as pairs in MoCHi; n_a may be n_b
        noised         n + sigma z              z standard normal (D,)
        graded         n + delta q              q is the gradient of the score with respect to n
        signed         n + eta sign(q)

    Parameters
    ----------
    hard : int
        The number of hardest negatives from which n is drawn.
    interpolated, extrapolated, mixed, noised, graded, signed : int
        The number of synthetic negatives of each kind for a query.
    sigma, delta, eta : float or Tensor
        The constants of the last three kinds.

    Raises
    ------
    ValueError
        If a value is invalid.

    Notes
    -----
    Negatives and coefficients are drawn from uniform distributions. The noised and signed vectors (B, noised + signed, D)
    are stored. The others are mixes of two vectors, whose logits are summed without storing the vectors.

    References
    ----------
    Giakoumoglou and Stathaki 2024 (arXiv 2410.02401).

    Examples
    --------
    >>> kinds = negmine.recipes.Kinds(hard=100, interpolated=10, extrapolated=0)
    >>> kinds.interpolated
    10
    """

    hard: int = 1024
    interpolated: int = 256
    extrapolated: int = 256
    mixed: int = 256
    noised: int = 64
    graded: int = 64
    signed: int = 64
    sigma: float | Tensor = 0.01
    delta: float | Tensor = 0.01
    eta: float | Tensor = 0.01
    enabled: Tensor | None = field(init=False, repr=False, compare=False, default=None)  # () bool, None = True

    def __post_init__(self) -> None:
        plain_fields(self, *COUNTS, "hard", "sigma", "delta", "eta")
        for name in (*COUNTS, "hard"):
            value, least = getattr(self, name), int(name == "hard")
            if not is_int(value) or value < least:
                raise ValueError(f"Kinds: {name} must be an int of {least} or more, got {value!r}")
        for name in ("sigma", "delta", "eta"):
            value = getattr(self, name)
            if not is_scalar(value) and (not is_real(value) or value < 0):
                raise ValueError(f"Kinds: {name} must be a number of 0 or more, got {value!r}")

    def enabled_where(self, condition: Tensor) -> "Kinds":
        """A copy that adds no synthetic negatives while condition, a () bool tensor, is False. Schedules use it for a warm-up."""
        changed = copy(self)
        object.__setattr__(changed, "enabled", condition)
        return changed

    def row_offset(self, name: str, row_offset: int | Tensor) -> int | Tensor:
        """The row offset for the random draws of a kind. Its high bits are the number of the kind, so that the draws differ."""
        return row_offset + ((COUNTS.index(name) + 1) << 48)


COUNTS = ("interpolated", "extrapolated", "mixed", "noised", "graded", "signed")
PAPER = Kinds()


def synco_vectors(query: Tensor, negative_keys: Tensor, index: Tensor, kinds: Kinds, draw: Draw) -> Tensor:
    """The synthetic negatives (B, S, D) of all `kinds`, in the order of COUNTS, detached. This function defines the kinds.

    index (B, hard) int64 are the hard negatives of each query, padded with -1. A query without hard negatives gets zeros.
    """
    q, keys = query.detach()[:, None], negative_keys.detach()  # (B, 1, D), (K, D)
    seed, step, row_offset = draw
    count = (index >= 0).sum(1, keepdim=True)  # (B, 1)
    vectors = []
    for name in COUNTS:
        slots = torch.arange(getattr(kinds, name), device=q.device)  # (S,)
        rows = torch.arange(len(q), device=q.device) + kinds.row_offset(name, row_offset)  # (B,)
        u0, u1, u2, _ = philox.words(rows, slots, philox.STREAM_MIX, seed, step)  # (B, S) each
        drawn = (index.gather(1, philox.below(u, count)) for u in (u1, u0))  # (B, S) each
        n, other = (gather_rows(keys, at, keys.dtype) for at in drawn)  # (B, S, D) each
        f = philox.unit(u2, None).to(q.dtype)[:, :, None]  # (B, S, 1)
        if name == "interpolated":
            h = 0.5 * f * q + (1 - 0.5 * f) * n
        elif name == "extrapolated":
            b = 1.5 - 0.5 * f
            h = q + b * (n - q)
        elif name == "mixed":
            h = f * other + (1 - f) * n
        elif name == "noised":
            h = n + kinds.sigma * philox.normals(rows, slots, keys.shape[1], seed, step).to(q.dtype)
        elif name == "graded":
            h = n + kinds.delta * q
        else:
            h = n + kinds.eta * q.sign()
        vectors.append(F.normalize(h, dim=2, eps=1e-12))
    return torch.cat(vectors, 1).masked_fill((count == 0)[:, :, None], 0.0)


def synco(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any,
    *,
    kinds: Kinds = PAPER,
    temperature: float | Tensor = 0.2,
    reduction: str = "mean",
    **pool: Any,
) -> Tensor:
    """SynCo (Giakoumoglou and Stathaki 2024, arXiv 2410.02401; giakoumoglou/synco synco/builder.py).

        loss = log(1 + exp(log(sum_j exp(x_j) + sum_h exp(q . h / T)) - x))      h: the synthetic negatives of `Kinds`, detached

    Synthetic negatives are added to the real ones. Their parents are chosen among all negatives that the masks allow, before
    select. Random draws depend on seed, step, kind, global row and slot, but not on the backend, the batch split or the number
    of ranks. The public code differs in three ways: it normalises its queue over the wrong dimension, so that rows have norm
    0.04 at first; it exchanges the switches of kinds 4 and 5; and one version of its kinds 5 and 6 moves along noise of 1e-5
    instead of the gradient.
    """
    op = "synco"
    if not isinstance(kinds, Kinds):
        raise checks.refuse(op, "kinds", "a negmine.recipes.Kinds", kinds, TypeError)
    x = logits(op, query, positive_key, negative_keys, temperature, pool)
    negative_keys, masks = check_negatives(
        op, query, positive_key, negative_keys, *(pool.get(name) for name in TAGS), options=("select",)
    )
    query, positive_key, negative_keys = promoted(query, positive_key, negative_keys)
    assert x.query is not None
    draw = draw_of(op, pool)
    scale = scale_of(temperature, query)
    with torch.no_grad():
        kernels = ("mine_hardest", "mix_logsumexp")
        vectors = query, positive_key, negative_keys
        chosen = backends.choose(op, kernels, pool.get("backend"), vectors, "", masks.extra)
    chosen, query = narrowed(chosen, query, None, None), x.query  # the same tensor as in the sum over the queue
    with torch.no_grad():
        if chosen is None:
            allowed = usable(masks, query, negative_keys)
            index = reference.mine_hardest(widened(query), widened(negative_keys), kinds.hard, allowed)[1]
        else:
            N = min(kinds.hard, max(len(negative_keys), 1))
            q, n = for_kernels(query), for_kernels(negative_keys)
            index = chosen.mine_hardest(q, n, N, False, *masks)[1]
        if kinds.enabled is not None:
            index = torch.where(kinds.enabled, index, -1)
    sums = [x.lse.masked_fill(~x.has_negative, -torch.inf)]
    gathered = kinds
    if chosen is not None:
        ranges = {"interpolated": (0.0, 0.5), "extrapolated": (-0.5, 0.0), "mixed": (0.0, 1.0)}
        if not isinstance(kinds.delta, Tensor):  # the kernel takes numbers
            ranges["graded"] = (kinds.delta / (1 + kinds.delta),) * 2
        no_rows: dict[str, Any] = dict.fromkeys(ranges, 0)
        gathered = replace(kinds, **no_rows)
        for name, low_high in ranges.items():
            counts = (getattr(kinds, name), 0) if name == "mixed" else (0, getattr(kinds, name))
            key = Draw(draw.seed, draw.step, kinds.row_offset(name, draw.row_offset)).on_device(query)
            draws = (*counts, *low_high, *low_high, False, None, *key)
            if sum(counts):
                sums.append(fused(MixLogSumExp, query, scale, negative_keys.detach(), index, chosen, draws))
    if any(getattr(gathered, name) for name in COUNTS):
        with torch.no_grad():
            h = synco_vectors(widened(query), widened(negative_keys), index, gathered, draw)  # (B, S, D)
        x_made = (widened(query)[:, None] * h).sum(2) / temperature  # (B, S); autocast would round a matmul
        is_empty = (index < 0).all(1)  # (B,)
        sums.append(row_logsumexp(x_made.masked_fill(is_empty[:, None], 0.0)).masked_fill(is_empty, -torch.inf))
    parts = torch.stack(sums, 1)  # (B, sums)
    has_negative = ~(parts == -torch.inf).all(1)  # (B,) NaN counts as a value
    lse = row_logsumexp(parts.masked_fill(~has_negative[:, None], 0.0))
    return reduced(op, F.softplus(lse - x.positive), Logits(x.positive, lse, has_negative), reduction)
