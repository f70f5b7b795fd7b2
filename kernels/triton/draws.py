"""How a synthetic negative is made, on the device: which two vectors, and how much of the first.

The rule is kernels/README.md, "Draws": Philox4x32-10 with counter (row low, row high, slot, 0) and key (seed, step), so a
draw depends on nothing but its row, slot, seed and step. On the host, draw_arguments spells the eleven draw values for a
kernel.
"""

from torch import Tensor

import triton
import triton.language as tl


def _signed(x: int) -> int:
    """The low 32 bits of x as a signed int: the type of a kernel argument, whatever the value."""
    return ((int(x) & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def draw_arguments(query: Tensor, hard_index: Tensor, draws: tuple) -> dict:
    pairs, with_query, pair_low, pair_high, query_low, query_high, distinct, quantiles, seed, step, row_offset = draws
    return {
        "hard_ptr": hard_index,
        "quantiles_ptr": query if quantiles is None else quantiles,
        "N": hard_index.shape[1],
        "S": pairs + with_query,
        "pairs": pairs,
        "pair_low": float(pair_low),
        "pair_high": float(pair_high),
        "query_low": float(query_low),
        "query_high": float(query_high),
        "seed": _signed(seed),
        "step": _signed(step),
        "row_low": _signed(row_offset),
        "row_high": _signed(row_offset >> 32),
        "DISTINCT": bool(distinct),
        "HAS_QUANTILES": quantiles is not None,
    }


@triton.jit
def entries(hard_ptr, b, N):
    """int64: how many entries of row b of hard_index (B, N) are columns; the others are -1, at its end."""
    count = tl.zeros((), tl.int64)
    for n0 in range(0, N, 512):
        offs_n = n0 + tl.arange(0, 512)
        column = tl.load(hard_ptr + b * N + offs_n, mask=offs_n < N, other=-1)  # (512,)
        count += tl.sum((column != -1).to(tl.int64), 0)
    return count


@triton.jit
def choose(u, n):
    """u uint32 -> int64 in [0, n)."""
    return ((u.to(tl.uint64) * n.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def interpolate(low, high, fraction):
    """low + (high - low) * fraction in separate roundings, as the reference has it: a fused multiply-add gives other bits.

    The product of two fp32 is exact in fp64, and a rounding between product and sum is one that no compiler may fuse away.
    """
    return low + ((high - low).to(tl.float64) * fraction.to(tl.float64)).to(tl.float32)


@triton.jit
def draw(
    b, slot, available, seed, step, row_low, row_high, pairs, pair_low, pair_high, query_low, query_high,
    hard_ptr, quantiles_ptr, N, ok, DISTINCT: tl.constexpr, HAS_QUANTILES: tl.constexpr,
):  # fmt: skip
    """first, second (BLOCK_S,) int64 parents, -1 = the query or nobody; coefficient (BLOCK_S,) fp32 of the first."""
    row = (row_high.to(tl.int64) << 32) + (row_low.to(tl.int64) & 0xFFFFFFFF) + b
    zeros = tl.zeros_like(slot)
    key = (step.to(tl.uint32).to(tl.uint64) << 32) | seed.to(tl.uint32).to(tl.uint64)
    u0, u1, u2, _ = tl.philox(key, (row & 0xFFFFFFFF).to(tl.uint32) + zeros.to(tl.uint32),
                              ((row >> 32) & 0xFFFFFFFF).to(tl.uint32) + zeros.to(tl.uint32),
                              slot.to(tl.uint32), zeros.to(tl.uint32))  # fmt: skip

    ok = ok & (available > 0)
    is_pair = slot < pairs
    a = choose(u0, available)  # (BLOCK_S,)
    c = choose(u1, available)  # (BLOCK_S,)
    if DISTINCT:
        other = choose(u1, tl.maximum(available - 1, 0))
        other += (other >= a).to(tl.int64)
        c = tl.where(is_pair & (available > 1), other, c)
    row_ptr = hard_ptr + b * N
    first = tl.load(row_ptr + a, mask=ok & is_pair, other=-1)  # (BLOCK_S,)
    second = tl.load(row_ptr + c, mask=ok, other=-1)  # (BLOCK_S,)

    u24 = (u2 >> 8).to(tl.int32)
    if HAS_QUANTILES:
        i = u24 >> 12
        r = (u24 & 4095).to(tl.float32) * (1.0 / 4096)
        f = interpolate(tl.load(quantiles_ptr + i), tl.load(quantiles_ptr + i + 1), r)  # (BLOCK_S,)
    else:
        f = u24.to(tl.float32) * (1.0 / 16777216)  # (BLOCK_S,)
    low = tl.where(is_pair, pair_low, query_low)
    high = tl.where(is_pair, pair_high, query_high)
    return first, second, tl.where(ok, interpolate(low, high, f), 0.0)


@triton.jit
def mix_rows(query, keys_ptr, stride_kk, first, second, coefficient, offs_d, D: tl.constexpr):
    """(BLOCK_S, BLOCK_D) fp32 unit vectors; zeros where there is no second parent.  query (BLOCK_D,) fp32."""
    d_ok = (offs_d < D)[None, :]
    ptrs = keys_ptr + first[:, None] * stride_kk + offs_d[None, :]
    n = tl.load(ptrs, mask=(first >= 0)[:, None] & d_ok, other=0.0).to(tl.float32)  # (BLOCK_S, BLOCK_D)
    n = tl.where((first < 0)[:, None], query[None, :], n)
    ptrs = keys_ptr + second[:, None] * stride_kk + offs_d[None, :]
    other = tl.load(ptrs, mask=(second >= 0)[:, None] & d_ok, other=0.0).to(tl.float32)  # (BLOCK_S, BLOCK_D)
    mixed = coefficient[:, None] * n + (1.0 - coefficient)[:, None] * other  # (BLOCK_S, BLOCK_D)
    norm = tl.math.sqrt_rn(tl.sum(mixed * mixed, 1))  # (BLOCK_S,)
    norm = tl.where(norm < 1e-12, 1e-12, norm)  # tl.maximum would lose a NaN
    mixed = mixed * tl.math.div_rn(tl.full(norm.shape, 1.0, tl.float32), norm)[:, None]
    return tl.where((second >= 0)[:, None], mixed, 0.0)
