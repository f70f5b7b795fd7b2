"""The random draws of synthetic negatives on the device: which two vectors are mixed, and with which coefficient.

The rule is in kernels/README.md, "Draws": Philox4x32-10 with counter (row low, row high, slot, 0) and key (seed, step), so a draw
depends only on its row, slot, seed and step. On the host, kernel_draws converts the eleven draw arguments into the tuple that
kernels take. Values that change from step to step are tensors on the device, so that each replay of a captured graph draws new
numbers.
"""

from typing import NamedTuple

from torch import Tensor

import triton
import triton.language as tl


class KernelDraws(NamedTuple):
    """The draw arguments for kernels. No field may be a Python bool, because the interpreter of Triton 3.6 fails on it."""

    pairs: int
    total: int  # S = pairs + with_query
    pair_low: float
    pair_high: float
    query_low: float
    query_high: float
    distinct: tl.constexpr | None  # not None: the two parents of a pair must differ if there are two
    quantiles: Tensor | None  # (4097,) fp32
    seed: int
    step: Tensor | None  # () int64
    row_offset: Tensor | None  # () int64


DISTINCT = tl.constexpr(True)


def kernel_draws(
    pairs: int, with_query: int, pair_low: float, pair_high: float, query_low: float, query_high: float, distinct: bool,
    quantiles: Tensor | None, seed: int, step: Tensor | None, row_offset: Tensor | None,
) -> KernelDraws:  # fmt: skip
    low_bits = (
        (seed & 0xFFFFFFFF) ^ 0x80000000
    ) - 0x80000000  # signed: the type of a kernel argument, whatever the value
    return KernelDraws(
        pairs, pairs + with_query, float(pair_low), float(pair_high), float(query_low), float(query_high),
        DISTINCT if distinct else None, quantiles, low_bits, step, row_offset,
    )  # fmt: skip


@triton.jit
def entries(hard_ptr, N):
    """int64: the number of columns in a row of hard_index with N entries; the other entries, at its end, are -1."""
    count = tl.zeros((), tl.int64)
    for n0 in range(0, N, 512):
        offs_n = n0 + tl.arange(0, 512)
        column = tl.load(hard_ptr + offs_n, mask=offs_n < N, other=-1)  # (512,)
        count += tl.sum((column != -1).to(tl.int64), 0)
    return count


@triton.jit
def choose(u, n):
    """u uint32 -> int64 in [0, n)."""
    return ((u.to(tl.uint64) * n.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def interpolate(low, high, fraction):
    """low + (high - low) * fraction, where the product is rounded before the sum, as in the reference. A fused multiply-add would
    give other bits.

    The product of two fp32 is exact in fp64, and the compiler may not remove the conversion back to fp32 before the sum.
    """
    return low + ((high - low).to(tl.float64) * fraction.to(tl.float64)).to(tl.float32)


@triton.jit
def draw(draws, b, slot, available, hard_ptr, ok):
    """The parents first and second (BLOCK_S,) int64, -1 = the query or no parent; the coefficient (BLOCK_S,) fp32 of the first.

    hard_ptr: the row of hard_index for query b; available: the number of its entries that are columns.
    """
    row = b
    if draws.row_offset is not None:
        row += tl.load(draws.row_offset)
    step = tl.zeros((), tl.int64)
    if draws.step is not None:
        step = tl.load(draws.step)
    zeros = tl.zeros_like(slot)
    key = ((step & 0xFFFFFFFF).to(tl.uint64) << 32) | draws.seed.to(tl.uint32).to(tl.uint64)
    u0, u1, u2, _ = tl.philox(key, (row & 0xFFFFFFFF).to(tl.uint32) + zeros.to(tl.uint32),
                              ((row >> 32) & 0xFFFFFFFF).to(tl.uint32) + zeros.to(tl.uint32),
                              slot.to(tl.uint32), zeros.to(tl.uint32))  # fmt: skip

    ok = ok & (available > 0)
    is_pair = slot < draws.pairs
    a = choose(u0, available)  # (BLOCK_S,)
    c = choose(u1, available)  # (BLOCK_S,)
    if draws.distinct is not None:
        other = choose(u1, tl.maximum(available - 1, 0))
        other += (other >= a).to(tl.int64)
        c = tl.where(is_pair & (available > 1), other, c)
    first = tl.load(hard_ptr + a, mask=ok & is_pair, other=-1)  # (BLOCK_S,)
    second = tl.load(hard_ptr + c, mask=ok, other=-1)  # (BLOCK_S,)

    u24 = (u2 >> 8).to(tl.int32)
    if draws.quantiles is not None:
        i = u24 >> 12
        r = (u24 & 4095).to(tl.float32) * (1.0 / 4096)
        f = interpolate(tl.load(draws.quantiles + i), tl.load(draws.quantiles + i + 1), r)  # (BLOCK_S,)
    else:
        f = u24.to(tl.float32) * (1.0 / 16777216)  # (BLOCK_S,)
    low = tl.where(is_pair, draws.pair_low, draws.query_low)
    high = tl.where(is_pair, draws.pair_high, draws.query_high)
    return first, second, tl.where(ok, interpolate(low, high, f), 0.0)


@triton.jit
def mix_rows(query, keys_ptr, stride_kk, first, second, coefficient, offs_d, D: tl.constexpr):
    """(BLOCK_S, BLOCK_D) fp32 unit vectors; zeros if there is no second parent. query (BLOCK_D,) fp32."""
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
