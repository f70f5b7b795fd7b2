"""The op mine_gathered: mine_hardest over a list of columns for each query."""

from negmine.ops.registry import declare

MINE_GATHERED = declare(
    "mine_gathered(query: vectors[B, D], negative_keys: vectors[K, D], index: int64[B, M], N: int, max_score?: fp32[B]) "
    "-> scores: fp32[B, N], index_kept: int64[B, N], num_kept: int64[B]",
    """mine_hardest, to the bit, of a queue of which row b sees the columns index_b: ascending, each once, -1 = none; of those
    with a score of at most max_score_b where that is given. N of 1 or more. CPU only: large fp32 searches rescore with it
    what a scan in bf16 has found.""",
)
