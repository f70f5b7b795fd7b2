"""Guides: masks the columns that a second model considers false negatives. The mask is computed in pieces."""

import torch
from torch import Tensor

from negmine.ops.pool import Pool, pieces
from negmine.ops.vectors import disable_autocast, widened
from negmine.options import Guide

PIECE = 1 << 22  # scores in memory at one time


def guide_limit(guide: Guide) -> Tensor:
    """The guide score (B,) above which a column is masked, in fp32, or in float64 if the guide is."""
    with torch.no_grad():
        score = (widened(guide.query) * widened(guide.positive)).sum(1)  # (B,)
        return score - (score.abs() if guide.relative else 1.0) * guide.margin


def guided(pool: Pool, query: Tensor, keys: Tensor, limit: Tensor) -> Pool:
    """The pool without the columns whose guide score is above limit (B,), for query (B, G) and keys (K, G) or (B, M, G).

    A NaN score, or a NaN limit, masks nothing.
    """
    B, K = len(query), keys.shape[-2]
    keep = torch.empty(B, K, dtype=torch.bool, device=query.device)
    with torch.no_grad(), disable_autocast(query.device):
        wide = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), torch.float32)
        q = query.to(wide)
        for part in pieces(B, K, PIECE):
            n = keys[..., part, :].to(wide)  # (C, G) or (B, C, G)
            scores = q @ n.T if n.dim() == 2 else torch.einsum("bg,bcg->bc", q, n)  # (B, C)
            keep[:, part] = ~(scores > limit[:, None])
    return pool._replace(negative_mask=keep if pool.negative_mask is None else keep & pool.negative_mask)
