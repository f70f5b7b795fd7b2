"""One batch of queries: which ranks to look at, what the filters and near duplicates take, how deep to look again.

source   a Scan of the whole corpus, or an IndexScan of an index's candidates
window   (B, W) int64 order, hardest first, NOWHERE past its end; what draw.py draws from
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from negmine import order, reference
from negmine.options import Select
from negmine.search.approximate import IndexScan
from negmine.search.draw import wanted_of, window_of
from negmine.search.lists import RowLists
from negmine.search.scan import Scan
from negmine.search.thin import Thinner

FILTERS = ("min_score", "max_score", "absolute_margin", "relative_margin")
REACH = (
    4  # ranks looked at for each kept row where near duplicates are dropped, and the growth when they do not suffice
)


def each_filter(select: Select) -> dict[str, Select]:
    """A Select for each filter alone."""
    given = {name: getattr(select, name) for name in FILTERS}
    return {name: Select(**{name: value}) for name, value in given.items() if value is not None}


def counts_first(select: Select, raw: bool) -> bool:
    """True where the size of a filtered pool decides which ranks are wanted."""
    by_fraction = isinstance(select.range_min, float) or isinstance(select.range_max, float)
    return by_fraction and select.has_filter and not raw


@dataclass(frozen=True)
class Miner:
    """What every batch of a run shares: the options, and the rows that one query or no query may see."""

    source: Scan | IndexScan
    select: Select
    raw: bool
    n: int
    strategy: str
    count_skipped: bool
    hidden: RowLists  # distinct rows of each query's positives and exclusions
    thinner: Thinner | None

    @property
    def filters(self) -> Select:
        return replace(self.select, range_min=0, range_max=None)

    @property
    def wanted(self) -> int | None:
        """Members of a window that the draw looks at; None = all."""
        return wanted_of(self.select, self.n, self.strategy)

    def depth(self, size: int) -> int:
        """The first look at a pool of this size, in ranks."""
        first, last = self.select.window(torch.tensor([size]))
        return int(self._end(first, last, self._reach))

    @property
    def _reach(self) -> int | None:
        if self.raw or self.wanted is None:
            return None
        return self.wanted if self.thinner is None else REACH * self.wanted

    @staticmethod
    def _end(first: Tensor, last: Tensor, reach: int | None) -> Tensor:
        return last if reach is None else last.minimum(first + reach)

    def window(self, query: Tensor, rows: Tensor, anchor: Tensor | None) -> tuple[Tensor, dict[str, int]]:
        """query (B, D) of query numbers rows (B,), anchor (B,) -> the window (B, W), and pairs dropped by each filter."""
        hidden = self.hidden.take(rows.numpy())
        counted = each_filter(self.select) if self.count_skipped else {}
        if self.raw:
            window, drops = self._raw_window(query, hidden, anchor, list(counted.values()))
            near = None
            if self.thinner is not None:
                window, near = self.thinner(window, rows, self.wanted)
        else:
            size = self.source.candidates - torch.from_numpy(hidden.sizes).to(query.device)  # (B,)
            if counts_first(self.select, self.raw):
                size = size - self.source.run(query, hidden, anchor, 0, self.filters, [self.filters])[1][0]
            first, last = self.select.window(size)
            window, drops, near = self._look(
                query, rows, hidden, anchor, first, last, self._reach, list(counted.values())
            )
        dropped = {name: int(drop.sum()) for name, drop in zip(counted, drops, strict=True)}
        if near is not None:
            dropped |= {"near_positive": int(near[:, 0].sum()), "near_negative": int(near[:, 1].sum())}
        return window, dropped

    def _look(
        self,
        query: Tensor,
        rows: Tensor,
        hidden: RowLists,
        anchor: Tensor | None,
        first: Tensor,
        last: Tensor,
        reach: int | None,
        counted: list[Select],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ranks [first, last) of each pool, as many as `wanted` needs -> window (B, W), dropped, near (B, 2)."""
        end = self._end(first, last, reach)
        places, drops = self.source.run(query, hidden, anchor, int(end.max()) if len(end) else 0, self.filters, counted)
        window = window_of(places, first, end)
        if self.thinner is None:
            return window, drops, None
        full = (window != order.NOWHERE).sum(1) == end - first  # (B,): the pool may go on
        window, near = self.thinner(window, rows, self.wanted)  # (B, W), (B, 2)
        if self.wanted is None or reach is None:
            return window, drops, near
        short = ((window != order.NOWHERE).sum(1) < self.wanted) & full & (end < last)  # (B,)
        if not short.any():
            return window, drops, near
        at = short.nonzero()[:, 0].cpu()
        numbers, on = at.numpy(), at.to(query.device)
        deeper, _, again = self._look(
            query[on],
            rows[at],
            hidden.take(numbers),
            None if anchor is None else anchor[on],
            first[on],
            last[on],
            reach * REACH,
            [],
        )
        width = max(window.shape[1], deeper.shape[1])
        window, deeper = (
            torch.nn.functional.pad(part, (0, width - part.shape[1]), value=order.NOWHERE) for part in (window, deeper)
        )
        assert again is not None  # the same thinner
        window[on], near[on] = deeper, again
        return window, drops, near

    def _raw_window(
        self, query: Tensor, hidden: RowLists, anchor: Tensor | None, counted: list[Select]
    ) -> tuple[Tensor, Tensor]:
        """The window (B, W) of raw ranks without hidden rows and what filters drop, packed to the left; (len(counted), B)."""
        B, K = len(query), len(self.source.corpus)
        size = torch.full((B,), self.source.candidates, device=query.device)  # (B,)
        first, last = self.select.window(size)
        nothing = RowLists(np.zeros(B + 1, np.int64), hidden.rows[:0])
        places, _ = self.source.run(query, nothing, None, int(last.max()) if B else 0, Select(), [])
        window = window_of(places, first, last)  # (B, W)
        scores, index = order.unpack(window)  # (B, W) each
        keys = torch.from_numpy(hidden.queries * K + hidden.rows).to(window.device)  # (E,)
        own = torch.arange(B, device=window.device)[:, None] * K + index  # (B, W)
        pool = (window != order.NOWHERE) & ~torch.isin(own, keys)
        drops = torch.zeros(len(counted), B, dtype=torch.int64, device=window.device)
        for drop, each in zip(drops, counted, strict=True):
            drop += (pool & ~reference.filtered(scores, anchor, each, pool)).sum(1)
        kept = reference.filtered(scores, anchor, self.filters, pool)  # (B, W)
        return window.masked_fill(~kept, order.NOWHERE).sort(dim=1, descending=True).values, drops
