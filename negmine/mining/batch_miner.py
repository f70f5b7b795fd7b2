"""Mines one batch of queries: the ranks of its windows, filters, near duplicates, and a deeper scan where too few rows are left.

source   an ExecutorScan of the whole corpus, an IndexScan of the candidates of an index, or what shares found (shares.py)
window   (B, W) int64 sort keys, hardest first, NOWHERE past its end; the input of sampling.py
"""

from dataclasses import dataclass, replace
from typing import Any

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
DEPTH_FACTOR = 4  # ranks read per kept row where near duplicates are dropped, and the growth when these are not enough


def nested_filters(select: Select) -> dict[str, Select]:
    """For each filter of `select`, a Select of it and of the filters before it; what the two drop more than those before is
    counted under its name."""
    given = {name: getattr(select, name) for name in FILTERS if getattr(select, name) is not None}
    names = list(given)
    return {name: Select(**{each: given[each] for each in names[: i + 1]}) for i, name in enumerate(names)}


def needs_count(select: Select, raw: bool) -> bool:
    """True if the rows that the filters keep must be counted before the ranks of the window are known."""
    by_fraction = isinstance(select.range_min, float) or isinstance(select.range_max, float)
    return by_fraction and select.has_filter and not raw


@dataclass(frozen=True)
class BatchMiner:
    """Finds the windows of queries; every batch of a run uses the same one."""

    source: Any
    select: Select
    raw: bool
    num_negatives: int
    strategy: str
    count_skipped: bool
    excluded: Hidden | RowLists  # documents that each query must not get
    deduplicator: Deduplicator | None

    @property
    def filters(self) -> Select:
        return replace(self.select, range_min=0, range_max=None)

    @property
    def max_candidates(self) -> int | None:
        """Members of a window that sampling looks at; None = all."""
        return candidates_needed(self.select, self.num_negatives, self.strategy)

    def depth(self, size: int) -> int:
        """The number of ranks read first, of a pool of this size."""
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
        """query (B, D) with query numbers rows (B,), anchor (B,) -> window (B, W), and the pairs that each filter dropped."""
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
        """Ranks [first, last) of each pool, at most max_ranks of them -> window (B, W), dropped, near-duplicate counts (B, 2)."""
        end = self._end(first, last, max_ranks)
        depth = int(end.max()) if len(end) else 0
        sort_keys, drops = self.source.run(query, excluded, anchor, depth, self.filters, counted_filters)
        window = slice_window(sort_keys, first, end)
        if self.deduplicator is None:
            return window, drops, None
        has_more = (window != sort_key.NOWHERE).sum(1) == end - first  # (B,) bool: the pool may hold more rows
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
        """The window (B, W) of raw ranks, without excluded and filtered rows, packed to the left; and what each filter drops."""
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
