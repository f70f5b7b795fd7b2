"""The op gathered_logsumexp: logsumexp over a list of columns for each query."""

from negmine.ops.registry import declare

GATHERED_LOGSUMEXP = declare(
    "gathered_logsumexp(query: vectors[B, D], negative_keys: vectors[K, D], index: int64[B, M], scale: fp32[], want_mean: bool) "
    "-> scores: fp32[B, M], lse: fp32[B], mean: fp32[B if want_mean else 0, D]",
    """index: any order, -1 = no column, a column named twice counts twice. scores_bm = s of column index_bm, -inf where that
    is -1; lse and mean over them as in logsumexp, -inf and zeros where the list is empty.""",
)
