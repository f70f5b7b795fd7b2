"""How many queries and how many corpus rows at a time fit a budget of bytes."""

from dataclasses import dataclass

from negmine import checks
from negmine.search.rows import Rows

DEFAULT_MEMORY = 1 << 30
MOST_QUERIES, MOST_ROWS = 8192, 262_144  # beyond them a batch and a chunk gain nothing
DENSE_BYTES = 64  # one (query, row) pair of a batch and a chunk, where no kernel runs: the reference stores the matrix
PLACE_BYTES = 160  # one kept place: twice in the merge, its score, its index, and the words of a draw


@dataclass(frozen=True)
class Sizes:
    batch: int
    chunk: int


def sizes_of(
    op: str,
    queries: Rows,
    corpus: Rows,
    depth: int,
    pair_bytes: int,
    batch: int | None,
    chunk: int | None,
    memory: int | None,
) -> Sizes:
    """Queries a batch and rows a chunk that fit the memory: half of it for the batch, half for the chunk and its masks."""
    query_bytes = queries.row_bytes + PLACE_BYTES * max(depth, 1)
    half = (memory or DEFAULT_MEMORY) // 2
    most = max(1, min(len(queries), MOST_QUERIES, half // query_bytes))
    batch = most if batch is None else min(batch, max(1, len(queries)))
    row_bytes = corpus.row_bytes * 3 // 2 + 16 + pair_bytes * batch  # half of it again where bf16 screens (screen.py)
    most = max(1, min(len(corpus), MOST_ROWS, half // row_bytes))
    chunk = most if chunk is None else min(chunk, max(1, len(corpus)))
    needed = batch * query_bytes + chunk * row_bytes
    if memory is not None and needed > memory:
        wanted = f"at least {needed} for a batch of {batch} queries, {depth} ranks of each, and chunks of {chunk} rows"
        raise checks.refuse(op, "max_memory_bytes", wanted, memory)
    return Sizes(batch, chunk)
