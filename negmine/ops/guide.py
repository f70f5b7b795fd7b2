"""Guides: the columns that a second model considers false negatives, as a limit for each query and as a dense mask."""

import torch
from torch import Tensor

from negmine.ops.vectors import disable_autocast, widened
from negmine.options import Guide

PIECE = 1 << 22  # how many scores are in memory at one time


def guide_limit(guide: Guide) -> Tensor:
    """The guide score (B,) above which a column is masked, in fp32, or in float64 if the guide is."""
    with torch.no_grad():
        score = (widened(guide.query) * widened(guide.positive)).sum(1)  # (B,)
        return score - (score.abs() if guide.relative else 1.0) * guide.margin


def within_limit(query: Tensor, keys: Tensor, limit: Tensor) -> Tensor:
    """(B, K) bool: the columns that are not masked, for query (B, G) and keys (K, G) or (B, M, G).

    A column is masked if its guide score is above limit (B,). A NaN score or a NaN limit masks nothing. The kernels compute the
    same, tile by tile.
    """
    B, K = len(query), keys.shape[-2]
    keep = torch.empty(B, K, dtype=torch.bool, device=query.device)
    step = max(1, PIECE // max(1, B))
    with torch.no_grad(), disable_autocast(query.device):
        wide = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), torch.float32)
        q = query.to(wide)
        for start in range(0, K, step):
            n = keys[..., start : start + step, :].to(wide)  # (C, G) or (B, C, G)
            scores = q @ n.T if n.dim() == 2 else torch.einsum("bg,bcg->bc", q, n)  # (B, C)
            keep[:, start : start + step] = ~(scores > limit[:, None])
    return keep
