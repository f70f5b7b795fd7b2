"""The op round_to_codes: vectors rounded to bytes with a scale for each row."""

from negmine.ops.registry import declare

ROUND_TO_CODES = declare(
    "round_to_codes(vectors: vectors[M, D]) -> codes: uint8[M, (D + 3) // 4 * 4], scale: fp32[M], norms: fp32[2, M]",
    """codes_m - 128 = vectors_m / scale_m, rounded to the nearest integer, with scale_m = max_d |vectors_md| / 127; 128 past D.
    norms: of vectors_m, and of vectors_m - scale_m (codes_m - 128). The scale of a row that holds NaN is NaN; a row whose
    elements are all below 2^-100, or that holds an infinity, has the scale 0. CPU only.""",
)
