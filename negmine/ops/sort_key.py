"""A place in a row's ranking as one int64: sorts by score, then by index with the lower index first; larger = harder.

    order = (ordered(score) << 32) | (0xFFFFFFFF - index)

ordered(x) maps fp32 to int32 monotonically. Bounds of a pool and ranks travel between ops in this form, so a window is exact
even where scores tie. The rule is stated in kernels/README.md.
"""

import torch
from torch import Tensor

NOWHERE = -(2**63)  # the place past the end of a pool
LAST_INDEX = 0xFFFFFFFF  # ranks below every real index of the same score
TOP = 0x7F800000 << 32 | LAST_INDEX  # the highest place: +inf at index 0; above it is NaN alone
BOTTOM = -0x7F800001 << 32  # the lowest: -inf at LAST_INDEX


def pack(score: Tensor, index: Tensor | int) -> Tensor:
    """score (...) fp32, index (...) int64 -> order (...) int64."""
    bits = (score.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into +0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) | (LAST_INDEX - index)


def unpack(order: Tensor) -> tuple[Tensor, Tensor]:
    """order (...) int64 -> score (...) fp32, index (...) int64; (-inf, -1) for NOWHERE."""
    ordered = (order >> 32).int()
    score = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
    index = LAST_INDEX - (order & 0xFFFFFFFF)
    nowhere = order == NOWHERE
    return score.masked_fill(nowhere, -torch.inf), index.masked_fill(nowhere, -1)
