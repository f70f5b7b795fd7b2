"""Rank the rows of a corpus for queries with the kernels, without a (Q, K) matrix.

On a CPU a .npy file stays memory-mapped. Shards are concatenated, and normalize=True copies the rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from negmine import reference
from negmine.mining.memory_budget import DENSE_BYTES
from negmine.mining.row_lists import RowLists
from negmine.mining.scan import Corpus, Scan, count_kept, hardest_rows, pair_scores
from negmine.mining.sources import Rows
from negmine.ops import backends, checks, sort_key
from negmine.ops.backends import Kernels
from negmine.ops.pool import Pool, usable
from negmine.ops.vectors import widened
from negmine.options import Select

BLOCK = 16_384  # rows at a time while norms are computed


def _load(op: str, name: str, rows: Rows, numbers: np.ndarray | None, normalize: bool, where: torch.device) -> Tensor:
    """The rows `numbers`, or all rows, as one (M, D) tensor on `where`. Raises ValueError for a row that is not finite."""
    if numbers is not None:
        block = rows.gather(numbers, where)
    elif len(rows.shards) == 1:
        block = rows.block(0, len(rows), where)
    else:
        block = torch.cat([rows.block(begin, end, where) for begin, end in rows.spans(max(1, len(rows)))])
    made = torch.empty_like(block) if normalize else block
    for begin in range(0, len(block), BLOCK):
        part = block[begin : begin + BLOCK].float()  # (BLOCK, D)
        bad = (~part.isfinite()).any(1).nonzero()
        if len(bad):
            row = begin + int(bad[0])
            raise checks.refuse(
                op, name, "finite", checks.Phrase(f"NaN or infinity in row {row if numbers is None else numbers[row]}")
            )
        if normalize:
            made[begin : begin + BLOCK] = F.normalize(part, dim=1).to(block.dtype)
    return made


def norms(vectors: Tensor) -> tuple[float, float]:
    """The smallest and the largest norm of the rows of vectors (M, D)."""
    parts = [vectors[begin : begin + BLOCK].float().norm(dim=1) for begin in range(0, len(vectors), BLOCK)]
    every = torch.cat(parts)
    return float(every.min()), float(every.max())


@dataclass
class Ranking:
    """The sampled queries (Q, D) and the corpus (K, D)."""

    ops: Kernels | None
    queries: Tensor  # (Q, D)
    corpus: Tensor  # (K, D)
    scan: Scan

    @classmethod
    def open(
        cls,
        op: str,
        names: tuple[str, str],
        embeddings: tuple[Rows, Rows],
        numbers: np.ndarray,
        normalize: bool,
        where: torch.device,
        backend: str | None,
    ) -> "Ranking":
        """numbers (Q',): the queries to keep."""
        queries = _load(op, names[0], embeddings[0], numbers, normalize, where)
        corpus = _load(op, names[1], embeddings[1], None, normalize, where)
        ops = backends.choose(op, ("mine_hardest", "rank_thresholds", "count_negatives"), backend, (queries, corpus))
        rows = Rows.open(op, names[1], corpus)
        return cls(ops, queries, corpus, Scan(ops, Corpus(rows, where), len(rows), None))

    @property
    def pair_bytes(self) -> int:
        """Bytes of memory per (query, row) pair of a batch, without its mask."""
        return 0 if self.ops is not None else DENSE_BYTES

    def pool(self, hidden: RowLists, begin: int, end: int) -> Pool:
        """The pools of queries [begin, end)."""
        own = hidden.take(np.arange(begin, end))
        return self.scan.pool(end - begin, 0, len(self.corpus), own.queries, own.rows)

    def hardest(self, query: Tensor, N: int, pool: Pool) -> tuple[Tensor, Tensor]:
        """query (B, D) -> scores (B, N), rows (B, N), padded with -inf and -1."""
        scores, rows, _ = hardest_rows(self.ops, query, self.corpus, N, pool, Select(), None)
        return scores, rows

    def at_ranks(self, query: Tensor, ranks: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        """query (B, D), ranks (B, R) int64 -> scores (B, R), rows (B, R) at these ranks; -inf and -1 past the end of a pool."""
        if self.ops is not None:
            return sort_key.unpack(self.ops.rank_thresholds(query, self.corpus, ranks, *pool))
        q, k = widened(query), widened(self.corpus)
        scores, rows = reference.mine_hardest(q, k, len(k), usable(pool, query, self.corpus))  # (B, K) each
        column = ranks.clamp(0, len(k) - 1)
        scores, rows = scores.gather(1, column), rows.gather(1, column)
        return scores.masked_fill(ranks < 0, -torch.inf), rows.masked_fill(ranks < 0, -1)

    def count_not_above(self, query: Tensor, anchor: Tensor, pool: Pool) -> Tensor:
        """anchor (B,) fp32 -> (B,) int64: how many rows of the pool have a score of at most the anchor."""
        return count_kept(self.ops, query, self.corpus, pool, Select(absolute_margin=0.0), anchor)

    def pair_scores(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """queries, rows (P,) -> (P,) fp32: the score of each pair, bit for bit as in the ranking."""

        def vectors(numbers: np.ndarray) -> Tensor:
            return self.queries[torch.from_numpy(numbers).to(self.queries.device)]

        return pair_scores(self.ops, vectors, self.scan.corpus.gather, queries, rows)

    def nearest(self, rows: np.ndarray, hidden: RowLists, N: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """The N rows nearest to each of the corpus rows rows[begin:end], without the rows hidden from it."""
        chosen = torch.from_numpy(rows[begin:end]).to(self.corpus.device)
        return self.hardest(self.corpus[chosen], N, self.pool(hidden, begin, end))
