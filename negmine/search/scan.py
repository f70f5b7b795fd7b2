"""A batch of queries against the corpus, chunk by chunk: the places of the hardest rows, and counts of what filters keep.

    places (B, depth) int64 order, hardest first: the depth largest of (score descending, row ascending) over the pool
    counts (len(counted), B): the rows of the pool that each filter keeps

No (B, K) matrix: a chunk is one kernel call, and its winners compete with those kept so far. A kernel computes one score by one
sequence of operations (kernels/README.md), and places hold global rows, so the cut into chunks and batches is not seen.
The positives' scores come from the same kernel, one row allowed to each query: a margin compares like with like.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from negmine import order, reference
from negmine.backends import Launchers
from negmine.mining import working
from negmine.options import Select
from negmine.pool import Pool, bounded, usable
from negmine.search.rows import Rows

PAIRS = 64  # pairs scored by one call: its cost grows with their square


def hardest(
    ops: Launchers | None, query: Tensor, keys: Tensor, N: int, pool: Pool, select: Select, anchor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """scores (B, N) fp32, index (B, N) of the hardest rows that select's score filters keep; anchor (B,) fp32."""
    if ops is not None:
        return ops.mine_hardest(query, keys, N, *bounded(ops, query, keys, pool, select, anchor))
    q, k = working(query), working(keys)
    allowed = reference.filtered(reference.scores_of(q, k), anchor, select, usable(pool, query, keys))
    return reference.mine_hardest(q, k, N, allowed)


def kept_by(
    ops: Launchers | None, query: Tensor, keys: Tensor, pool: Pool, select: Select, anchor: Tensor | None
) -> Tensor:
    """(B,) int64: rows of the pool that select's score filters keep."""
    if ops is not None:
        return ops.count_negatives(query, keys, *bounded(ops, query, keys, pool, select, anchor))
    scores = reference.scores_of(working(query), working(keys))  # (B, C)
    return reference.filtered(scores, anchor, select, usable(pool, query, keys)).sum(1)


def pair_scores(
    ops: Launchers | None,
    queries: Rows,
    corpus: Rows,
    query_numbers: np.ndarray,
    row_numbers: np.ndarray,
    device: torch.device,
) -> np.ndarray:
    """query_numbers, row_numbers (P,) -> (P,) fp32: the score of each pair as a scan computes it; NaN where it is NaN."""
    out = np.empty(len(query_numbers), np.float32)  # (P,)
    for begin in range(0, len(out), PAIRS):
        pairs = slice(begin, begin + PAIRS)
        query = queries.gather(query_numbers[pairs], device)  # (PAIRS, D)
        keys = corpus.gather(row_numbers[pairs], device)  # (PAIRS, D)
        own = torch.eye(len(query), dtype=torch.bool, device=device)  # (PAIRS, PAIRS)
        scores, index = hardest(ops, query, keys, 1, Pool(negative_mask=own), Select(), None)
        out[pairs] = scores.masked_fill(index < 0, torch.nan)[:, 0].cpu().numpy()
    return out


@dataclass
class Scan:
    """What every batch of a run shares."""

    ops: Launchers | None
    corpus: Rows
    chunk_size: int
    device: torch.device
    distinct: np.ndarray | None  # (K,) bool, False = a copy of a lower row; None = all rows stand for themselves
    advance: Callable[[int], object]  # told of each finished chunk

    def run(
        self,
        query: Tensor,
        excluded: tuple[np.ndarray, np.ndarray],
        anchor: Tensor | None,
        depth: int,
        ranked: Select,
        counted: list[Select],
    ) -> tuple[Tensor, Tensor]:
        """query (B, D), excluded (queries, rows) pairs, anchor (B,) -> places (B, depth), counts (len(counted), B)."""
        B = len(query)
        by_row = np.argsort(excluded[1], kind="stable")
        hidden_query, hidden_row = excluded[0][by_row], excluded[1][by_row]  # (E,) each, rows ascending
        places = torch.full((B, depth), order.NOWHERE, dtype=torch.int64, device=self.device)  # (B, depth)
        counts = torch.zeros(len(counted), B, dtype=torch.int64, device=self.device)
        for begin, end in self.corpus.spans(self.chunk_size):
            keys = self.corpus.block(begin, end, self.device)  # (C, D)
            low, high = np.searchsorted(hidden_row, (begin, end))
            pool = self.pool(B, begin, end, hidden_query[low:high], hidden_row[low:high] - begin)
            for count, select in zip(counts, counted, strict=True):
                count += kept_by(self.ops, query, keys, pool, select, anchor)
            if depth:
                scores, index = hardest(self.ops, query, keys, min(depth, end - begin), pool, ranked, anchor)
                found = order.pack(scores, index + begin).masked_fill(index < 0, order.NOWHERE)  # (B, min(depth, C))
                places = torch.cat([places, found], 1).topk(depth, 1).values
            self.advance(1)
        return places, counts

    def pool(self, B: int, begin: int, end: int, queries: np.ndarray, columns: np.ndarray) -> Pool:
        """The masks of one chunk: ids where no query hides two of its rows, else a mask of pairs (B, C)."""
        mask = None if self.distinct is None else torch.from_numpy(self.distinct[begin:end]).to(self.device)  # (C,)
        if not len(queries):
            return Pool(negative_mask=mask)
        at_query, at_column = (torch.from_numpy(part).to(self.device) for part in (queries, columns))  # (E,) each
        if len(np.unique(queries)) == len(queries):
            query_ids = torch.full((B,), -1, dtype=torch.int64, device=self.device)
            query_ids[at_query] = at_column
            return Pool(mask, query_ids, torch.arange(end - begin, device=self.device))
        pairs = torch.ones(B, end - begin, dtype=torch.bool, device=self.device)  # (B, C)
        if mask is not None:
            pairs &= mask
        pairs[at_query, at_column] = False
        return Pool(negative_mask=pairs)
