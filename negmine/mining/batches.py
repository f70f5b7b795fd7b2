"""build_batches: batches of queries that are hard for each other.

Query b is a neighbour of query a if a positive of b is among the hard negatives of a. A batch starts with a randomly chosen
query. The neighbours of its members are added, hardest first, then the neighbours of those. If there are no more, further
random queries are added. Two queries that share a positive document are never in the same batch, and neither are two rows of
the same query, so within a batch the positive of another query is always a negative.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from negmine.mining.columns import Column
from negmine.mining.result import MiningResult
from negmine.mining.row_lists import RowLists, whole_numbers
from negmine.ops import checks

OP = "build_batches"


class HardBatches(Sampler[list[int]]):
    """A sampler of lists of row numbers, made by build_batches. Pass it to a DataLoader as batch_sampler."""

    def __init__(
        self, documents: RowLists, neighbours: RowLists, groups: np.ndarray, size: int, drop_last: bool, seed: int
    ) -> None:
        self._documents, self._neighbours, self._groups = documents, neighbours, groups
        self.batch_size, self.drop_last, self.seed, self.epoch = size, drop_last, seed, 0
        self._made: tuple[int, list[list[int]]] | None = None  # an epoch and its batches

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes the random batches."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(batch) for batch in self._batches()])

    def __len__(self) -> int:
        return len(self._batches())

    def _batches(self) -> list[list[int]]:
        if self._made is None or self._made[0] != self.epoch:
            draw = np.random.default_rng([self.seed, self.epoch])
            batches = [
                batch for group in np.unique(self._groups[self._groups >= 0]) for batch in self._of_group(group, draw)
            ]
            if self.drop_last:
                batches = [batch for batch in batches if len(batch) == self.batch_size]
            self._made = (self.epoch, [batches[i] for i in draw.permutation(len(batches))])
        return self._made[1]

    def _of_group(self, group: int, draw: np.random.Generator) -> Iterator[list[int]]:
        members = np.flatnonzero(self._groups == group)
        waiting = deque(draw.permutation(members).tolist())  # in random order; some may already be in a batch
        is_free = np.zeros(len(self._groups), bool)
        is_free[members] = True
        while waiting:
            batch: list[int] = []
            taken: set[int] = set()  # positives of the members
            passed: list[int] = []  # queries that share a positive with a member

            reached = 0  # members whose neighbours were already added
            while len(batch) < self.batch_size:
                if reached < len(batch):
                    for other in self._list(self._neighbours, batch[reached]):
                        if is_free[other] and len(batch) < self.batch_size:
                            self._add(other, batch, taken, is_free)
                    reached += 1
                elif waiting:
                    query = waiting.popleft()
                    if is_free[query] and not self._add(query, batch, taken, is_free):
                        passed.append(query)
                else:
                    break
            waiting.extendleft(reversed(passed))
            if batch:
                yield batch

    def _add(self, query: int, batch: list[int], taken: set[int], is_free: np.ndarray) -> bool:
        """Add a query to the batch unless it shares a positive with a member."""
        own = self._list(self._documents, query)
        if not taken.isdisjoint(own):
            return False
        batch.append(query)
        taken.update(own)
        is_free[query] = False
        return True

    @staticmethod
    def _list(lists: RowLists, query: int) -> list[int]:
        return lists.rows[lists.indptr[query] : lists.indptr[query + 1]].tolist()


def build_batches(
    result: MiningResult,
    batch_size: int,
    *,
    rows: Any = None,
    datasets: Any = None,
    drop_last: bool = False,
    seed: int = 0,
) -> HardBatches:
    """Make batches of queries that are hard for each other and share no positives, as a torch Sampler.

    Parameters
    ----------
    result : MiningResult
        Its hard negatives decide which queries are hard for each other. Its ids and texts decide which positives are the
        same document.
    batch_size : int
        How many queries a batch has. The last batch, and batches for which no further query without a common positive is
        left, may be smaller.
    rows : sequence of int, optional
        The query of each row of the training data, for data with one row per positive. Batches then have row numbers. Each
        row occurs once per epoch, and two rows of one query are never in the same batch. Default: one row per query.
    datasets : sequence, optional
        A name or a number for each query. All queries of a batch then have the same one.
    drop_last : bool
        Leave out batches that are smaller than batch_size.
    seed : int
        Seed of the random numbers. `set_epoch` gives each epoch its own batches.

    Returns
    -------
    HardBatches
        A sampler for the batch_sampler of a DataLoader. Queries without a positive are left out.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid.

    Examples
    --------
    >>> rows = F.normalize(torch.randn(50, 16), dim=1)
    >>> result = negmine.mine_hard_negatives(rows[:20], rows, list(range(20)))
    >>> batches = negmine.mining.build_batches(result, batch_size=5)
    >>> sorted(query for batch in batches for query in batch) == list(range(20))
    True
    """
    if not isinstance(result, MiningResult):
        raise checks.refuse(OP, "result", "a MiningResult", checks.kind_of(result), TypeError)
    checks.require_count(OP, "batch_size", batch_size)
    checks.require_bool(OP, "drop_last", drop_last)
    checks.require_draw(OP, seed, 0, 0)
    Q, K = len(result.indices), result.config["corpus_rows"]
    groups = np.zeros(Q, np.int64)
    if datasets is not None:
        column = Column(OP, "datasets", datasets, "a name or a number for each query")
        column.require_length(Q, f"{Q} names or numbers, one per query")
        names: dict[Any, int] = {}
        groups[:] = [names.setdefault(entry, len(names)) for _, block in column.blocks() for entry in block]
    hidden = result.hidden()
    positives = hidden.positives.take(np.arange(Q))
    documents = RowLists.of_pairs(positives.queries, hidden.documents(positives.rows), Q)
    groups[documents.sizes == 0] = -1
    by_document = RowLists.of_pairs(documents.rows, documents.queries, K)  # queries by positive
    at, slot = np.nonzero(result.indices >= 0)  # hardest first
    answered = by_document.take(hidden.documents(result.indices[at, slot]))
    owner = np.repeat(at, answered.sizes)
    neighbours = RowLists(np.r_[0, np.cumsum(np.bincount(owner, minlength=Q))], answered.rows).distinct()
    if rows is not None:
        query_of = whole_numbers(OP, "rows", rows)
        outside = np.flatnonzero((query_of < 0) | (query_of >= Q))
        if len(outside):
            raise checks.refuse(OP, "rows", f"numbers of queries, in [0, {Q})", query_of[outside[0]].item())
        rows_of = RowLists.of_pairs(query_of, np.arange(len(query_of)), Q)
        near = neighbours.take(query_of)
        each = rows_of.take(near.rows)  # the rows of all neighbours
        ends = np.r_[0, np.cumsum(each.sizes)][near.indptr]
        documents, neighbours, groups = documents.take(query_of), RowLists(ends, each.rows), groups[query_of]
    return HardBatches(documents, neighbours, groups, batch_size, drop_last, seed)
