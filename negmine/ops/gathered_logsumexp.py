"""The op gathered_logsumexp: logsumexp over a list of columns for each query."""

from negmine.ops.registry import declare

GATHERED_LOGSUMEXP = declare(
    "gathered_logsumexp(query: vectors[B, D], negative_keys: vectors[K, D], index: int64[B, M], scale: fp32[], want_mean: bool) "
    "-> scores: fp32[B, M], lse: fp32[B], mean: fp32[B if want_mean else 0, D]",
    """index: in any order; -1 = empty entry; a column that occurs twice counts twice. scores_bm = score of column index_bm, -inf
    for an empty entry. lse and mean are those of logsumexp over the listed columns, -inf and zeros if the list is empty.""",
)
