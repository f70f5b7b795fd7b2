"""The op gathered_grad_keys: the gradient of a sum over lists of columns with respect to the keys."""

from negmine.ops.registry import declare

GATHERED_GRAD_KEYS = declare(
    "gathered_grad_keys(query: vectors[B, D], index: int64[B, M], weight: fp32[B, M], K: int) -> grad_keys: fp32[K, D]",
    """Row k = sum of weight_bm q_b over the entries with index_bm = k, in the order of (b, m). The weight of an empty entry
    (index -1) is not read.""",
)
