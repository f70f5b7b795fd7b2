"""An approximate scan: candidates from an index instead of the whole corpus, scored exactly, masked, filtered and ranked.

An index knows neither masks nor filters. The number k of candidates therefore starts at the ranks wanted plus the rows excluded,
and grows fourfold, up to MAX_CANDIDATES, for queries with too few candidates left: the window is cut after the filters, as in an
exact scan. Candidates are ranked and filtered by the kernels' scores, never by those of the index. Rows that the index does not
find are missed; the recall in the result measures how many.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from negmine import reference
from negmine.mining.index import NegativeIndex
from negmine.mining.row_lists import RowLists
from negmine.mining.scan import Corpus, Scan, pair_scores
from negmine.ops import sort_key
from negmine.options import Select

MAX_CANDIDATES = 4096  # of a query, unless its window begins deeper
CANDIDATE_BYTES = 160  # of one candidate while it is scored and sorted


@dataclass
class IndexScan:
    """An approximate replacement for a Scan."""

    scan: Scan  # gives the kernels, the corpus and its distinct rows
    index: NegativeIndex
    max_bytes: int  # of candidates at a time
    cut_short: int = 0  # queries with too few rows at MAX_CANDIDATES candidates

    def pop_cut_short(self) -> int:
        """Return the count so far and reset it."""
        count, self.cut_short = self.cut_short, 0
        return count

    @property
    def corpus(self) -> Corpus:
        return self.scan.corpus

    @property
    def num_rows(self) -> int:
        return len(self.corpus)

    @property
    def advance(self) -> Callable[[int], object]:
        return self.scan.advance

    @property
    def num_candidates(self) -> int:
        return self.scan.num_candidates

    def run(
        self,
        query: Tensor,
        excluded: RowLists,
        anchor: Tensor | None,
        depth: int,
        filters: Select,
        counted_filters: list[Select],
    ) -> tuple[Tensor, Tensor]:
        """As Scan.run; `dropped` counts only the candidates of the index."""
        B, K = len(query), len(self.corpus)
        sort_keys = torch.full((B, depth), sort_key.NOWHERE, dtype=torch.int64, device=query.device)  # (B, depth)
        dropped = torch.zeros(len(counted_filters), B, dtype=torch.int64, device=query.device)
        k = min(K, depth + int(excluded.sizes.max(initial=0)))
        max_k = min(K, max(MAX_CANDIDATES, k))
        pending = torch.arange(B if depth else 0, device="cpu")  # (R,)
        while len(pending):
            unfinished = []
            for chunk in pending.split(max(1, self.max_bytes // (CANDIDATE_BYTES * k))):
                at = chunk.to(query.device)
                part = (query[at], excluded.take(chunk.numpy()), None if anchor is None else anchor[at])
                found, drops, exhausted = self._rank_candidates(*part, k, filters, counted_filters)
                width = min(depth, found.shape[1])
                sort_keys[at, :width], dropped[:, at] = found[:, :width], drops
                unfinished.append(chunk[((sort_keys[at] == sort_key.NOWHERE).any(1) & ~exhausted).cpu()])
            pending = torch.cat(unfinished)
            if k == max_k:
                self.cut_short += len(pending) if max_k < K else 0
                break
            k = min(max_k, 4 * k)
        self.advance(1)
        return sort_keys, dropped

    def _rank_candidates(
        self,
        query: Tensor,
        excluded: RowLists,
        anchor: Tensor | None,
        k: int,
        filters: Select,
        counted_filters: list[Select],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """sort_keys (B, k), dropped (len(counted_filters), B), and (B,) bool: True where more candidates would add nothing."""
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
        excluded_pairs = torch.from_numpy(excluded.queries * K + excluded.rows).to(device)  # (E,)
        pair_numbers = torch.arange(B, device=device)[:, None] * K + ids  # (B, k)
        pool = known & ~scores.isnan() & ~torch.isin(pair_numbers, excluded_pairs)
        if self.scan.distinct is not None:
            pool &= torch.from_numpy(self.scan.distinct).to(device)[ids.clamp_min(0)]
        drops = torch.stack(
            [(pool & ~reference.filtered(scores, anchor, each, pool)).sum(1) for each in counted_filters]
            or [torch.zeros(B, dtype=torch.int64, device=device)]
        )[: len(counted_filters)]
        kept = reference.filtered(scores, anchor, filters, pool)
        sort_keys = sort_key.pack(scores, ids.clamp_min(0)).masked_fill(~kept, sort_key.NOWHERE)
        exhausted = ~known[:, -1]
        if filters.min_score is not None:
            exhausted |= scores[:, -1] < filters.min_score
        return sort_keys.sort(dim=1, descending=True).values, drops, exhausted
