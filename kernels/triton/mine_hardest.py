"""mine_hardest in Triton: the N hardest columns of each query's pool, exact, without the (B, K) scores.

    sample   score evenly spaced keys; the cut is a score that nearly always admits at least N columns    (scan.sample, cuts)
    scan     one pass over the queue keeps what reaches the cut, a little more than N columns             (scan.scan)
    check    at least N found and no buffer overflowed, or the cut admits everything: then the N hardest are among them
    finish   rows that fail are refilled by the exact fallback; then a top-N of the kept places

A short queue, or N close to K, skips to the finish with whole rows of places, in chunks of rows. A place is a distinct
int64 (kernels/README.md, "Order"), so ties resolve themselves: lower index first.
"""

import torch
from torch import Tensor

from negmine.order import NOWHERE

from . import tiles
from .certificate import certificate
from .cuts import cut
from .fallback import collect, place_at_rank
from .launch import capability, launcher, score_tile
from .order import unpacked
from .pool import complete, of_rows
from .scan import places, sample, scan


def hardest_places(query: Tensor, negative_keys: Tensor, N: int, tile: tiles.ScoreTile, pool: tuple) -> Tensor:
    """(B, N) int64 places, hardest first, through a sample and a scan."""
    K = negative_keys.shape[0]
    plan, sample_rank = tiles.mining_plan(K, N, capability(query.device))
    scores = sample(query, negative_keys, plan.size, tile, pool)  # (B, size)
    least = cut(scores, sample_rank)  # (B, 1), -inf where too little of the pool was sampled to leave anything out
    survivors = scan(query, negative_keys, least, None, plan.capacity, tile, pool)

    missing = certificate(survivors, least, N)  # (B, 1)
    last = torch.empty_like(missing)
    place_at_rank(query, negative_keys, missing, last, tile, pool)
    collect(query, negative_keys, last, missing, survivors.places, tile, pool)
    return survivors.places.topk(N, dim=1).values


def hardest_places_dense(query: Tensor, negative_keys: Tensor, N: int, tile: tiles.ScoreTile, pool: tuple) -> Tensor:
    """(B, N) int64 places, hardest first, from whole rows."""
    K = negative_keys.shape[0]
    best = places(query, negative_keys, tile, pool).topk(min(N, K), dim=1).values  # (B, min(N, K))
    return torch.nn.functional.pad(best, (0, N - min(N, K)), value=NOWHERE)


@launcher
def mine_hardest(query: Tensor, negative_keys: Tensor, N: int, *pool: Tensor | None) -> tuple[Tensor, Tensor]:
    """scores (B, N) fp32, index (B, N) int64."""
    B, K = query.shape[0], negative_keys.shape[0]
    if not (B and K and N):
        return unpacked(torch.full((B, N), NOWHERE, dtype=torch.int64, device=query.device))
    tile = score_tile(query, negative_keys)
    target = capability(query.device)
    dense = tiles.is_dense(K, N, target)
    plan = None if dense else tiles.mining_plan(K, N, target)[0]
    hardest = hardest_places_dense if dense else hardest_places
    rows = tiles.rows_at_once(B, K, plan, tile)
    if rows == B:
        return unpacked(hardest(query, negative_keys, N, tile, complete(pool)))
    out = torch.empty((B, N), dtype=torch.int64, device=query.device)
    for start in range(0, B, rows):
        part = slice(start, min(start + rows, B))
        own = of_rows(complete(pool), part.start, part.stop)
        out[part] = hardest(query[part], negative_keys, N, tile, own)
    return unpacked(out)
