"""Choose how many queries and corpus rows to process at a time within a memory budget."""

from dataclasses import dataclass

from negmine.mining.sources import Rows
from negmine.ops import checks

DEFAULT_MEMORY = 1 << 30
MAX_QUERIES, MAX_ROWS = 8192, 262_144  # a larger batch or chunk is not faster
DENSE_BYTES = 64  # per (query, row) pair of a batch and a chunk on the reference, which stores the score matrix
CANDIDATE_BYTES = (
    160  # per kept candidate: its sort key twice in the merge, its score, its index, and the words of a draw
)


@dataclass(frozen=True)
class BatchSizes:
    """Queries per batch and corpus rows per chunk."""

    batch: int
    chunk: int


def plan_batches(
    op: str,
    queries: Rows,
    corpus: Rows,
    depth: int,
    pair_bytes: int,
    batch: int | None,
    chunk: int | None,
    memory: int | None,
) -> BatchSizes:
    """The sizes that fit the memory. Half of it is for the batch, and half for the chunk and its masks."""
    query_bytes = queries.row_bytes + CANDIDATE_BYTES * max(depth, 1)
    half = (memory or DEFAULT_MEMORY) // 2
    most = max(1, min(len(queries), MAX_QUERIES, half // query_bytes))
    batch = most if batch is None else min(batch, max(1, len(queries)))
    row_bytes = (
        corpus.row_bytes * 3 // 2 + 16 + pair_bytes * batch
    )  # half as much again for the rounded copy of prefilter.py
    most = max(1, min(len(corpus), MAX_ROWS, half // row_bytes))
    chunk = most if chunk is None else min(chunk, max(1, len(corpus)))
    needed = batch * query_bytes + chunk * row_bytes
    if memory is not None and needed > memory:
        wanted = f"at least {needed} for a batch of {batch} queries, {depth} ranks of each, and chunks of {chunk} rows"
        raise checks.refuse(op, "max_memory_bytes", wanted, memory)
    return BatchSizes(batch, chunk)
