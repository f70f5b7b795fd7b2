"""The op softplus_sum_grad_bias: the gradient of weighted softplus sums with respect to the bias of the columns."""

from negmine.ops.registry import declare

SOFTPLUS_SUM_GRAD_BIAS = declare(
    "softplus_sum_grad_bias(query: vectors[B, D], negative_keys: vectors[K, D], scale: fp32[], offset: fp32[], weight: fp32[B], "
    "*pool) -> grad_bias: fp32[K]",
    """grad_bias_k = sum_b weight_b sigmoid(l_bk), l as in softplus_sum_grad_keys. Nothing is rounded to the storage type.""",
)
