"""Extracts the few wanted columns from a tile of scores without moving scores between threads.

A tile (BLOCK_B, BLOCK_K) is viewed as (BLOCK_B, LANES, 2^LEVELS). The result of the tensor core has columns 8 g + 2 lane + {0, 1}
of a row in one lane, so this view costs nothing (with any other layout, the result is the same). A bit for each column says
whether it is wanted, a 32-bit word has the bits of a row and a lane, and each step extracts the lowest wanted column of every
word. A prefix sum over the tile would need two to three times the instructions, because it moves every score.
"""

import triton
import triton.language as tl


@triton.jit
def wanted_by_lane(wanted, s, LANES: tl.constexpr, LEVELS: tl.constexpr):
    """(BLOCK_B, LANES, 2^LEVELS) scores, and their words (BLOCK_B, LANES) int32. Columns with a NaN score must not be wanted.

    Bit r of lane l is column 2 LANES (r // 2) + 2 l + r % 2.
    """
    BLOCK_B: tl.constexpr = s.shape[0]
    BITS: tl.constexpr = 1 << LEVELS
    scores = tl.where(wanted, s, float("nan"))  # (BLOCK_B, BLOCK_K)
    scores = tl.permute(tl.reshape(scores, (BLOCK_B, BITS // 2, LANES, 2)), (0, 2, 1, 3))
    scores = tl.reshape(scores, (BLOCK_B, LANES, BITS))  # (BLOCK_B, LANES, BITS)
    bits = (1 << tl.arange(0, BITS))[None, None, :]
    return scores, tl.sum(tl.where(scores == scores, bits, 0), 2)


@triton.jit
def any_wanted(word):
    return tl.max(tl.max((word != 0).to(tl.int32), 1), 0) > 0


@triton.jit
def lowest_wanted(scores, word, LEVELS: tl.constexpr):
    """Score fp32 and column int32 (BLOCK_B, LANES) of the lowest bit of each word; undefined if a word is empty."""
    BLOCK_B: tl.constexpr = scores.shape[0]
    LANES: tl.constexpr = scores.shape[1]
    # The exponent of a power of two, as a float, is the number of its bit.
    only = (word & -word).to(tl.uint32, bitcast=True).to(tl.float32)
    r = (only.to(tl.int32, bitcast=True) >> 23) - 127  # (BLOCK_B, LANES)
    for level in tl.static_range(LEVELS):
        even, odd = tl.split(tl.reshape(scores, (BLOCK_B, LANES, scores.shape[2] // 2, 2)))
        scores = tl.where((((r >> level) & 1) == 1)[:, :, None], odd, even)
    column = 2 * LANES * (r >> 1) + 2 * tl.arange(0, LANES)[None, :] + (r & 1)
    return tl.reshape(scores, (BLOCK_B, LANES)), column
