"""Mining: the hardest negatives of each query, and the scores at given ranks and quantiles, without the (B, K) matrix."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from negmine import backends, checks, order, reference
from negmine.options import Select, is_real
from negmine.pool import Pool, bounded, check_pool, sampled, usable


class Mined(NamedTuple):
    """What mine_hardest returns."""

    scores: Tensor  # (B, N) fp32, descending, -inf where fewer candidates exist
    index: Tensor  # type: ignore[assignment]  # (B, N) int64, -1 where fewer exist; hides tuple.index


def working(vectors: Tensor) -> Tensor:
    """Vectors in the dtype that the reference computes in: float64 stays, everything else is fp32."""
    return vectors if vectors.dtype == torch.float64 else vectors.float()


def for_kernels(vectors: Tensor) -> Tensor:
    """Detached vectors whose last dimension is contiguous, as kernels take them."""
    vectors = vectors.detach()
    return vectors if vectors.stride(-1) == 1 or vectors.shape[-1] == 1 else vectors.contiguous()


def frozen(negative_keys: Tensor, seen: Tensor | None) -> Tensor:
    """Keys (K, D) or (B, M, D) as the dense path saves them for backward: a copy where the caller may overwrite the queue.

    seen (B, K) bool: rows that no query sees are zeros, for they may hold anything, NaN included.
    """
    keys = working(negative_keys)
    if seen is not None:
        return torch.where((seen if keys.dim() == 3 else seen.any(0))[..., None], keys, 0.0)
    return keys if keys.requires_grad else keys.clone()


def score_of_positive(query: Tensor, positive_key: Tensor) -> Tensor:
    """Inner product of each query with its positive: (B,) fp32, or float64 where both are."""
    return (working(query) * working(positive_key)).sum(1)


def mine_hardest(
    query: Tensor,
    negative_keys: Tensor,
    N: int,
    *,
    positive_key: Tensor | None = None,
    select: Select | None = None,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    negative_mask: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    row_offset: int = 0,
    backend: str | None = None,
) -> Mined:
    """The N hardest negatives of each query: the largest inner products, exactly, hardest first.

        s_bk = query_b . negative_keys_k;   index_b = the first N columns by (s descending, k ascending) of b's pool

    query (B, D), negative_keys (K, D): fp32, bf16 or fp16 (float64 runs on the reference), used as given.
    positive_key (B, D): needed only where select has a margin.
    select: what stays in the pool first; with a window starting at rank r the result starts there, with sample the N hardest
        of the sample.
    query_ids (B,) and negative_ids (K,), query_labels (B,) and negative_labels (K,): equal = not a negative.
    negative_mask (K,) or (B, K) bool: True = usable.
    seed, step, row_offset: the key of select.sample's draw and the global index of the first query.

    Returns Mined(scores (B, N) fp32, index (B, N) int64); past the end of a pool (-inf, -1). No gradient. Ties go to the lower
    index. A NaN score is no candidate. Raises ValueError or TypeError for input that does not fit, before any work.
    """
    op = "mine_hardest"
    checks.require_query_and_keys(op, query, negative_keys)
    checks.require_count(op, "N", N)
    checks.require_options(op, select=select)
    checks.require_draw(op, seed, step, row_offset)
    if positive_key is not None:
        checks.require_positive(op, positive_key, query)
    elif select is not None and select.has_margin:
        raise checks.refuse(op, "positive_key", "given where select has a margin", None)
    if select is not None and select.replace:
        raise checks.refuse(op, "select", "without replace: an index is mined once", select)
    masks = (negative_mask, query_ids, negative_ids, query_labels, negative_labels)
    pool = check_pool(op, query, negative_keys, *masks)
    needed = ("mine_hardest",) if select is None else ("mine_hardest", "rank_thresholds", "count_negatives")
    ops = backends.choose(op, needed, backend, (query, negative_keys))
    with torch.no_grad():
        anchor = None if positive_key is None else score_of_positive(query, positive_key)  # (B,)
        if ops is None:
            q, keys = working(query.detach()), working(negative_keys.detach())
            allowed = usable(pool, query, negative_keys)
            if select is not None:
                times = reference.multiplicity(
                    reference.scores_of(q, keys), anchor, select, allowed, seed, step, row_offset
                )
                allowed = times > 0
            scores, index = reference.mine_hardest(q, keys, N, allowed)
            return Mined(scores.float(), index)
        q, keys = for_kernels(query), for_kernels(negative_keys)
        if select is not None:
            pool = bounded(ops, q, keys, pool, select, anchor)
        if select is not None and select.sample is not None:
            places = sampled(ops, q, keys, pool, select, seed, step, row_offset)  # (B, sample)
            places = torch.nn.functional.pad(places, (0, max(0, N - select.sample)), value=order.NOWHERE)
            return Mined(*order.unpack(places.topk(N, dim=1).values))
        return Mined(*ops.mine_hardest(q, keys, N, *pool))


def rank_thresholds(
    query: Tensor,
    negative_keys: Tensor,
    ranks: int | list[int] | Tensor,
    *,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    negative_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The score at each 0-based descending rank of each query's negatives: rank 0 is the hardest.

        threshold_br = the (ranks_r)-th entry, from 0, of sorted(s_b over b's pool, descending)

    query (B, D), negative_keys (K, D), masks: as in mine_hardest.
    ranks: an int, a sequence of ints, or int tensor (R,) for all queries or (B, R) each query's own.
    Returns (B, R) fp32, -inf where the rank is negative or past the end of the pool. No gradient. NaN scores have no rank.
    Raises ValueError or TypeError for input that does not fit.
    """
    op = "rank_thresholds"
    checks.require_query_and_keys(op, query, negative_keys)
    wanted = checks.whole_numbers(op, "ranks", ranks, query.device)
    checks.require_tensor(op, "ranks", wanted, query)
    if wanted.dim() == 2 and wanted.shape[0] != query.shape[0]:
        raise checks.refuse(op, "ranks", f"of shape (R,) or (B, R) with query's B = {query.shape[0]}", wanted)
    wanted = wanted.expand(query.shape[0], wanted.shape[-1]).contiguous()  # (B, R)
    masks = (negative_mask, query_ids, negative_ids, query_labels, negative_labels)
    pool = check_pool(op, query, negative_keys, *masks)
    ops = backends.choose(op, ("rank_thresholds",), backend, (query, negative_keys))
    with torch.no_grad():
        if ops is None:
            allowed = usable(pool, query, negative_keys)
            return reference.rank_thresholds(working(query), working(negative_keys), wanted, allowed).float()
        return order.unpack(ops.rank_thresholds(for_kernels(query), for_kernels(negative_keys), wanted, *pool))[0]


