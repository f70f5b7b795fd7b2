"""The op mine_hardest: the N highest-scoring columns of each query's pool."""

from negmine.ops.registry import declare

MINE_HARDEST = declare(
    "mine_hardest(query: vectors[B, D], negative_keys: vectors[K, D], N: int, want_count: bool, *pool) "
    "-> scores: fp32[B, N], index: int64[B, N], num_kept: int64[B if want_count else 0]",
    """The first N columns of each pool, sorted by (score descending, index ascending); (-inf, -1) past the end of the pool.
    Columns with a NaN score are left out. num_kept_b = number of columns in the pool whose score is not NaN.""",
)
