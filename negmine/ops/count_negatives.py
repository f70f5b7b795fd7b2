"""The op count_negatives: the size of each query's pool."""

from negmine.ops.registry import declare

COUNT_NEGATIVES = declare(
    "count_negatives(query: vectors[B, D], negative_keys: vectors[K, D], *pool) -> count: int64[B]",
    """The number of columns in the pool. Without bounds no score is computed, so columns with NaN scores are counted. With bounds
    they are not counted.""",
)
