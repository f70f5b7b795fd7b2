"""The op rank_thresholds: the columns at given ranks of each query's pool."""

from negmine.ops.registry import declare

RANK_THRESHOLDS = declare(
    "rank_thresholds(query: vectors[B, D], negative_keys: vectors[K, D], ranks: int64[B, R], *pool) -> sort_keys: int64[B, R]",
    """The sort key of the column at each rank (0 = highest score); INT64_MIN if the rank is negative or past the end of the pool.
    Columns with a NaN score have no rank.""",
)