def _quantiles(q: Any, device: torch.device) -> Tensor:
    """q as (R,) float64 from a number, a sequence of numbers or a floating (R,) tensor, all in [0, 1]."""
    if is_real(q):
        q = [q]
    if isinstance(q, (list, tuple)) and q and all(is_real(v) and 0 <= v <= 1 for v in q):
        return torch.stack([torch.full((), float(v), dtype=torch.float64, device=device) for v in q])
    if isinstance(q, Tensor) and q.is_floating_point() and q.dim() == 1:
        return q.double()
    raise checks.refuse("percentile", "q", "in [0, 1]: a number, a sequence of numbers or a floating (R,) tensor", q)


def percentile(
    query: Tensor,
    negative_keys: Tensor,
    q: float | list[float] | Tensor,
    *,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    negative_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Quantiles of each query's own scores, as torch.quantile's linear interpolation gives them, for any K.

        place = q * (M - 1) in the ascending order of b's pool of M;  value = lerp of its two neighbours

    query (B, D), negative_keys (K, D), masks: as in mine_hardest. q in [0, 1]: 0.95 is the score that 5 % exceed.
    A tensor q is trusted to lie in [0, 1] (reading it would synchronise).
    Returns (B, R) fp32; NaN for an empty pool, and where a NaN score is reached: it lies below everything. No gradient.
    Raises ValueError or TypeError for input that does not fit.
    """
    op = "percentile"
    checks.require_query_and_keys(op, query, negative_keys)
    wanted = _quantiles(q, query.device)  # (R,)
    checks.require_tensor(op, "q", wanted, query)
    masks = (negative_mask, query_ids, negative_ids, query_labels, negative_labels)
    pool = check_pool(op, query, negative_keys, *masks)
    ops = backends.choose(op, ("rank_thresholds", "count_negatives"), backend, (query, negative_keys))
    with torch.no_grad():
        if ops is None:
            allowed = usable(pool, query, negative_keys)
            return reference.percentile(working(query), working(negative_keys), wanted, allowed).float()
        keys, q_vectors = for_kernels(negative_keys), for_kernels(query)
        last = _pool_size(ops, q_vectors, keys, pool)[:, None] - 1  # (B, 1)
        place = last * wanted  # (B, R) float64
        ranks = torch.cat([last - place.floor().long(), last - place.ceil().long()], 1)  # (B, 2R)
        places = ops.rank_thresholds(q_vectors, keys, ranks, *pool)
        scores = order.unpack(places)[0].masked_fill(places == order.NOWHERE, torch.nan)  # (B, 2R)
        below, above = scores.chunk(2, 1)
        return torch.lerp(below, above, place.frac().float())


def _pool_size(ops: backends.Launchers, query: Tensor, negative_keys: Tensor, pool: Pool) -> Tensor:
    """(B,) int64: negatives that the masks leave each query."""
    if pool.is_everything:
        return torch.full((len(query),), len(negative_keys), dtype=torch.int64, device=query.device)
    return ops.count_negatives(query, negative_keys, *pool)
