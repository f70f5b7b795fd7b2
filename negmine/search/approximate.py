"""Candidates from an index instead of a scan: asked for, scored exactly, masked, filtered, ranked, and asked for again deeper.

An index knows neither masks nor filters. So k starts at the ranks wanted and the rows hidden, and grows fourfold for the queries
that came short, up to MOST_CANDIDATES: the window is cut after the filters, as in a scan. The scores that rank and filter are the
kernels' own on the corpus, never the index's. What the index does not find is not seen: the result's recall says how much.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from negmine import order, reference
from negmine.options import Select
from negmine.search.index import NegativeIndex
from negmine.search.lists import RowLists
from negmine.search.scan import Corpus, Scan, pair_scores

MOST_CANDIDATES = 4096  # of a query, unless its window begins deeper
CANDIDATE_BYTES = 160  # of one candidate while it is scored and sorted


@dataclass
class IndexScan:
    """Stands where a Scan stands."""

    scan: Scan  # for its kernels, corpus and copies
    index: NegativeIndex
    room: int  # bytes of candidates at a time
    cut_short: int = 0  # queries whose search ended at MOST_CANDIDATES with fewer rows than wanted

    def taken_cut_short(self) -> int:
        """The count so far, which begins anew."""
        count, self.cut_short = self.cut_short, 0
        return count

    @property
    def corpus(self) -> Corpus:
        return self.scan.corpus

    @property
    def advance(self) -> Callable[[int], object]:
        return self.scan.advance

    @property
    def candidates(self) -> int:
        return self.scan.candidates

    def run(
        self,
        query: Tensor,
        excluded: RowLists,
        anchor: Tensor | None,
        depth: int,
        ranked: Select,
        counted: list[Select],
    ) -> tuple[Tensor, Tensor]:
        """As Scan.run; what filters drop is counted among the candidates that were looked at."""
        B, K = len(query), len(self.corpus)
        places = torch.full((B, depth), order.NOWHERE, dtype=torch.int64, device=query.device)  # (B, depth)
        dropped = torch.zeros(len(counted), B, dtype=torch.int64, device=query.device)
        k = min(K, depth + int(excluded.sizes.max(initial=0)))
        most = min(K, max(MOST_CANDIDATES, k))
        todo = torch.arange(B if depth else 0)  # (R,)
        while len(todo):
            short = []
            for some in todo.split(max(1, self.room // (CANDIDATE_BYTES * k))):
                at = some.to(query.device)
                part = (query[at], excluded.take(some.numpy()), None if anchor is None else anchor[at])
                found, drops, exhausted = self._ranked(*part, k, ranked, counted)
                width = min(depth, found.shape[1])
                places[at, :width], dropped[:, at] = found[:, :width], drops
                short.append(some[((places[at] == order.NOWHERE).any(1) & ~exhausted).cpu()])
            todo = torch.cat(short)
            if k == most:
                self.cut_short += len(todo) if most < K else 0
                break
            k = min(most, 4 * k)
        self.advance(1)
        return places, dropped

    def _ranked(
        self, query: Tensor, excluded: RowLists, anchor: Tensor | None, k: int, ranked: Select, counted: list[Select]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """places (B, k), what each of `counted` drops (len(counted), B), and (B,) bool: asking deeper finds nothing."""
        B, K, device = len(query), len(self.corpus), query.device
        ids = torch.from_numpy(self.index.candidates(query, k)).to(device)  # (B, k)
        known = ids >= 0
        at = known.nonzero()[:, 0].cpu().numpy()  # (C,)
        rows = ids[known].cpu().numpy()  # (C,)
        scores = torch.full(ids.shape, torch.nan, device=device)
        scores[known] = torch.from_numpy(
            pair_scores(
                self.scan.ops,
                lambda numbers: query[torch.from_numpy(numbers).to(device)],
                self.corpus.gather,
                at,
                rows,
            )
        ).to(device)
        hidden = torch.from_numpy(excluded.queries * K + excluded.rows).to(device)  # (E,)
        own = torch.arange(B, device=device)[:, None] * K + ids  # (B, k)
        pool = known & ~scores.isnan() & ~torch.isin(own, hidden)
        if self.scan.distinct is not None:
            pool &= torch.from_numpy(self.scan.distinct).to(device)[ids.clamp_min(0)]
        drops = torch.stack(
            [(pool & ~reference.filtered(scores, anchor, each, pool)).sum(1) for each in counted]
            or [torch.zeros(B, dtype=torch.int64, device=device)]
        )[: len(counted)]
        kept = reference.filtered(scores, anchor, ranked, pool)
        places = order.pack(scores, ids.clamp_min(0)).masked_fill(~kept, order.NOWHERE)
        exhausted = ~known[:, -1]
        if ranked.min_score is not None:
            exhausted |= scores[:, -1] < ranked.min_score
        return places.sort(dim=1, descending=True).values, drops, exhausted
