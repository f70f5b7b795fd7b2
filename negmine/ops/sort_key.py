"""Sort keys: a score and an index in one int64. A larger key has a larger score or, for equal scores, a lower index.

    order = (ordered(score) << 32) | (0xFFFFFFFF - index)

ordered(x) maps fp32 to int32 monotonically. Ops pass the bounds of pools and the results of rank_thresholds in this form, so a
window is exact even if scores tie. kernels/README.md states the rule.
"""

import torch
from torch import Tensor

NOWHERE = -(2**63)  # the sort key of a rank past the end of a pool
LAST_INDEX = 0xFFFFFFFF  # ranks below every real index of the same score
TOP = 0x7F800000 << 32 | LAST_INDEX  # the largest key: +inf at index 0; only NaN is above it
BOTTOM = -0x7F800001 << 32  # the smallest key: -inf at LAST_INDEX


def pack(score: Tensor, index: Tensor | int) -> Tensor:
    """score (...) fp32 and index (...) int64 -> sort key (...) int64."""
    bits = (score.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into +0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) | (LAST_INDEX - index)


def unpack(order: Tensor) -> tuple[Tensor, Tensor]:
    """order (...) int64, a sort key -> score (...) fp32 and index (...) int64; (-inf, -1) for NOWHERE."""
    ordered = (order >> 32).int()
    score = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
    index = LAST_INDEX - (order & 0xFFFFFFFF)
    nowhere = order == NOWHERE
    return score.masked_fill(nowhere, -torch.inf), index.masked_fill(nowhere, -1)
