"""Find likely false negatives: negatives that outscore all positives, and near duplicates of positives."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from negmine.mining.identity import fold
from negmine.mining.row_lists import RowLists
from negmine.report.ranking import Ranking

TOP = 10  # hardest negatives of a query that are examined
MAX_PER_QUERY = 3  # suspects listed for one query


@dataclass
class Suspects:
    """The negatives among the hardest TOP of each query that outscore its best positive, largest gap first."""

    most: int  # number of suspects to keep
    # (-gap, query, row, score, score of the positive)
    found: list[tuple[float, int, int, float, float]] = field(default_factory=list)
    # (B,) for each batch: how many of the TOP hardest outscore the positive
    outscoring: list[Tensor] = field(default_factory=list)
    # (B, TOP) for each batch: score minus the score of the positive
    margins: list[Tensor] = field(default_factory=list)

    def batch(self, begin: int, scores: Tensor, rows: Tensor, anchor: Tensor) -> None:
        """Add a batch: scores, rows (B, TOP), anchor (B,), the score of the best positive or NaN if there is none."""
        gap = scores - anchor[:, None]  # (B, TOP)
        self.margins.append(torch.nn.functional.pad(gap, (0, TOP - gap.shape[1]), value=-torch.inf))
        self.outscoring.append((gap > 0).sum(1))
        at, slot = (gap[:, :MAX_PER_QUERY] > 0).nonzero(as_tuple=True)
        for b, n in zip(at.tolist(), slot.tolist(), strict=True):
            score, positive = float(scores[b, n]), float(anchor[b])
            self.found.append((positive - score, begin + b, int(rows[b, n]), score, positive))
        self.found = sorted(self.found)[: self.most]

    def figures(self) -> dict[str, np.ndarray]:
        """The figures, over queries with a positive."""
        margins, above = torch.cat(self.margins), torch.cat(self.outscoring)
        known = ~margins[:, 0].isnan()  # (Q,)
        margins, above = margins[known], above[known].double()
        return {
            "outscoring_rate": np.array(float((above > 0).double().mean())),
            "outscoring_mean": np.array(float(above.mean())),
            "top_margins": margins.numpy(),  # (queries with a positive, TOP)
        }


def near_duplicates(
    ranking: Ranking, positives: RowLists, hidden: RowLists, least: float, batch: int, advance: Any
) -> list[tuple[float, int, int, int]]:
    """(-score, query, positive, row) of rows that score at least `least` with a positive; at most TOP rows of each positive."""
    found = []
    of_pair = positives.queries  # (P,)
    hidden_of_pair = hidden.take(of_pair)
    for begin in range(0, len(of_pair), batch):
        end = min(begin + batch, len(of_pair))
        scores, rows = ranking.nearest(positives.rows, hidden_of_pair, min(TOP, len(ranking.corpus)), begin, end)
        at, slot = ((scores >= least) & (rows >= 0)).nonzero(as_tuple=True)
        for pair, score, row in zip(
            (begin + at).tolist(), scores[at, slot].tolist(), rows[at, slot].tolist(), strict=True
        ):
            found.append((-score, int(of_pair[pair]), int(positives.rows[pair]), row))
        advance(end - begin)
    return sorted(found)


def same_text(first: str | None, second: str | None) -> bool:
    """Whether two texts are equal except for case, spaces and Unicode composition."""
    return first is not None and second is not None and fold(first).casefold() == fold(second).casefold()
