"""rank_thresholds in Triton: the sort key at given ranks of each query's pool, exact, without storing the (B, K) scores.

    sample   score evenly spaced keys, and choose two scores that bracket each rank nearly always              (sample*.py)
    scan     keep the columns in the brackets, a few percent, and count those above them, in one pass          (scan.py)
    check    the sort key is in its bracket, and its rank is not among the columns counted above it            (select_by_rank.py)
    finish   take the sort key by its rank among the kept ones, or find it by an exact search if the check fails (exact_search.py)

Two ranks share a scan. For a short queue, the sort keys of all columns are searched. Many ranks are read from the sorted scores
of all columns, which costs the same for any number of ranks. The ranks are known only on the device, so memory is reserved for
the widest bracket, that of a median.
"""

import torch
from torch import Tensor

from negmine.ops.sort_key import NOWHERE, pack

from . import tiles
from .exact_search import find_missing
from .launch import capability, launcher, score_tile
from .pool import KernelPool, kernel_pool
from .sample import sample, sort_keys
from .sample_quantiles import sample_brackets
from .scan import scan
from .select_by_rank import select_by_rank, select_certified

RANKS_PER_SCAN = 2


def thresholds_by_scan(
    query: Tensor, negative_keys: Tensor, ranks: Tensor, tile: tiles.ScoreTile, pool: KernelPool
) -> Tensor:
    """(B, R) int64 sort keys, R up to RANKS_PER_SCAN, through a sample and a scan."""
    K, R = negative_keys.shape[0], ranks.shape[1]
    plan = tiles.ranks_plan(K, R, capability(query.device))
    scores = sample(query, negative_keys, plan.size, tile, pool)  # (B, size)
    cut_lo, cut_hi = sample_brackets(scores, ranks, K, tile.BLOCK_K)
    survivors = scan(query, negative_keys, cut_lo, cut_hi, plan.capacity, tile, pool)
    out, missing = select_certified(survivors, ranks, cut_lo, cut_hi)  # (B, R) each
    find_missing(query, negative_keys, missing, out, tile, pool)
    return out


def thresholds_by_rows(
    query: Tensor, negative_keys: Tensor, ranks: Tensor, tile: tiles.ScoreTile, pool: KernelPool
) -> Tensor:
    """(B, R) int64 sort keys, from whole rows searched once for each rank."""
    return select_by_rank(sort_keys(query, negative_keys, tile, pool), ranks)


def thresholds_by_sort(
    query: Tensor, negative_keys: Tensor, ranks: Tensor, tile: tiles.ScoreTile, pool: KernelPool
) -> Tensor:
    """(B, R) int64 sort keys, from whole rows sorted once; a stable sort leaves ties in the order of their index."""
    K = negative_keys.shape[0]
    scores, index = sample(query, negative_keys, K, tile, pool).sort(dim=1, descending=True, stable=True)  # (B, K) each
    outside = scores.isnan().sum(1, keepdim=True)  # (B, 1), which a sort puts first
    found = (ranks >= 0) & (ranks < K - outside)  # (B, R)
    at = torch.where(found, ranks + outside, 0)  # (B, R)
    return torch.where(found, pack(scores.gather(1, at), index.gather(1, at)), NOWHERE)


def thresholds(query: Tensor, negative_keys: Tensor, ranks: Tensor, pool: KernelPool) -> Tensor:
    """sort_keys (B, R) int64 at ranks (B, R) int64."""
    B, K, R = query.shape[0], negative_keys.shape[0], ranks.shape[1]
    if not (B and K and R):
        return torch.full((B, R), NOWHERE, dtype=torch.int64, device=query.device)
    tile = score_tile(query, negative_keys, pool)
    target = capability(query.device)
    plan, step = None, R
    if tiles.is_sorted(K, R, target):
        find = thresholds_by_sort
    elif tiles.is_dense(K, 0, target):
        find = thresholds_by_rows
    else:
        find, step = thresholds_by_scan, RANKS_PER_SCAN
        plan = tiles.ranks_plan(K, min(R, step), target)
    rows = tiles.rows_at_once(B, K, plan, tile)
    if rows == B and step >= R:
        return find(query, negative_keys, ranks.contiguous(), tile, pool)
    out = torch.empty_like(ranks, memory_format=torch.contiguous_format)
    for start in range(0, B, rows):
        part = slice(start, min(start + rows, B))
        own = pool.of_queries(part.start, part.stop)
        for r in range(0, R, step):
            wanted = ranks[part, r : r + step].contiguous()
            out[part, r : r + step] = find(query[part], negative_keys, wanted, tile, own)
    return out


@launcher
def rank_thresholds(query: Tensor, negative_keys: Tensor, ranks: Tensor, *pool: Tensor | bool | None) -> Tensor:
    """sort_keys (B, R) int64."""
    return thresholds(query, negative_keys, ranks, kernel_pool(pool))
