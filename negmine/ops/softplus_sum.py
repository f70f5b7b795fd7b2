"""The op softplus_sum, and the autograd function over it."""

from negmine.ops.registry import declare

SOFTPLUS_SUM = declare(
    "softplus_sum(query: vectors[B, D], negative_keys: vectors[K, D], scale: fp32[], offset: fp32[], want_sigmoid_keys: bool, "
    "*pool) -> total: fp32[B], sigmoid_keys: fp32[B if want_sigmoid_keys else 0, D], sigmoid_sum: fp32[B], num_kept: int64[B]",
    """l_bk = scale * s_bk + offset. total_b = sum over the pool of log(1 + exp(l_bk)), 0 where the pool is empty;
    sigmoid_keys_b = sum over the pool of sigmoid(l_bk) n_k; sigmoid_sum_b = sum over the pool of sigmoid(l_bk);
    num_kept_b = columns in the pool. Small terms are summed to fp32's relative precision: log(1 + e^l) is about e^l for the
    many l far below 0.""",
)
