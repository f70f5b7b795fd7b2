"""Near duplicates: a window of ranks without the rows that say what a positive or a harder row of it says already.

    cos(a, b) = a . b / (|a| |b|)                    0 where a norm is 0
    walk a query's window, hardest first; drop row k where cos(k, p) >= t for a positive p of the query, or
    cos(k, h) >= t for a row h that the walk has kept;  stop at `wanted` kept rows

Whether a cosine reaches t must not depend on how many queries are looked at together. A matrix product rounds by its shape, so it
decides only where it is further from t than rounding can reach; the rest is summed in one fixed order of additions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from negmine import order
from negmine.search.lists import RowLists


def fixed_sum(terms: Tensor) -> Tensor:
    """(..., D) -> (...): halves added until one is left, an order that knows D only."""
    terms = F.pad(terms, (0, (1 << max(0, terms.shape[-1] - 1).bit_length()) - terms.shape[-1]))
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def near(a: Tensor, b: Tensor, threshold: float) -> Tensor:
    """a (G, M, D), b (G, P, D) float64 -> (G, M, P) bool: cos >= threshold, the same for any G, M, P."""
    norms = [fixed_sum(rows * rows).sqrt() for rows in (a, b)]  # (G, M), (G, P)
    scale = norms[0][:, :, None] * norms[1][:, None, :]  # (G, M, P)
    gap = a @ b.mT - threshold * scale  # (G, M, P)
    close = (gap >= 0) & (scale > 0)
    doubtful = gap.abs() <= scale * (a.shape[-1] + 8) * 2.0**-50
    at = doubtful.nonzero(as_tuple=True)
    for g, m, p in zip(*(part.split(1 << 14) for part in at), strict=True):
        close[g, m, p] = (fixed_sum(a[g, m] * b[g, p]) >= threshold * scale[g, m, p]) & (scale[g, m, p] > 0)
    return close


@dataclass(frozen=True)
class Thinner:
    """What the windows of a run are thinned by."""

    gather: Callable[[np.ndarray], Tensor]  # numbers (M,) of corpus rows -> (M, D)
    positives: RowLists
    threshold: float
    dim: int
    room: int  # bytes of gathered rows and cosines at a time

    def __call__(self, window: Tensor, rows: Tensor, wanted: int | None) -> tuple[Tensor, Tensor]:
        """window (B, W) order of queries rows (B,) -> (B, min(W, wanted)) order packed to the left; and (B, 2) int64, how many
        were dropped for a positive and for a harder row before the walk stopped."""
        B, W = window.shape
        wanted = W if wanted is None else min(W, wanted)
        sizes = self.positives.take(rows.numpy()).sizes
        most = int(sizes.max(initial=0))
        step = max(1, self.room // (8 * self.dim * max(1, W + most) + 8 * W * max(1, W + most)))
        parts = [self._some(window[i : i + step], rows[i : i + step], wanted) for i in range(0, B, step)]
        if not parts:
            return window[:, :wanted], window.new_zeros(0, 2)
        kept, dropped = zip(*parts, strict=True)
        return torch.cat(kept), torch.cat(dropped)

    def _vectors(self, numbers: Tensor) -> Tensor:
        """numbers (G, M) int64, -1 = none -> (G, M, D) float64, zeros there."""
        flat = numbers.reshape(-1)
        some = flat >= 0
        out = torch.zeros(len(flat), self.dim, dtype=torch.float64, device=numbers.device)
        out[some] = self.gather(flat[some].cpu().numpy()).to(out)
        return out.view(*numbers.shape, self.dim)

    def _some(self, window: Tensor, rows: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        G, W = window.shape
        lists = self.positives.take(rows.numpy())
        known = torch.from_numpy(lists.padded())  # (G, P)
        vectors = self._vectors(order.unpack(window)[1])  # (G, W, D)
        like_positive = near(vectors, self._vectors(known.to(window.device)), self.threshold).any(2)  # (G, W)
        like_other = near(vectors, vectors, self.threshold)  # (G, W, W)
        some = window != order.NOWHERE  # (G, W)
        kept = torch.zeros_like(some)
        dropped = torch.zeros(G, 2, dtype=torch.int64, device=window.device)
        count = dropped.new_zeros(G)
        for w in range(W):
            walked = some[:, w] & (count < wanted)  # (G,)
            repeats = (like_other[:, w] & kept).any(1) & ~like_positive[:, w]
            kept[:, w] = walked & ~like_positive[:, w] & ~repeats
            count += kept[:, w]
            dropped += torch.stack([walked & like_positive[:, w], walked & repeats], 1)
        thinned = window.masked_fill(~kept, order.NOWHERE).sort(dim=1, descending=True).values
        return thinned[:, :wanted], dropped
