"""mine_hardest in Triton: the N hardest columns of each query's pool, exact, without storing the (B, K) scores.

    sample   score evenly spaced keys, and choose a cut: a sort key that nearly always N columns or more reach (sample*.py)
    scan     keep the columns that reach the cut, a little more than N, in one pass over the queue              (scan.py)
    check    the N hardest are among the kept columns if at least N were found, or the cut keeps all columns,
             and no buffer overflowed                                                                           (certificate.py)
    finish   refill rows that fail the check by an exact search, and take the top N of the sort keys            (exact_search.py)

If the queue is short, or N is close to K, only the last step is done, with the sort keys of all columns, in chunks of rows. Sort
keys are distinct int64 (kernels/README.md), so ties go to the lower index.
"""

import torch
from torch import Tensor

from negmine.ops.sort_key import NOWHERE

from . import tiles
from .certificate import certificate
from .count_negatives import count
from .exact_search import collect_from, find_missing
from .launch import capability, launcher, score_tile
from .pool import KernelPool, kernel_pool
from .sample import sample, sort_keys
from .sample_quantiles import sample_quantile
from .scan import scan
from .sort_key import unpacked


def hardest_by_scan(query: Tensor, negative_keys: Tensor, N: int, tile: tiles.ScoreTile, pool: KernelPool) -> Tensor:
    """(B, N) int64 sort keys, hardest first, through a sample and a scan."""
    plan, sample_rank = tiles.mining_plan(negative_keys.shape[0], N, capability(query.device))
    scores = sample(query, negative_keys, plan.size, tile, pool)  # (B, size)
    # (B, 1), EVERYTHING where too little of the pool was sampled to leave anything out
    cut = sample_quantile(scores, sample_rank, negative_keys.shape[0], tile.BLOCK_K)
    survivors = scan(query, negative_keys, cut, None, plan.capacity, tile, pool)

    missing = certificate(survivors, cut, N)  # (B, 1)
    last = torch.empty_like(missing)
    find_missing(query, negative_keys, missing, last, tile, pool)
    collect_from(query, negative_keys, last, missing, survivors.sort_keys, tile, pool)
    return survivors.sort_keys.topk(N, dim=1).values


def hardest_by_rows(query: Tensor, negative_keys: Tensor, N: int, tile: tiles.ScoreTile, pool: KernelPool) -> Tensor:
    """(B, N) int64 sort keys, hardest first, from whole rows."""
    K = negative_keys.shape[0]
    best = sort_keys(query, negative_keys, tile, pool).topk(min(N, K), dim=1).values  # (B, min(N, K))
    return best if N <= K else torch.nn.functional.pad(best, (0, N - K), value=NOWHERE)


def mine(query: Tensor, negative_keys: Tensor, N: int, pool: KernelPool) -> tuple[Tensor, Tensor]:
    """scores (B, N) fp32, index (B, N) int64 of the N hardest columns."""
    B, K = query.shape[0], negative_keys.shape[0]
    if not (B and K and N):
        return unpacked(torch.full((B, N), NOWHERE, dtype=torch.int64, device=query.device))
    tile = score_tile(query, negative_keys, pool)
    target = capability(query.device)
    dense = tiles.is_dense(K, N, target)
    plan = None if dense else tiles.mining_plan(K, N, target)[0]
    hardest = hardest_by_rows if dense else hardest_by_scan
    rows = tiles.rows_at_once(B, K, plan, tile)
    if rows == B:
        return unpacked(hardest(query, negative_keys, N, tile, pool))
    out = torch.empty((B, N), dtype=torch.int64, device=query.device)
    for start in range(0, B, rows):
        part = slice(start, min(start + rows, B))
        out[part] = hardest(query[part], negative_keys, N, tile, pool.of_queries(part.start, part.stop))
    return unpacked(out)


@launcher
def mine_hardest(
    query: Tensor, negative_keys: Tensor, N: int, want_count: bool, *pool: Tensor | bool | None
) -> tuple[Tensor, Tensor, Tensor]:
    """scores (B, N) fp32, index (B, N) int64, num_kept (B,) int64 or (0,)."""
    columns = kernel_pool(pool)
    if want_count:
        num_kept = count(query, negative_keys, columns, numbers_only=True)
    else:
        num_kept = query.new_empty(0, dtype=torch.int64)
    return *mine(query, negative_keys, N, columns), num_kept
