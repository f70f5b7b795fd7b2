"""A batch of queries against the corpus, chunk by chunk: the places of the hardest rows, and counts of what filters drop.

    places (B, depth) int64 order, hardest first: the depth largest of (score descending, row ascending) over the pool
    dropped (len(counted), B): the rows of the pool that each filter drops

No (B, K) matrix: a chunk is one kernel call, and its winners compete with those kept so far. A kernel computes one score by one
sequence of operations (kernels/README.md), and places hold global rows, so the cut into chunks and batches is not seen.
Where several processes hold the corpus, each scans its own rows, and the places of all compete at the end.
The positives' scores come from the same kernel, one row allowed to each query: a margin compares like with like.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from negmine import order, reference
from negmine.backends import Launchers
from negmine.options import Select
from negmine.pool import Pool, bounded, usable
from negmine.search.lists import RowLists
from negmine.search.ranks import Ranks
from negmine.search.rows import Rows, first_equal
from negmine.search.screen import Screen
from negmine.selection import working

Gather = Callable[[np.ndarray], Tensor]  # numbers (M,) -> (M, D)
PAIRS = 64  # pairs scored by one call: its cost grows with their square


def hardest(
    ops: Launchers | None,
    query: Tensor,
    keys: Tensor,
    N: int,
    pool: Pool,
    select: Select,
    anchor: Tensor | None,
    want_kept: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """scores (B, N) fp32, index (B, N) of the hardest rows that select's score filters keep; anchor (B,) fp32. And how many
    rows they keep, (B,) int64, where wanted."""
    if ops is not None:
        # Bounds that hold every place would only drop NaN scores, which are no candidates anyway.
        if select.has_filter or select.starts_late or select.ends_early:
            pool = bounded(ops, query, keys, pool, select, anchor)
        if want_kept:
            return ops.mine_hardest_kept(query, keys, N, *pool)
        return *ops.mine_hardest(query, keys, N, *pool), None
    q, k = working(query), working(keys)
    allowed = reference.filtered(reference.scores_of(q, k), anchor, select, usable(pool, query, keys))
    return *reference.mine_hardest(q, k, N, allowed), allowed.sum(1) if want_kept else None


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
    queries: Gather,
    corpus: Gather,
    query_numbers: np.ndarray,
    row_numbers: np.ndarray,
) -> np.ndarray:
    """query_numbers, row_numbers (P,) -> (P,) fp32: the score of each pair as a scan computes it; NaN where it is NaN."""
    out = np.empty(len(query_numbers), np.float32)  # (P,)
    for begin in range(0, len(out), PAIRS):
        pairs = slice(begin, begin + PAIRS)
        query, keys = queries(query_numbers[pairs]), corpus(row_numbers[pairs])  # (PAIRS, D) each
        own = torch.eye(len(query), dtype=torch.bool, device=query.device)  # (PAIRS, PAIRS)
        scores, index, _ = hardest(ops, query, keys, 1, Pool(negative_mask=own), Select(), None)
        out[pairs] = scores.masked_fill(index < 0, torch.nan)[:, 0].cpu().numpy()
    return out


@dataclass(frozen=True)
class Corpus:
    """All rows of a corpus, of which this process holds [first, first + len(rows)) and other ranks the rest."""

    rows: Rows
    device: torch.device
    ranks: Ranks
    held: list[int]  # rows of each rank

    def __len__(self) -> int:
        return sum(self.held)

    @property
    def first(self) -> int:
        return sum(self.held[: self.ranks.rank])

    def _here(self, numbers: np.ndarray) -> np.ndarray:
        return np.flatnonzero((numbers >= self.first) & (numbers < self.first + len(self.rows)))

    def gather(self, numbers: np.ndarray) -> Tensor:
        """numbers (M,) int64 -> (M, D), wherever the rows lie; every rank asks for the same."""
        if self.ranks.size == 1:
            return self.rows.gather(numbers, self.device)
        here = self._here(numbers)
        held = self.rows.gather(numbers[here] - self.first, self.device)  # (H, D)
        out = torch.zeros(len(numbers), self.rows.dim, device=self.device)  # (M, D)
        out[torch.from_numpy(here).to(self.device)] = held.float()
        return self.ranks.sum(out).to(held.dtype)

    def pair_scores(
        self, ops: Launchers | None, queries: Rows, query_numbers: np.ndarray, row_numbers: np.ndarray
    ) -> np.ndarray:
        """query_numbers, row_numbers (P,) -> (P,) fp32: each scored by the rank that holds the row."""
        here = self._here(row_numbers)
        bits = torch.zeros(len(row_numbers), dtype=torch.int32)  # (P,)
        scores = pair_scores(
            ops,
            lambda numbers: queries.gather(numbers, self.device),
            lambda numbers: self.rows.gather(numbers, self.device),
            query_numbers[here],
            row_numbers[here] - self.first,
        )
        bits[torch.from_numpy(here)] = torch.from_numpy(scores).view(torch.int32)
        return self.ranks.sum(bits).view(torch.float32).numpy()

    def first_equal(self) -> np.ndarray:
        """(K,) int64: the lowest row of equal values for each row."""
        digests = torch.from_numpy(self.rows.row_digests().view(np.int64))  # (rows here, 2)
        return first_equal(self.ranks.gather_rows(digests, self.held).numpy())


@dataclass
class Scan:
    """What every batch of a run shares."""

    ops: Launchers | None
    corpus: Corpus
    chunk_size: int
    distinct: np.ndarray | None  # (K,) bool, False = a copy of a lower row; None = all rows stand for themselves
    advance: Callable[[int], object] = lambda chunks: None  # told of each finished chunk
    screen: Screen = field(default_factory=Screen)

    @property
    def candidates(self) -> int:
        """Rows that are no copies."""
        return len(self.corpus) if self.distinct is None else int(self.distinct.sum())

    def run(
        self,
        query: Tensor,
        excluded: RowLists,
        anchor: Tensor | None,
        depth: int,
        ranked: Select,
        counted: list[Select],
    ) -> tuple[Tensor, Tensor]:
        """query (B, D), excluded rows of each, anchor (B,) -> places (B, depth) of what `ranked` keeps, and (len(counted), B)
        int64: the rows of each pool that each filter drops."""
        B, device, first = len(query), self.corpus.device, self.corpus.first
        by_row = np.argsort(excluded.rows, kind="stable")
        hidden_query, hidden_row = excluded.queries[by_row], excluded.rows[by_row] - first  # (E,) each, rows ascending
        places = torch.full((B, depth), order.NOWHERE, dtype=torch.int64, device=device)  # (B, depth)
        counts = torch.zeros(len(counted), B, dtype=torch.int64, device=device)
        for begin, end in self.corpus.rows.spans(self.chunk_size):
            keys = self.corpus.rows.block(begin, end, device)  # (C, D)
            low, high = np.searchsorted(hidden_row, (begin, end))
            pool = self.pool(B, begin, end, hidden_query[low:high], hidden_row[low:high] - begin)
            kept = None
            if depth:
                N = min(depth, end - begin)
                mine = self.screen if self.screen.pays(self.ops, query, keys, N, ranked) else hardest
                scores, index, kept = mine(self.ops, query, keys, N, pool, ranked, anchor, ranked in counted)
                found = order.pack(scores, index + begin + first).masked_fill(index < 0, order.NOWHERE)
                places = torch.cat([places, found], 1).topk(depth, 1).values  # (B, depth)
            for count, select in zip(counts, counted, strict=True):
                known = select == ranked and kept is not None  # counted by the pass that mines
                count += kept if known else kept_by(self.ops, query, keys, pool, select, anchor)
            self.advance(1)
        if self.corpus.ranks.size > 1 and depth:
            places = torch.cat(self.corpus.ranks.gather(places), 1).topk(depth, 1).values
        size = self.candidates - torch.from_numpy(excluded.sizes).to(device)  # (B,)
        return places, size - self.corpus.ranks.sum(counts)

    def pool(self, B: int, begin: int, end: int, queries: np.ndarray, columns: np.ndarray) -> Pool:
        """The masks of one chunk: ids where no query hides two of its rows, else a mask of pairs (B, C)."""
        first, device = self.corpus.first, self.corpus.device
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
