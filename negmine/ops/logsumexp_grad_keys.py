"""The op logsumexp_grad_keys: the gradient of weighted log-sum-exps with respect to the keys."""

from negmine.ops.registry import declare

LOGSUMEXP_GRAD_KEYS = declare(
    "logsumexp_grad_keys(query: vectors[B, D], negative_keys: vectors[K, D], scale: fp32[], lse: fp32[B], weight: fp32[B], "
    "*pool) -> grad_keys: fp32[K, D]",
    """Row k = sum_b weight_b p_bk q_b, p_bk = exp(scale * s_bk + bias_k - lse_b) in the pool of b and 0 outside it.""",
)
