"""The op mix_logsumexp, and the autograd functions over synthetic negatives."""

from negmine.ops.registry import declare

MIX_LOGSUMEXP = declare(
    "mix_logsumexp(query: vectors[B, D], negative_keys: vectors[K, D], hard_index: int64[B, N], scale: fp32[], want_mean: bool, "
    "*draws) -> lse: fp32[B], mean: fp32[B if want_mean else 0, D]",
    """Log-sum-exp of scale * q_b . h over the S synthetic negatives h of each query, and their softmax mean; (B, S, D) is never
    stored.""",
)
