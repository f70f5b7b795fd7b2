"""The op mine_hardest_codes: mine_hardest over vectors that round_to_codes has rounded."""

from negmine.ops.registry import declare

MINE_HARDEST_CODES = declare(
    "mine_hardest_codes(query: uint8[B, C], query_scale: fp32[B], negative_keys: uint8[K, C], negative_scale: fp32[K], N: int, "
    "*pool) -> scores: fp32[B, N], index: int64[B, N], num_kept: int64[B]",
    """mine_hardest with the scores query_scale_b negative_scale_k sum_c (query_bc - 128) (negative_keys_kc - 128), whose sum is
    exact. C is a multiple of 4. CPU only, on processors with AVX512-VNNI: large searches find candidates with it.""",
)
