"""Remove duplicates: equal rows of a corpus, and near duplicates among the candidates of a query.

Rows of equal values are duplicates, and the one with the lowest row number is kept.

Near duplicates are found by going through the window of a query, hardest first:

    cos(a, b) = a . b / (|a| |b|)                    0 where a norm is 0
    drop row k if cos(k, p) >= t for a positive p of the query, or cos(k, h) >= t for a row h that has been kept already;
    stop after max_kept kept rows

Whether a cosine reaches t must not depend on how many queries are processed together, but the rounding of a matrix product does.
Cosines that differ from t by no more than the rounding error are therefore computed again, in a fixed order of additions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from negmine.mining.row_lists import SharedLists
from negmine.ops import sort_key


def first_equal(digests: np.ndarray) -> np.ndarray:
    """digests (rows, 2) -> (rows,) int64: for each row, the lowest row of equal values. Takes about 48 bytes per row."""
    ascending = np.lexsort((digests[:, 0], digests[:, 1]))  # (rows,), stable: equal rows stay in ascending order
    ranked = digests[ascending]
    is_first = np.ones(len(digests), dtype=bool)  # (rows,) in sorted order
    is_first[1:] = (ranked[1:] != ranked[:-1]).any(1)
    first = np.empty(len(digests), np.int64)
    first[ascending] = ascending[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]]
    return first


def fixed_order_sum(terms: Tensor) -> Tensor:
    """(..., D) -> (...): the sum, by repeatedly adding the two halves. The order of additions depends on D only."""
    terms = F.pad(terms, (0, (1 << max(0, terms.shape[-1] - 1).bit_length()) - terms.shape[-1]))
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def near_pairs(a: Tensor, b: Tensor, threshold: float) -> Tensor:
    """a (G, M, D), b (G, P, D) float64 -> (G, M, P) bool: cos >= threshold. The result of a pair does not depend on G, M, P."""
    norms = [fixed_order_sum(rows * rows).sqrt() for rows in (a, b)]  # (G, M), (G, P)
    scale = norms[0][:, :, None] * norms[1][:, None, :]  # (G, M, P)
    gap = a @ b.mT - threshold * scale  # (G, M, P)
    is_near = (gap >= 0) & (scale > 0)
    doubtful = gap.abs() <= scale * (a.shape[-1] + 8) * 2.0**-50
    at = doubtful.nonzero(as_tuple=True)
    for g, m, p in zip(*(part.split(1 << 14) for part in at), strict=True):
        is_near[g, m, p] = (fixed_order_sum(a[g, m] * b[g, p]) >= threshold * scale[g, m, p]) & (scale[g, m, p] > 0)
    return is_near


@dataclass(frozen=True)
class Deduplicator:
    """Removes near duplicates from the windows of queries."""

    gather: Callable[[np.ndarray], Tensor]  # numbers (M,) of corpus rows -> (M, D)
    positives: SharedLists
    threshold: float
    dim: int
    max_bytes: int  # limit for the gathered rows and cosines

    def __call__(self, window: Tensor, rows: Tensor, max_kept: int | None) -> tuple[Tensor, Tensor]:
        """Remove near duplicates from the windows (B, W) of the queries with row numbers rows (B,).

        Returns sort keys (B, min(W, max_kept)), moved to the left, and (B, 2) int64: how many rows were removed because they
        are close to a positive, and because they are close to a harder row. Rows after the last kept one are not counted.
        """
        B, W = window.shape
        max_kept = W if max_kept is None else min(W, max_kept)
        sizes = self.positives.take(rows.numpy()).sizes
        most = int(sizes.max(initial=0))
        step = max(1, self.max_bytes // (8 * self.dim * max(1, W + most) + 8 * W * max(1, W + most)))
        parts = [self._chunk(window[i : i + step], rows[i : i + step], max_kept) for i in range(0, B, step)]
        if not parts:
            return window[:, :max_kept], window.new_zeros(0, 2)
        kept, dropped = zip(*parts, strict=True)
        return torch.cat(kept), torch.cat(dropped)

    def _vectors(self, numbers: Tensor) -> Tensor:
        """numbers (G, M) int64 -> (G, M, D) float64; zeros where the number is -1."""
        flat = numbers.reshape(-1)
        some = flat >= 0
        out = torch.zeros(len(flat), self.dim, dtype=torch.float64, device=numbers.device)
        out[some] = self.gather(flat[some].cpu().numpy()).to(out)
        return out.view(*numbers.shape, self.dim)

    def _chunk(self, window: Tensor, rows: Tensor, max_kept: int) -> tuple[Tensor, Tensor]:
        G, W = window.shape
        lists = self.positives.take(rows.numpy())
        known = torch.from_numpy(lists.padded())  # (G, P)
        vectors = self._vectors(sort_key.unpack(window)[1])  # (G, W, D)
        near_positive = near_pairs(vectors, self._vectors(known.to(window.device)), self.threshold).any(2)  # (G, W)
        near_other = near_pairs(vectors, vectors, self.threshold)  # (G, W, W)
        some = window != sort_key.NOWHERE  # (G, W)
        kept = torch.zeros_like(some)
        dropped = torch.zeros(G, 2, dtype=torch.int64, device=window.device)
        count = dropped.new_zeros(G)
        for w in range(W):
            visited = some[:, w] & (count < max_kept)  # (G,)
            near_kept = (near_other[:, w] & kept).any(1) & ~near_positive[:, w]
            kept[:, w] = visited & ~near_positive[:, w] & ~near_kept
            count += kept[:, w]
            dropped += torch.stack([visited & near_positive[:, w], visited & near_kept], 1)
        remaining = window.masked_fill(~kept, sort_key.NOWHERE).sort(dim=1, descending=True).values
        return remaining[:, :max_kept], dropped
