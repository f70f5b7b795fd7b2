"""The scores of this backend: s_bk = q_b . n_k in fp32, for a tile of rows and columns.

Every op that compares scores with thresholds of another pass calls score_tile with the block sizes of tiles.score_tile, so the
passes agree bit for bit. If D fits into one padded block, the caller keeps its tile of queries for all columns; otherwise D is
processed in steps of BLOCK_D.

WIDEN converts vectors to fp32 right after the load. This is needed if queries and keys have different types, and under Triton's
interpreter, whose bf16 product is wrong.
"""

from torch import Tensor

import triton
import triton.language as tl


def widens(query: Tensor, negative_keys: Tensor) -> bool:
    """Whether tiles are converted to fp32 before the product: if types differ, or for bf16 under the interpreter."""
    return triton.knobs.runtime.interpret or query.dtype != negative_keys.dtype


@triton.jit
def load_rows(ptr, rows, ok, stride, d0, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr):
    """Elements [d0, d0 + BLOCK_D) of the given rows. Rows whose ok is False are not read."""
    offs_d = d0 + tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if D % BLOCK_D == 0:
        tile = tl.load(ptrs, mask=ok[:, None], other=0.0)  # (rows, BLOCK_D)
    else:
        tile = tl.load(ptrs, mask=ok[:, None] & (offs_d < D)[None, :], other=0.0)  # (rows, BLOCK_D)
    if WIDEN:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_whole_rows(ptr, rows, ok, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr):
    """The rows in one block if D fits into it, else `rows`, which score_tile does not use."""
    if D <= BLOCK_D:
        tile = load_rows(ptr, rows, ok, stride, 0, D, BLOCK_D, WIDEN)  # (rows, BLOCK_D)
    else:
        tile = rows
    return tile


@triton.jit
def or_zero(rows):
    """Replace elements that are not finite by zeros, because a weight of 0 times NaN or infinity is not 0."""
    return tl.where(tl.abs(rows) < float("inf"), rows, 0.0)


@triton.jit
def or_nan(p, s):
    """Weights p for rows after or_zero: NaN for a weight other than 0 whose score is not finite."""
    return tl.where((tl.abs(s) == float("inf")) & (p != 0), float("nan"), p)


@triton.jit
def any_not_finite(x, ok):
    """Whether a row of x, among those with ok (rows,), has NaN or an infinity."""
    return tl.max((ok[:, None] & ~(tl.abs(x) < float("inf"))).to(tl.int32)) > 0


@triton.jit
def as_stored(p, query_ptr, keys_ptr):
    """Round probabilities to the storage type before they are multiplied with vectors, as tensor cores require.

    Under the interpreter, vectors are converted to fp32, so the rounding is done here only.
    """
    if query_ptr.dtype == keys_ptr.dtype:
        p = p.to(keys_ptr.dtype.element_ty)
    return p


@triton.jit
def score_tile(
    query_ptr, query, offs_b, b_ok, stride_qb,
    keys_ptr, keys, offs_k, k_ok, stride_kk,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The scores (BLOCK_B, BLOCK_K) fp32. query and keys are results of load_whole_rows."""
    if D <= BLOCK_D:
        s = tl.dot(query, tl.trans(keys), input_precision="ieee")  # (BLOCK_B, BLOCK_K)
    else:
        s = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
        for d0 in tl.range(0, D, BLOCK_D):
            q = load_rows(query_ptr, offs_b, b_ok, stride_qb, d0, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
            n = load_rows(keys_ptr, offs_k, k_ok, stride_kk, d0, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
            s = tl.dot(q, tl.trans(n), s, input_precision="ieee")  # (BLOCK_B, BLOCK_K)
    return s
