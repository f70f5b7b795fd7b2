"""The op logsumexp_grad_bias: the gradient of weighted log-sum-exps with respect to the bias of the columns."""

from negmine.ops.registry import declare

LOGSUMEXP_GRAD_BIAS = declare(
    "logsumexp_grad_bias(query: vectors[B, D], negative_keys: vectors[K, D], scale: fp32[], lse: fp32[B], weight: fp32[B], "
    "*pool) -> grad_bias: fp32[K]",
    """grad_bias_k = sum_b weight_b p_bk, p as in logsumexp_grad_keys. Nothing is rounded to the storage type.""",
)
