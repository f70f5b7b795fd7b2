"""Sort keys on the device: a score and an index in one int64, as in negmine/ops/sort_key.py.

    sort_key = (ordered(score) << 32) | (0xFFFFFFFF - index)

A larger sort key has a larger score or, for equal scores, a lower index. kernels/README.md states the rule.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

# Cuts that no number passes, and that every number passes: ordered(inf) + 1 and ordered(-inf), each with all columns.
NOTHING = tl.constexpr(0x7F800001 << 32)
EVERYTHING = tl.constexpr(-(0x7F800001 << 32))


@triton.jit
def ordered(score):
    """Map fp32 to int32 in the same order, with -0.0 equal to +0.0. The result is never INT32_MIN, except for a NaN."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def from_ordered(value):
    """int32 -> the fp32 that `ordered` maps to it; NaN past either infinity."""
    return tl.where(value < 0, value ^ 0x7FFFFFFF, value).to(tl.float32, bitcast=True)


@triton.jit
def pack(score, index):
    """score fp32, index int -> sort key int64."""
    return (ordered(score).to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def unpack(sort_key):
    """sort key int64 -> score fp32, index int32 (2^31 - 1 if the key ranks below every real index of its score).

    INT64_MIN and INT64_MAX give a NaN score, so a bound with one of these values keeps nothing.
    """
    score = from_ordered((sort_key >> 32).to(tl.int32))
    index = 0xFFFFFFFF - (sort_key & 0xFFFFFFFF)
    return score, tl.minimum(index, 0x7FFFFFFF).to(tl.int32)


@triton.jit(do_not_specialize=["COUNT"])
def unpack_kernel(sort_keys_ptr, scores_ptr, index_ptr, COUNT, BLOCK: tl.constexpr):
    NOWHERE: tl.constexpr = -(2**63)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sort_keys = tl.load(sort_keys_ptr + at, mask=at < COUNT, other=NOWHERE)  # (BLOCK,)
    somewhere = sort_keys != NOWHERE
    tl.store(scores_ptr + at, tl.where(somewhere, unpack(sort_keys)[0], float("-inf")), mask=at < COUNT)
    tl.store(index_ptr + at, tl.where(somewhere, 0xFFFFFFFF - (sort_keys & 0xFFFFFFFF), -1), mask=at < COUNT)


def unpacked(sort_keys: Tensor) -> tuple[Tensor, Tensor]:
    """sort_keys (B, N) int64, dense -> scores fp32 and index int64 of the same shape; (-inf, -1) for NOWHERE."""
    scores, index, count = (
        torch.empty_like(sort_keys, dtype=torch.float32),
        torch.empty_like(sort_keys),
        sort_keys.numel(),
    )
    if count:
        unpack_kernel[(-(-count // 1024),)](sort_keys, scores, index, count, 1024, num_warps=4)
    return scores, index
