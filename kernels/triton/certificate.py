"""Checks for each row that the columns kept by a scan include the N hardest: at least N were found, and no buffer overflowed.

The result is a rank for each row: the rank that the exact search must still find if the check fails, else -1.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import capability
from .scan import Survivors
from .sort_key import EVERYTHING

BLOCK_P = 32


@triton.jit
def offered(found_ptr, row, ok, BUFFERS, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr):
    """For each row: the number of survivors in all its buffers, and the largest number in one of them; (BLOCK_R,) int32 each."""
    total = tl.zeros((BLOCK_R,), tl.int32)
    most = tl.zeros((BLOCK_R,), tl.int32)
    for p0 in range(0, BUFFERS, BLOCK_P):
        offs_p = p0 + tl.arange(0, BLOCK_P)
        ptrs = found_ptr + row[:, None] * BUFFERS + offs_p[None, :]
        found = tl.load(ptrs, mask=ok[:, None] & (offs_p < BUFFERS)[None, :], other=0)  # (BLOCK_R, BLOCK_P)
        total += tl.sum(found, 1)
        most = tl.maximum(most, tl.max(found, 1))
    return total, most


@triton.jit(do_not_specialize=["B", "N", "BUFFERS", "CAPACITY"])
def certificate_kernel(
    found_ptr, cut_ptr, missing_ptr, B, N, BUFFERS, CAPACITY, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = row < B
    total, most = offered(found_ptr, row, ok, BUFFERS, BLOCK_R, BLOCK_P)
    everything = tl.load(cut_ptr + row, mask=ok, other=EVERYTHING) == EVERYTHING
    sure = ((total >= N) | everything) & (most <= CAPACITY)
    rank = tl.zeros((BLOCK_R,), tl.int64) + (N - 1)
    tl.store(missing_ptr + row, tl.where(sure, -1, rank), mask=ok)


def certificate(survivors: Survivors, cut: Tensor, N: int) -> Tensor:
    """(B, 1) int64: -1 if the survivors at or above cut (B, 1) int64 include the N hardest, else N - 1, the rank to be found."""
    B, buffers = survivors.found.shape
    missing = torch.empty((B, 1), dtype=torch.int64, device=cut.device)
    BLOCK_R = 16 if capability(cut.device) == tiles.INTERPRETER else 4
    certificate_kernel[(-(-B // BLOCK_R),)](
        survivors.found, cut, missing, B, N, buffers, survivors.capacity, BLOCK_R, BLOCK_P, num_warps=4
    )
    return missing
