"""The op softplus_sum_grad_keys: the gradient of weighted softplus sums with respect to the keys."""

from negmine.ops.registry import declare

SOFTPLUS_SUM_GRAD_KEYS = declare(
    "softplus_sum_grad_keys(query: vectors[B, D], negative_keys: vectors[K, D], scale: fp32[], offset: fp32[], weight: fp32[B], "
    "*pool) -> grad_keys: fp32[K, D]",
    """Row k = sum of weight_b sigmoid(l_bk) q_b over the b whose pool has k, l_bk = scale * s_bk + offset + bias_k.""",
)
