"""A place in a row's ranking as one int64, on the device: the twin of negmine/order.py inside a kernel.

    order = (ordered(score) << 32) | (0xFFFFFFFF - index)

Sorts by score, then by index with the lower index first; larger = harder. The rule is stated in kernels/README.md.
"""

import triton
import triton.language as tl


@triton.jit
def ordered(score):
    """fp32 -> int32 that sorts the same way; -0.0 counts as +0.0.  Never INT32_MIN for a number."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def pack(score, index):
    """score fp32, index int -> order int64."""
    return (ordered(score).to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def unpack(order):
    """order int64 -> score fp32, index int32 (2^31 - 1 where the place ranks below every real index of its score).

    INT64_MIN and INT64_MAX give a NaN score, so that a bound made of them keeps nothing.
    """
    high = (order >> 32).to(tl.int32)
    score = tl.where(high < 0, high ^ 0x7FFFFFFF, high).to(tl.float32, bitcast=True)
    index = 0xFFFFFFFF - (order & 0xFFFFFFFF)
    return score, tl.minimum(index, 0x7FFFFFFF).to(tl.int32)
