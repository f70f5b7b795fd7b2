"""Distance-weighted negatives (Wu et al. 2017, arXiv 1706.07567), sampled from a queue in pieces of bounded size.

The N columns with the largest log p + Gumbel noise are a sample without replacement, so only the best N of each row are kept from
one piece to the next. The random numbers depend on the global row and the column, so the size of the pieces does not change the
sample. The definition is in negmine/reference/triplets.py.
"""

import torch
from torch import Tensor

from negmine import reference
from negmine.ops import philox, sort_key
from negmine.ops.pool import Pool, hide_masked_rows, pieces, pool_of_columns, usable
from negmine.ops.windows import Draw
from negmine.reference.triplets import log_rarity

PIECE = 1 << 21  # how many scores are in memory at one time
PIECE_ON_CPU = 1 << 15  # small enough that a piece stays in the cache during the ten rounds of Philox


@torch.no_grad()
def distance_weighted(
    query: Tensor, keys: Tensor, others: Pool, N: int, draw: Draw, width: int
) -> tuple[Tensor, Tensor]:
    """Sample N columns of the pool `others`: scores (B, N) fp32 and index (B, N) int64, nearest first, padded with (-inf, -1).

    width is the dimension D of the vectors. query and keys may have two more columns with norms.
    """
    q, rows = query.float(), draw.rows(query)  # (B, D), (B,)
    best = torch.full((len(q), N), -torch.inf, dtype=torch.float64, device=q.device)  # (B, N) log p + Gumbel
    scores, index = best.float(), torch.zeros_like(best, dtype=torch.int64)  # (B, N) each
    for part in pieces(len(q), len(keys), PIECE_ON_CPU if q.device.type == "cpu" else PIECE):
        pool = pool_of_columns(others, part)
        n = hide_masked_rows(keys[part].float(), pool)  # (C, D)
        s, columns = reference.scores_of(q, n), torch.arange(part.start, part.stop, device=q.device)  # (B, C), (C,)
        word = philox.words(rows, columns, philox.STREAM_WEIGHTED, draw.seed, draw.step)[0]  # (B, C)
        drawn = log_rarity(s.double(), width) + philox.gumbel(word)  # (B, C)
        allowed = usable(pool, q, n)
        assert allowed is not None  # the pool has labels
        drawn = drawn.masked_fill(~(allowed & (drawn > -torch.inf)), -torch.inf)
        # Columns of earlier pieces come first, so ties go to the lower index.
        best, order = torch.cat([best, drawn], 1).sort(dim=1, descending=True, stable=True)
        best, order = best[:, :N], order[:, :N]
        scores = torch.cat([scores, s], 1).gather(1, order)
        index = torch.cat([index, columns.expand_as(s)], 1).gather(1, order)
    keys_kept = sort_key.pack(scores, index).masked_fill(best == -torch.inf, sort_key.NOWHERE)
    return sort_key.unpack(keys_kept.sort(dim=1, descending=True).values)
