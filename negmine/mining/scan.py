"""An exact scan: score a batch of queries against the corpus chunk by chunk, keep the hardest rows, and count removed rows.

    sort_keys (B, depth) int64, hardest first: the first `depth` rows of the pool by (score descending, row ascending)
    dropped (len(counted_filters), B): the number of rows of the pool that each filter removes

No (B, K) matrix is stored: each chunk is one kernel call, and its hardest rows are merged with those kept so far. A kernel always
computes a score by the same sequence of operations (kernels/README.md), and sort keys have global row numbers, so the result does
not depend on the sizes of chunks and batches. Scores of positives are computed by the same kernel, with a mask that allows one
row per query, so that margins compare scores with the same rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from negmine import reference
from negmine.mining.prefilter import Prefilter
from negmine.mining.row_lists import RowLists
from negmine.mining.sources import Rows
from negmine.ops import sort_key
from negmine.ops.backends import Kernels
from negmine.ops.pool import Pool, usable
from negmine.ops.vectors import widened
from negmine.ops.windows import bounded
from negmine.options import Select

OPS = ("mine_hardest", "count_negatives")  # the ops that a scan calls
GatherRows = Callable[[np.ndarray], Tensor]  # numbers (M,) -> (M, D)
PAIRS = 64  # pairs scored by one call; the cost of a call grows with the square of this number


def hardest_rows(
    ops: Kernels | None,
    query: Tensor,
    keys: Tensor,
    N: int,
    pool: Pool,
    select: Select,
    anchor: Tensor | None,
    want_num_kept: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The hardest rows that pass the score filters of select.

    anchor (B,) fp32: the scores of positives, for margins. Returns scores (B, N) fp32, index (B, N), and the number of rows that
    pass, (B,) int64, or None unless want_num_kept.
    """
    if ops is not None:
        # Without filters or a window, bounds would only remove NaN scores, which mine_hardest never returns.
        if select.has_filter or select.starts_late or select.ends_early:
            pool = bounded(ops, query, keys, pool, select, anchor)
        if want_num_kept:
            return ops.mine_hardest(query, keys, N, True, *pool)
        return *ops.mine_hardest(query, keys, N, False, *pool)[:2], None
    q, k = widened(query), widened(keys)
    allowed = reference.filtered(reference.scores_of(q, k), anchor, select, usable(pool, query, keys))
    return *reference.mine_hardest(q, k, N, allowed), allowed.sum(1) if want_num_kept else None


def count_kept(
    ops: Kernels | None, query: Tensor, keys: Tensor, pool: Pool, select: Select, anchor: Tensor | None
) -> Tensor:
    """(B,) int64: the number of rows of the pool that pass the score filters of select."""
    if ops is not None:
        return ops.count_negatives(query, keys, *bounded(ops, query, keys, pool, select, anchor))
    scores = reference.scores_of(widened(query), widened(keys))  # (B, C)
    return reference.filtered(scores, anchor, select, usable(pool, query, keys)).sum(1)


def pair_scores(
    ops: Kernels | None,
    gather_queries: GatherRows,
    gather_corpus: GatherRows,
    query_numbers: np.ndarray,
    row_numbers: np.ndarray,
) -> np.ndarray:
    """query_numbers, row_numbers (P,) -> (P,) fp32: the score of each pair, bit-identical to the score in a scan."""
    out = np.empty(len(query_numbers), np.float32)  # (P,)
    for begin in range(0, len(out), PAIRS):
        pairs = slice(begin, begin + PAIRS)
        query, keys = gather_queries(query_numbers[pairs]), gather_corpus(row_numbers[pairs])  # (PAIRS, D) each
        diagonal = torch.eye(len(query), dtype=torch.bool, device=query.device)  # (PAIRS, PAIRS)
        scores, index, _ = hardest_rows(ops, query, keys, 1, Pool(negative_mask=diagonal), Select(), None)
        out[pairs] = scores.masked_fill(index < 0, torch.nan)[:, 0].cpu().numpy()
    return out


@dataclass(frozen=True)
class Corpus:
    """The rows of a corpus from row first_row to the end."""

    rows: Rows
    device: torch.device
    first_row: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, numbers: np.ndarray) -> Tensor:
        """The rows (M, D) with the given numbers (M,) int64 in the whole corpus."""
        return self.rows.gather(numbers - self.first_row, self.device)


