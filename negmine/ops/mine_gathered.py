"""The op mine_gathered: mine_hardest over a list of columns for each query."""

from negmine.ops.registry import declare

MINE_GATHERED = declare(
    "mine_gathered(query: vectors[B, D], negative_keys: vectors[K, D], index: int64[B, M], N: int, max_score?: fp32[B]) "
    "-> scores: fp32[B, N], index_kept: int64[B, N], num_kept: int64[B]",
    """The results of mine_hardest, bit for bit, if query b may only use the columns index_b and, if max_score is given, only
    those with a score of at most max_score_b. The columns of a list are ascending and distinct; -1 = empty entry. N is at least
    1. CPU only: large fp32 searches rescore with it the candidates of a scan in bf16.""",
)
