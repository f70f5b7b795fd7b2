"""Executors compute a phase for all rows of the corpus: in this process, on the ranks of a group, or by a given engine.

    len(executor), executor.dim, dtype, row_bytes, is_rounded      of the whole corpus
    executor.device                                                where windows are ranked
    executor.execute(plan, phase, query)                           the part of all rows; query (B, D), or None
    executor.steps(plan)                                           how often `advance` is called for one scan

A phase is described in parts.py. RankRows are queries that the ranks of a group hold.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from negmine.mining.memory_budget import MAX_QUERIES
from negmine.mining.merging import join_parts
from negmine.mining.parts import MiningPlan, Part, PartMiner, Phase
from negmine.mining.process_ranks import ProcessRanks
from negmine.mining.row_lists import RowLists
from negmine.mining.scan import OPS
from negmine.mining.sources import DTYPES, Rows
from negmine.ops import backends
from negmine.ops.checks import kind_of, refuse
from negmine.options import Select

Engine = Callable[[MiningPlan, Phase, Tensor | None], Part]
NO_CALLS: Callable[[int], object] = lambda steps: None  # noqa: E731


def is_dense(op: str, backend: str | None, device: torch.device, dtypes: tuple[str, str], dim: int) -> bool:
    """True if the reference computes scores, with a score matrix. Raises if the requested backend is not available."""
    by_name = {name: dtype for dtype, name in DTYPES.items()}
    examples = [torch.empty(0, dim, dtype=by_name[name], device=device) for name in dtypes]
    return backends.choose(op, OPS, backend, (examples[0], examples[1])) is None


class LocalExecutor:
    """Executes phases on rows of this process, or on the rows that each rank of a group holds."""

    def __init__(self, op: str, rows: Rows, device: torch.device, ranks: ProcessRanks, engine: Engine | None) -> None:
        self.op, self.rows, self.device, self.ranks, self._engine = op, rows, device, ranks, engine
        self.rows_per_rank = ranks.counts(len(rows))
        self.advance = NO_CALLS
        self._miner: PartMiner | None = None

    def __len__(self) -> int:
        return sum(self.rows_per_rank)

    @property
    def dim(self) -> int:
        return self.rows.dim

    @property
    def dtype(self) -> str:
        return self.rows.dtype

    @property
    def row_bytes(self) -> int:
        return self.rows.row_bytes

    @property
    def is_rounded(self) -> bool:
        return self.rows.is_rounded

    def is_dense(self, backend: str | None, query_dtype: str) -> bool:
        return is_dense(self.op, backend, self.device, (query_dtype, self.dtype), self.dim)

    def steps(self, plan: MiningPlan) -> int:
        return 1 if self._engine is not None else len(list(self.rows.spans(plan.chunk_size)))

    def miner(self, plan: MiningPlan) -> PartMiner:
        """The PartMiner of this process's rows."""
        if self._miner is None or self._miner.plan is not plan:
            first_row = sum(self.rows_per_rank[: self.ranks.rank])
            self._miner = PartMiner(self.op, plan, self.rows, first_row, self.device, lambda n: self.advance(n))
        return self._miner

    def execute(self, plan: MiningPlan, phase: Phase, query: Tensor | None) -> Part:
        if self._engine is not None:
            part = self._engine(plan, phase, query)
            self.advance(phase.name in ("scan", "counts"))
            if not isinstance(part, Part):
                wanted = "a function that returns the Part of all queries and rows, as merge_parts makes it"
                raise refuse(self.op, "engine", wanted, kind_of(part), TypeError)
        else:
            part = self.miner(plan)(phase, query)
            if self.ranks.size > 1:
                contents = self.ranks.gather_bytes(part.to_bytes(), f"the parts of phase {phase.name}")
                part = join_parts([Part.from_bytes(content) for content in contents])
        part.require_complete(self.op, phase, plan)
        return part


def pair_scores(executor: Any, queries: Any, lists: RowLists, backend: str | None) -> np.ndarray:
    """(P,) fp32: the scores of queries with the rows in their lists, as mining computes them."""
    plan = MiningPlan("", len(executor), executor.dim, (queries.dtype, executor.dtype), backend, 1, None)
    scores = [np.empty(0, np.float32)]
    for begin in range(0, len(queries), MAX_QUERIES):
        end = min(begin + MAX_QUERIES, len(queries))
        phase = Phase("positives", lists.take(np.arange(begin, end)))
        scores.append(executor.execute(plan, phase, queries.block(begin, end, executor.device)).arrays["scores"])
    return np.concatenate(scores)


