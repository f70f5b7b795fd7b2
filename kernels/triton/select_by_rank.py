"""The sort key at a rank of each row, from the compact buffers of a scan, or from the sort keys of all columns of a short queue.

The result of a scan is checked: the key must be in its bracket, its rank must not be among the columns counted above the bracket,
and no buffer may have overflowed.

The sort keys of a row (W,) are distinct int64. The key at a rank is found by bisection on its value, with one count in each step.
Every step moves both ends to keys of the row, so there are about log2(W) steps for smooth scores, and never more than 64. The row
is in the cache after the first step. NOWHERE marks unused entries, and is the result for a rank past the end.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .certificate import BLOCK_P, offered
from .launch import capability
from .scan import Survivors
from .sort_key import EVERYTHING


@triton.jit
def count_from(sort_keys_ptr, row, ok, W, middle, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """For each row: the number of keys >= middle, the smallest of them, and the largest key below middle; (BLOCK_R,) each."""
    NOWHERE: tl.constexpr = -(2**63)
    END: tl.constexpr = 2**63 - 1
    count = tl.zeros((BLOCK_R,), tl.int32)
    above = tl.full((BLOCK_R,), END, tl.int64)
    below = tl.full((BLOCK_R,), NOWHERE, tl.int64)
    for w0 in range(0, W, BLOCK_W):
        offs_w = w0 + tl.arange(0, BLOCK_W)
        ptrs = sort_keys_ptr + row[:, None] * W + offs_w[None, :]
        sort_keys = tl.load(ptrs, mask=ok[:, None] & (offs_w < W)[None, :], other=NOWHERE)  # (BLOCK_R, BLOCK_W)
        hit = sort_keys >= middle[:, None]  # (BLOCK_R, BLOCK_W)
        count += tl.sum(hit.to(tl.int32), 1)
        above = tl.minimum(above, tl.min(tl.where(hit, sort_keys, END), 1))
        below = tl.maximum(below, tl.max(tl.where(hit, NOWHERE, sort_keys), 1))
    return count, above, below


@triton.jit
def key_at_rank(sort_keys_ptr, row, ok, W, rank, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """(BLOCK_R,) int64: the sort key at the rank of each row, NOWHERE for a negative rank or one past the end."""
    NOWHERE: tl.constexpr = -(2**63)
    count, low, _ = count_from(sort_keys_ptr, row, ok, W, tl.full((BLOCK_R,), NOWHERE + 1, tl.int64), BLOCK_R, BLOCK_W)
    found = (rank >= 0) & (rank < count)
    # The key is in [low, high): more than `rank` keys are >= low, at most `rank` are >= high.
    high = tl.where(found, tl.full((BLOCK_R,), 2**63 - 1, tl.int64), low)  # (BLOCK_R,)
    while tl.max((low < high - 1).to(tl.int32), 0) > 0:
        middle = (low & high) + ((low ^ high) >> 1)
        count, above, below = count_from(sort_keys_ptr, row, ok, W, middle, BLOCK_R, BLOCK_W)
        going = low < high - 1
        enough = going & (count > rank)
        short = going & (count <= rank)
        exact = (count == rank + 1) | (count == rank)
        low = tl.where(enough, above, tl.where(short & exact, below, low))
        high = tl.where(enough & exact, above, tl.where(short, tl.where(exact, below, below + 1), high))
    return tl.where(found, low, NOWHERE)


@triton.jit(do_not_specialize=["CELLS", "R"])
def select_by_rank_kernel(
    sort_keys_ptr, ranks_ptr, out_ptr, CELLS, W, R, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,) of (B, R)
    ok = cell < CELLS
    rank = tl.load(ranks_ptr + cell, mask=ok, other=-1)  # (BLOCK_R,)
    tl.store(out_ptr + cell, key_at_rank(sort_keys_ptr, cell // R, ok, W, rank, BLOCK_R, BLOCK_W), mask=ok)


@triton.jit(do_not_specialize=["CELLS", "R", "SPLITS", "BUFFERS", "CAPACITY"])
def select_certified_kernel(
    sort_keys_ptr, ranks_ptr, found_ptr, num_above_ptr, cut_lo_ptr, cut_hi_ptr, out_ptr, missing_ptr,
    CELLS, W, R, SPLITS, BUFFERS, CAPACITY, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,) of (B, R)
    ok = cell < CELLS
    row = cell // R
    rank = tl.load(ranks_ptr + cell, mask=ok, other=-1)  # (BLOCK_R,)
    lo = tl.load(cut_lo_ptr + cell, mask=ok, other=0)  # (BLOCK_R,)
    hi = tl.load(cut_hi_ptr + cell, mask=ok, other=0)  # (BLOCK_R,)
    num_above = tl.zeros((BLOCK_R,), tl.int64)
    for p0 in range(0, SPLITS, BLOCK_P):
        offs_p = p0 + tl.arange(0, BLOCK_P)
        ptrs = num_above_ptr + offs_p.to(tl.int64)[None, :] * CELLS + cell[:, None]  # (BLOCK_R, BLOCK_P)
        part = tl.load(ptrs, mask=ok[:, None] & (offs_p < SPLITS)[None, :], other=0)
        num_above += tl.sum(part.to(tl.int64), 1)
    # Of the columns above this bracket the scan counted all, and another bracket kept some.
    num_kept_above, _, _ = count_from(sort_keys_ptr, row, ok, W, hi, BLOCK_R, BLOCK_W)
    sort_key = key_at_rank(sort_keys_ptr, row, ok, W, rank - num_above + num_kept_above, BLOCK_R, BLOCK_W)
    # Past the end of the pool lies no key, which only a bracket without a lower end can show.
    inside = ((sort_key >= lo) & (sort_key < hi)) | ((sort_key == -(2**63)) & (lo == EVERYTHING))  # (BLOCK_R,)
    _, most = offered(found_ptr, row, ok, BUFFERS, BLOCK_R, BLOCK_P)
    sure = (most <= CAPACITY) & inside & (rank >= num_above)
    tl.store(out_ptr + cell, sort_key, mask=ok)
    tl.store(missing_ptr + cell, tl.where(sure, -1, rank), mask=ok)


def select_by_rank(sort_keys: Tensor, ranks: Tensor) -> Tensor:
    """sort_keys (B, W) int64, ranks (B, R) int64 from 0 -> (B, R) int64."""
    W, R = sort_keys.shape[1], ranks.shape[1]
    out = torch.empty_like(ranks)
    BLOCK_R, BLOCK_W, num_warps = tiles.row_block(W, capability(sort_keys.device))
    select_by_rank_kernel[(-(-ranks.numel() // BLOCK_R),)](
        sort_keys, ranks, out, ranks.numel(), W, R, BLOCK_R, BLOCK_W, num_warps=num_warps
    )
    return out


def select_certified(survivors: Survivors, ranks: Tensor, cut_lo: Tensor, cut_hi: Tensor) -> tuple[Tensor, Tensor]:
    """The sort keys at ranks (B, R) of the whole pool, from the survivors of a scan in the brackets [cut_lo, cut_hi) (B, R).

    The second result has the ranks whose check failed, which must still be found, and -1 for the others. (B, R) int64 each.
    """
    sort_keys, found, num_above, capacity = survivors
    W, R = sort_keys.shape[1], ranks.shape[1]
    out, missing = torch.empty_like(ranks), torch.empty_like(ranks)
    BLOCK_R, BLOCK_W, num_warps = tiles.row_block(W, capability(sort_keys.device))
    select_certified_kernel[(-(-ranks.numel() // BLOCK_R),)](
        sort_keys, ranks, found, num_above, cut_lo, cut_hi, out, missing, ranks.numel(), W, R, len(num_above), found.shape[1],
        capacity, BLOCK_R, BLOCK_W, BLOCK_P, num_warps=num_warps,
    )  # fmt: skip
    return out, missing
