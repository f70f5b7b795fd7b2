"""One place of each row, by rank, from the compact buffer of places that a scan left, or from whole rows of a short queue.

Places of a row (W,) are distinct int64, and the one at a rank is found by bisection on its value, counting. Every step moves
both ends onto places of the row, so it ends after about log2(W) steps on smooth scores and never needs more than 64; the row
comes from cache each time. NOWHERE marks unused entries and is the answer past the end.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import capability
from .order import ordered


@triton.jit
def measure(places_ptr, row, ok, W, middle, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """Of each row: how many places are >= middle, the smallest of them, and the largest place below it; (BLOCK_R,) each."""
    NOWHERE: tl.constexpr = -(2**63)
    END: tl.constexpr = 2**63 - 1
    count = tl.zeros((BLOCK_R,), tl.int32)
    above = tl.full((BLOCK_R,), END, tl.int64)
    below = tl.full((BLOCK_R,), NOWHERE, tl.int64)
    for w0 in range(0, W, BLOCK_W):
        offs_w = w0 + tl.arange(0, BLOCK_W)
        ptrs = places_ptr + row[:, None] * W + offs_w[None, :]
        places = tl.load(ptrs, mask=ok[:, None] & (offs_w < W)[None, :], other=NOWHERE)  # (BLOCK_R, BLOCK_W)
        hit = places >= middle[:, None]  # (BLOCK_R, BLOCK_W)
        count += tl.sum(hit.to(tl.int32), 1)
        above = tl.minimum(above, tl.min(tl.where(hit, places, END), 1))
        below = tl.maximum(below, tl.max(tl.where(hit, NOWHERE, places), 1))
    return count, above, below


@triton.jit(do_not_specialize=["CELLS", "R"])
def select_place_kernel(
    places_ptr, ranks_ptr, above_ptr, cut_hi_ptr, out_ptr, CELLS, W, R,
    BRACKETED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    NOWHERE: tl.constexpr = -(2**63)
    cell = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,) of (B, R)
    ok = cell < CELLS
    row = cell // R
    rank = tl.load(ranks_ptr + cell, mask=ok, other=-1)  # (BLOCK_R,)
    if BRACKETED:
        # Of the places above this bracket the scan counted all, and another bracket kept some.
        cut_hi = tl.load(cut_hi_ptr + cell, mask=ok, other=0.0)  # (BLOCK_R,)
        edge = (ordered(cut_hi).to(tl.int64) << 32) | 0xFFFFFFFF
        kept_above, _, _ = measure(places_ptr, row, ok, W, edge + 1, BLOCK_R, BLOCK_W)
        rank = rank - tl.load(above_ptr + cell, mask=ok, other=0) + kept_above

    count, low, _ = measure(places_ptr, row, ok, W, tl.full((BLOCK_R,), NOWHERE + 1, tl.int64), BLOCK_R, BLOCK_W)
    found = (rank >= 0) & (rank < count)
    # The place lies in [low, high): more than rank places are >= low, at most rank are >= high.
    high = tl.where(found, tl.full((BLOCK_R,), 2**63 - 1, tl.int64), low)  # (BLOCK_R,)
    while tl.max((low < high - 1).to(tl.int32), 0) > 0:
        middle = (low & high) + ((low ^ high) >> 1)
        count, above, below = measure(places_ptr, row, ok, W, middle, BLOCK_R, BLOCK_W)
        going = low < high - 1
        enough = going & (count > rank)
        short = going & (count <= rank)
        exact = (count == rank + 1) | (count == rank)
        low = tl.where(enough, above, tl.where(short & exact, below, low))
        high = tl.where(enough & exact, above, tl.where(short, tl.where(exact, below, below + 1), high))
    tl.store(out_ptr + cell, tl.where(found, low, NOWHERE), mask=ok)


def select_place(places: Tensor, ranks: Tensor, above: Tensor | None = None, cut_hi: Tensor | None = None) -> Tensor:
    """places (B, W) int64, ranks (B, R) int64 from 0 -> (B, R) int64.

    With above (B, R) int64 and cut_hi (B, R) fp32, places hold what a scan kept in the brackets of the row, ranks count
    from the hardest of the whole pool, and above says how many of the pool lie above cut_hi.
    """
    B, W = places.shape
    R = ranks.shape[1]
    out = torch.empty_like(ranks)
    BLOCK_R, BLOCK_W, num_warps = tiles.row_block(W, capability(places.device))
    select_place_kernel[(triton.cdiv(B * R, BLOCK_R),)](
        places, ranks, ranks if above is None else above, ranks if cut_hi is None else cut_hi, out, B * R, W, R,
        BRACKETED=above is not None, BLOCK_R=BLOCK_R, BLOCK_W=BLOCK_W, num_warps=num_warps,
    )  # fmt: skip
    return out
