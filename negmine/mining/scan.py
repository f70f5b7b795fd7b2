"""An exact scan: score a batch of queries against the corpus, chunk by chunk, keep the hardest rows, count what filters drop.

    sort_keys (B, depth) int64, hardest first: the first `depth` rows of the pool by (score descending, row ascending)
    dropped (len(counted_filters), B): the rows of the pool that each filter drops

No (B, K) matrix is stored: each chunk is one kernel call, and its hardest rows are merged with those kept so far. A kernel always
computes a score by the same sequence of operations (kernels/README.md), and sort keys hold global row numbers, so the result does
not depend on the sizes of chunks and batches. Where several processes hold the corpus, each scans its own rows, and the results
are merged at the end. The scores of positives come from the same kernel, with a mask that allows one row per query, so that
margins compare scores that were rounded alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from negmine import reference
from negmine.mining.bf16_prefilter import Bf16Prefilter
from negmine.mining.dedup import first_equal
from negmine.mining.process_ranks import ProcessRanks
from negmine.mining.row_lists import RowLists
from negmine.mining.sources import Rows
from negmine.ops import sort_key
from negmine.ops.backends import Kernels
from negmine.ops.pool import Pool, usable
from negmine.ops.vectors import widened
from negmine.ops.windows import bounded
from negmine.options import Select

OPS = ("mine_hardest", "count_negatives")  # that a scan calls
GatherRows = Callable[[np.ndarray], Tensor]  # numbers (M,) -> (M, D)
PAIRS = 64  # pairs scored by one call, whose cost grows with the square of their number


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
    """scores (B, N) fp32 and index (B, N) of the hardest rows that select's score filters keep, with anchor (B,) fp32; and the
    number of rows that they keep, (B,) int64, or None unless want_num_kept."""
    if ops is not None:
        # Bounds without a limit would only drop NaN scores, which are never candidates.
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
    """(B,) int64: the number of rows of the pool that select's score filters keep."""
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
    """query_numbers, row_numbers (P,) -> (P,) fp32: the score of each pair as a scan computes it; NaN where it is NaN."""
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
    """All rows of a corpus, of which this process holds [first_row, first_row + len(rows)) and other ranks the rest."""

    rows: Rows
    device: torch.device
    ranks: ProcessRanks
    rows_per_rank: list[int]

    def __len__(self) -> int:
        return sum(self.rows_per_rank)

    @property
    def first_row(self) -> int:
        return sum(self.rows_per_rank[: self.ranks.rank])

    def _local(self, numbers: np.ndarray) -> np.ndarray:
        return np.flatnonzero((numbers >= self.first_row) & (numbers < self.first_row + len(self.rows)))

    def gather(self, numbers: np.ndarray) -> Tensor:
        """numbers (M,) int64 -> (M, D), whichever rank holds the rows; every rank asks for the same."""
        if self.ranks.size == 1:
            return self.rows.gather(numbers, self.device)
        here = self._local(numbers)
        held = self.rows.gather(numbers[here] - self.first_row, self.device)  # (H, D)
        out = torch.zeros(len(numbers), self.rows.dim, device=self.device)  # (M, D)
        out[torch.from_numpy(here).to(self.device)] = held.float()
        return self.ranks.sum(out).to(held.dtype)

    def pair_scores(
        self, ops: Kernels | None, queries: Rows, query_numbers: np.ndarray, row_numbers: np.ndarray
    ) -> np.ndarray:
        """query_numbers, row_numbers (P,) -> (P,) fp32: each pair scored by the rank that holds the row."""
        here = self._local(row_numbers)
        bits = torch.zeros(len(row_numbers), dtype=torch.int32, device="cpu")  # (P,)
        scores = pair_scores(
            ops,
            lambda numbers: queries.gather(numbers, self.device),
            lambda numbers: self.rows.gather(numbers, self.device),
            query_numbers[here],
            row_numbers[here] - self.first_row,
        )
        bits[torch.from_numpy(here)] = torch.from_numpy(scores).view(torch.int32)
        return self.ranks.sum(bits).view(torch.float32).numpy()

    def first_equal(self) -> np.ndarray:
        """(K,) int64: the lowest row of equal values for each row."""
        digests = torch.from_numpy(self.rows.row_digests().view(np.int64))  # (rows here, 2)
        return first_equal(self.ranks.gather_rows(digests, self.rows_per_rank).numpy())


@dataclass
class Scan:
    """The exact scan of a corpus; every batch of a run uses the same one."""

    ops: Kernels | None
    corpus: Corpus
    chunk_size: int
    distinct: np.ndarray | None  # (K,) bool, False = equal to a row with a lower number; None = duplicates are kept
    advance: Callable[[int], object] = lambda chunks: None  # called after each chunk
    prefilter: Bf16Prefilter = field(default_factory=Bf16Prefilter)

    @property
    def num_candidates(self) -> int:
        """The number of rows, duplicates left out."""
        return len(self.corpus) if self.distinct is None else int(self.distinct.sum())

    def run(
        self,
        query: Tensor,
        excluded: RowLists,
        anchor: Tensor | None,
        depth: int,
        filters: Select,
        counted_filters: list[Select],
    ) -> tuple[Tensor, Tensor]:
        """query (B, D), excluded rows of each, anchor (B,) -> sort_keys (B, depth) of what `filters` keep, and dropped
        (len(counted_filters), B) int64."""
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
        if self.corpus.ranks.size > 1 and depth:
            sort_keys = torch.cat(self.corpus.ranks.gather(sort_keys), 1).topk(depth, 1).values
        size = self.num_candidates - torch.from_numpy(excluded.sizes).to(device)  # (B,)
        return sort_keys, size - self.corpus.ranks.sum(counts)

    def pool(self, B: int, begin: int, end: int, queries: np.ndarray, columns: np.ndarray) -> Pool:
        """The masks of one chunk: ids where no query hides two of its rows, else a mask of pairs (B, C)."""
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
