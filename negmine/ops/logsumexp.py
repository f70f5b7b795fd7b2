"""The op logsumexp, and the autograd functions over it."""

from negmine.ops.registry import declare

LOGSUMEXP = declare(
    "logsumexp(query: vectors[B, D], negative_keys: vectors[K, D], scales: fp32[S], pivot?: fp32[B], want_mean: bool, N: int, "
    "ranks?: int64[B, 2], *pool) -> lse: fp32[S, B], mean: fp32[S, B if want_mean else 0, D], num_kept: int64[B], "
    "num_above: int64[B], scores: fp32[B, N], index: int64[B, N], sort_keys: int64[B, 0 if ranks is None else 2]",
    """lse_sb  = log sum over the pool of exp(scale_s * s_bk); -inf where the pool is empty.
    mean_sb = sum over the pool of p_bk n_k, p = exp(scale_s * s_bk - lse_sb); zeros where the pool is empty. Where query and
    keys are bf16, p may be rounded to bf16 in this product.
    num_kept_b = columns in the pool; num_above_b = columns that the masks allow (bounds aside) with s_bk > pivot_b, zeros
    where pivot is None.
    N > 0: scores and index are mine_hardest's, to the bit, of the same pool.
    ranks: only the columns between the two ranks of the pool, the last included, are summed and kept, to the end of the pool
    where the last is past it. sort_keys = rank_thresholds(ranks); both INT64_MIN, and nothing summed, where the last rank is
    below the first, or the first is negative or past the end. Not together with N > 0.
    A NaN score in a pool without bounds makes lse NaN; else a score of +inf makes lse +inf, and the mean may be NaN.""",
)
