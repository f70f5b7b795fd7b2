"""Mine one batch of queries: apply filters, take the window of ranks, and remove near duplicates.

If too few rows are left, the scan is repeated with more ranks.

source   an ExecutorScan of the whole corpus, an IndexScan of the candidates that an index proposes, or the candidates that
         shares of a job have found (shares.py)
window   (B, W) int64 sort keys, hardest first, padded with NOWHERE; sampling.py draws from it
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from negmine import reference
from negmine.mining.dedup import Deduplicator
from negmine.mining.identity import Hidden
from negmine.mining.row_lists import RowLists
from negmine.mining.sampling import candidates_needed, slice_window
from negmine.ops import sort_key
from negmine.options import Select

FILTERS = ("min_score", "max_score", "absolute_margin", "relative_margin")
# With near-duplicate removal, a scan reads this many ranks for each row that is kept. If these are too few, the next scan reads
# this many times as many.
DEPTH_FACTOR = 4


def nested_filters(select: Select) -> dict[str, Select]:
    """For each filter of `select`, a Select with this filter and all before it.

    The number of rows that one Select removes beyond the previous one is counted under the name of its last filter.
    """
    given = {name: getattr(select, name) for name in FILTERS if getattr(select, name) is not None}
    names = list(given)
    return {name: Select(**{each: given[each] for each in names[: i + 1]}) for i, name in enumerate(names)}


def needs_count(select: Select, raw: bool) -> bool:
    """Whether the ranks of the window are known only after the rows that pass the filters are counted."""
    by_fraction = isinstance(select.range_min, float) or isinstance(select.range_max, float)
    return by_fraction and select.has_filter and not raw


@dataclass(frozen=True)
class BatchMiner:
    """Finds the window of each query. All batches of a run share one BatchMiner."""

    source: Any
    select: Select
    raw: bool
    num_negatives: int
    strategy: str
    count_skipped: bool
    excluded: Hidden | RowLists  # the documents that may not be negatives of each query
    not_finite_queries: np.ndarray  # (M,): the queries that contain NaN or infinity, which get no negatives
    deduplicator: Deduplicator | None

    @property
    def filters(self) -> Select:
        return replace(self.select, range_min=0, range_max=None)

    @property
    def max_candidates(self) -> int | None:
        """How many candidates of a window sampling uses; None means all."""
        return candidates_needed(self.select, self.num_negatives, self.strategy)

    def depth(self, size: int) -> int:
        """How many ranks the first scan reads from a pool of this size."""
        first, last = self.select.window(torch.tensor([size], device="cpu"))
        return int(self._end(first, last, self._max_ranks))

    @property
    def _max_ranks(self) -> int | None:
        if self.raw or self.max_candidates is None:
            return None
        return self.max_candidates if self.deduplicator is None else DEPTH_FACTOR * self.max_candidates

    @staticmethod
    def _end(first: Tensor, last: Tensor, max_ranks: int | None) -> Tensor:
        return last if max_ranks is None else last.minimum(first + max_ranks)

    def window(self, query: Tensor, rows: Tensor, anchor: Tensor | None) -> tuple[Tensor, dict[str, int]]:
        """The windows of a batch, and the number of (query, row) pairs that each filter removed.

        query (B, D), rows (B,): the row numbers of the queries, anchor (B,) -> window (B, W), counts by filter
        """
        excluded = self.excluded.take(rows.numpy())
        counted_filters = nested_filters(self.select) if self.count_skipped else {}
        if self.raw:
            window, drops = self._raw_window(query, excluded, anchor, list(counted_filters.values()))
            near = None
            if self.deduplicator is not None:
                window, near = self.deduplicator(window, rows, self.max_candidates)
        else:
            size = self.source.num_candidates - torch.from_numpy(excluded.sizes).to(query.device)  # (B,)
            if needs_count(self.select, self.raw):
                size = size - self.source.run(query, excluded, anchor, 0, self.filters, [self.filters])[1][0]
            first, last = self.select.window(size)
            window, drops, near = self._filtered_window(
                query, rows, excluded, anchor, first, last, self._max_ranks, list(counted_filters.values())
            )
        broken = np.flatnonzero(np.isin(rows.numpy(), self.not_finite_queries))
        if len(broken):
            at = torch.from_numpy(broken).to(window.device)
            window[at], drops[:, at] = sort_key.NOWHERE, 0
            if near is not None:
                near[at] = 0
        totals = [0, *(int(drop.sum()) for drop in drops)]
        dropped = {name: totals[i + 1] - totals[i] for i, name in enumerate(counted_filters)}
        if near is not None:
            dropped |= {"near_positive": int(near[:, 0].sum()), "near_negative": int(near[:, 1].sum())}
        return window, dropped

    def _filtered_window(
        self,
        query: Tensor,
        rows: Tensor,
        excluded: RowLists,
        anchor: Tensor | None,
        first: Tensor,
        last: Tensor,
        max_ranks: int | None,
        counted_filters: list[Select],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ranks [first, last) of each pool, at most max_ranks -> window (B, W), removed counts, near-duplicate counts (B, 2)."""
        end = self._end(first, last, max_ranks)
        depth = int(end.max()) if len(end) else 0
        sort_keys, drops = self.source.run(query, excluded, anchor, depth, self.filters, counted_filters)
        window = slice_window(sort_keys, first, end)
        if self.deduplicator is None:
            return window, drops, None
        has_more = (window != sort_key.NOWHERE).sum(1) == end - first  # (B,) bool: the pool may have more rows
        window, near = self.deduplicator(window, rows, self.max_candidates)  # (B, W), (B, 2)
        if self.max_candidates is None or max_ranks is None:
            return window, drops, near
        short = ((window != sort_key.NOWHERE).sum(1) < self.max_candidates) & has_more & (end < last)  # (B,)
        if not short.any():
            return window, drops, near
        at = short.nonzero()[:, 0].cpu()
        at_device = at.to(query.device)
        deeper, _, near_deeper = self._filtered_window(
            query[at_device],
            rows[at],
            excluded.take(at.numpy()),
            None if anchor is None else anchor[at_device],
            first[at_device],
            last[at_device],
            max_ranks * DEPTH_FACTOR,
            [],
        )
        width = max(window.shape[1], deeper.shape[1])
        window, deeper = (
            torch.nn.functional.pad(part, (0, width - part.shape[1]), value=sort_key.NOWHERE)
            for part in (window, deeper)
        )
        assert near_deeper is not None  # since there is a deduplicator
        window[at_device], near[at_device] = deeper, near_deeper
        return window, drops, near

    def _raw_window(
        self, query: Tensor, excluded: RowLists, anchor: Tensor | None, counted_filters: list[Select]
    ) -> tuple[Tensor, Tensor]:
        """The window (B, W) of raw ranks, from which excluded and filtered rows are removed, and the removed counts.

        The remaining rows are moved to the left.
        """
        B, K = len(query), self.source.num_rows
        size = torch.full((B,), self.source.num_candidates, device=query.device)  # (B,)
        first, last = self.select.window(size)
        sort_keys, _ = self.source.run(query, RowLists.empty(B), None, int(last.max()) if B else 0, Select(), [])
        window = slice_window(sort_keys, first, last)  # (B, W)
        scores, index = sort_key.unpack(window)  # (B, W) each
        excluded_pairs = torch.from_numpy(excluded.queries * K + excluded.rows).to(window.device)  # (E,)
        pair_numbers = torch.arange(B, device=window.device)[:, None] * K + index  # (B, W)
        pool = (window != sort_key.NOWHERE) & ~torch.isin(pair_numbers, excluded_pairs)
        drops = torch.zeros(len(counted_filters), B, dtype=torch.int64, device=window.device)
        for drop, each in zip(drops, counted_filters, strict=True):
            drop += (pool & ~reference.filtered(scores, anchor, each, pool)).sum(1)
        kept = reference.filtered(scores, anchor, self.filters, pool)  # (B, W)
        return window.masked_fill(~kept, sort_key.NOWHERE).sort(dim=1, descending=True).values, drops