@dataclass
class Scan:
    """The exact scan of a corpus. All batches of a run share one Scan."""

    ops: Kernels | None
    corpus: Corpus
    chunk_size: int
    # (K,) bool of the whole corpus: False = a duplicate of a lower row; None = no duplicates are removed
    distinct: np.ndarray | None
    advance: Callable[[int], object] = lambda chunks: None  # called after each chunk
    prefilter: Prefilter = field(default_factory=Prefilter)

    @property
    def num_candidates(self) -> int:
        """The number of rows that are not duplicates."""
        first = self.corpus.first_row
        return len(self.corpus) if self.distinct is None else int(self.distinct[first : first + len(self.corpus)].sum())

    def run(
        self,
        query: Tensor,
        excluded: RowLists,
        anchor: Tensor | None,
        depth: int,
        filters: Select,
        counted_filters: list[Select],
    ) -> tuple[Tensor, Tensor]:
        """Scan the corpus for a batch of queries (B, D).

        excluded: the rows to leave out for each query. anchor (B,): the scores of positives, for margins. Returns the sort keys
        (B, depth) of the hardest rows that pass `filters`, and dropped (len(counted_filters), B) int64.
        """
        B, device, first = len(query), self.corpus.device, self.corpus.first_row
        by_row = np.argsort(excluded.rows, kind="stable")
        hidden_query, hidden_row = excluded.queries[by_row], excluded.rows[by_row] - first  # (E,) each, rows ascending
        sort_keys = torch.full((B, depth), sort_key.NOWHERE, dtype=torch.int64, device=device)  # (B, depth)
        counts = torch.zeros(len(counted_filters), B, dtype=torch.int64, device=device)
        for begin, end in self.corpus.rows.spans(self.chunk_size):
            keys = self.corpus.rows.block(begin, end, device)  # (C, D)
            low, high = np.searchsorted(hidden_row, (begin, end))
            pool = self.pool(B, begin, end, hidden_query[low:high], hidden_row[low:high] - begin)
            num_kept = None
            if depth:
                N = min(depth, end - begin)
                mine = self.prefilter if self.prefilter.is_faster(self.ops, query, keys, N, filters) else hardest_rows
                want_num_kept = filters in counted_filters
                scores, index, num_kept = mine(self.ops, query, keys, N, pool, filters, anchor, want_num_kept)
                found = sort_key.pack(scores, index + begin + first).masked_fill(index < 0, sort_key.NOWHERE)
                sort_keys = torch.cat([sort_keys, found], 1).topk(depth, 1).values  # (B, depth)
            for count, select in zip(counts, counted_filters, strict=True):
                counted_by_mining = select == filters and num_kept is not None
                count += num_kept if counted_by_mining else count_kept(self.ops, query, keys, pool, select, anchor)
            self.advance(1)
        low, high = np.searchsorted(hidden_row, (0, len(self.corpus)))
        num_hidden = torch.from_numpy(np.bincount(hidden_query[low:high], minlength=B)).to(device)  # (B,)
        return sort_keys, self.num_candidates - num_hidden - counts

    def pool(self, B: int, begin: int, end: int, queries: np.ndarray, columns: np.ndarray) -> Pool:
        """The pool of one chunk without the excluded rows: by ids if each query has at most one in it, else by a (B, C) mask."""
        first, device = self.corpus.first_row, self.corpus.device
        mask = None
        if self.distinct is not None:
            mask = torch.from_numpy(self.distinct[first + begin : first + end]).to(device)  # (C,)
        if not len(queries):
            return Pool(negative_mask=mask)
        at_query, at_column = (torch.from_numpy(part).to(device) for part in (queries, columns))  # (E,) each
        if len(np.unique(queries)) == len(queries):
            query_ids = torch.full((B,), -1, dtype=torch.int64, device=device)
            query_ids[at_query] = at_column
            return Pool(mask, query_ids, torch.arange(end - begin, device=device))
        pairs = torch.ones(B, end - begin, dtype=torch.bool, device=device)  # (B, C)
        if mask is not None:
            pairs &= mask
        pairs[at_query, at_column] = False
        return Pool(negative_mask=pairs)