@dataclass(frozen=True)
class ExecutorScan:
    """The source of a BatchMiner that asks an executor."""

    executor: Any
    plan: MiningPlan
    num_rows: int = field(init=False)
    num_candidates: int = field(init=False)  # rows, duplicates left out

    def __post_init__(self) -> None:
        distinct = self.plan.distinct
        object.__setattr__(self, "num_rows", self.plan.corpus_rows)
        object.__setattr__(self, "num_candidates", self.num_rows if distinct is None else int(distinct.sum()))

    def run(
        self,
        query: Tensor,
        excluded: RowLists,
        anchor: Tensor | None,
        depth: int,
        filters: Select,
        counted_filters: list[Select],
    ) -> tuple[Tensor, Tensor]:
        """Like Scan.run."""
        held = None if anchor is None else anchor.cpu().numpy()
        phase = Phase("scan" if depth else "counts", excluded, held, depth, filters, tuple(counted_filters))
        arrays = self.executor.execute(self.plan, phase, query).arrays
        dropped = torch.from_numpy(arrays["num_dropped"]).T.to(query.device)  # (len(counted_filters), B)
        if not depth:
            return query.new_empty(len(query), 0, dtype=torch.int64), dropped
        return torch.from_numpy(arrays["sort_keys"]).to(query.device), dropped

    def gather(self, numbers: np.ndarray) -> Tensor:
        """numbers (M,) int64 of corpus rows -> (M, D) fp32."""
        rows, at = np.unique(numbers, return_inverse=True)
        part = self.executor.execute(self.plan, Phase("rows", RowLists.empty(1), rows=rows), None)
        return torch.from_numpy(part.arrays["vectors"][at.reshape(-1)]).to(self.executor.device)


class RankRows:
    """Queries of which each rank holds its own, in rank order, read as Rows are; every rank asks for the same rows at once."""

    def __init__(self, rows: Rows, ranks: ProcessRanks, rows_per_rank: list[int]) -> None:
        self.rows, self.ranks = rows, ranks
        self.starts = np.r_[0, np.cumsum(rows_per_rank)]
        self.dim, self.dtype, self.device, self.row_bytes = rows.dim, rows.dtype, rows.device, rows.row_bytes
        self.is_rounded = rows.is_rounded

    def __len__(self) -> int:
        return int(self.starts[-1])

    def spans(self, size: int) -> Any:
        return ((begin, min(begin + size, len(self))) for begin in range(0, len(self), size))

    def block(self, begin: int, end: int, device: torch.device) -> Tensor:
        """(C, D)."""
        low, high = (int(edge) for edge in np.clip((begin, end), *self.starts[self.ranks.rank :][:2]) - self._first)
        own = self.rows.block(low, high, torch.device("cpu")).contiguous()
        contents = self.ranks.gather_bytes(own.view(torch.uint8).numpy().tobytes(), "queries")
        joined = torch.frombuffer(bytearray(b"".join(contents)), dtype=own.dtype) if end > begin else own.reshape(-1)
        return joined.view(end - begin, self.dim).to(device)

    @property
    def _first(self) -> int:
        return int(self.starts[self.ranks.rank])

    def row_digests(self) -> np.ndarray:
        """As Rows.row_digests."""
        contents = self.ranks.gather_bytes(self.rows.row_digests().tobytes(), "digests of queries")
        return np.frombuffer(b"".join(contents), np.uint64).reshape(-1, 2)

    def content(self) -> tuple[np.ndarray, np.ndarray]:
        """As Rows.content."""
        own = self.rows.content(self._first)
        hashes, not_finite = (
            b"".join(self.ranks.gather_bytes(part.tobytes(), what))
            for part, what in zip(own, ("hashes of queries", "queries that are not finite"), strict=True)
        )
        total = np.frombuffer(hashes, np.uint64).reshape(-1, 2).sum(0, dtype=np.uint64)
        return total, np.frombuffer(not_finite, np.int64)


def open_queries(op: str, value: Any, ranks: ProcessRanks, positives: Any) -> Any:
    """query_embeddings: of all queries, or, where `positives` has an entry for each query of all ranks, this rank's own."""
    if isinstance(value, RankRows):
        return value
    rows = Rows.open(op, "query_embeddings", value)
    ranks.require_same({"query dtype": rows.dtype, "D": rows.dim})
    counts = ranks.counts(len(rows))
    is_pair = isinstance(positives, tuple) and len(positives) == 2 and hasattr(positives[0], "__len__")
    entries = len(positives[0]) - 1 if is_pair else len(positives) if hasattr(positives, "__len__") else None
    is_shared = ranks.size > 1 and entries == sum(counts) and any(count != entries for count in counts)
    return RankRows(rows, ranks, counts) if is_shared else rows
