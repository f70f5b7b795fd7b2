"""Sampling strategies: which candidates of a query's window become its negatives.

    window     (B, W) int64 sort keys (negmine/ops/sort_key.py), hardest first, padded with NOWHERE
    top        the first n
    random     the n with the smallest Philox words: every subset of n is equally likely
    weighted   the n largest of  s / temperature + g,  g = -log(-log u): drawn one by one without replacement, each
               time with probability proportional to exp(s / temperature)     (Gumbel-top-k, Kool et al. 2019)

Philox words are counted by (global query row, position in the window), so a draw does not depend on batches and chunks.
"""

import torch
from torch import Tensor

from negmine.ops import philox, sort_key
from negmine.options import Select

STRATEGIES = ("top", "random", "weighted")
# If range_max is None, this many ranks of the window are used for each negative drawn, as in sentence-transformers.
OPEN_WINDOW_FACTOR = 10


def candidates_needed(select: Select, n: int, strategy: str) -> int | None:
    """How many candidates of a window are used: n for "top"; otherwise 10 n, or all (None) if range_max is given."""
    if strategy == "top":
        return n
    return OPEN_WINDOW_FACTOR * n if select.range_max is None else None


def slice_window(sort_keys: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """sort_keys (B, depth), ranks [first, end) of each row -> (B, W), padded with NOWHERE."""
    width = int((end - first).max().clamp_min(0)) if len(first) else 0
    rank = first[:, None] + torch.arange(width, device=sort_keys.device)  # (B, W)
    inside = rank < end[:, None]
    return sort_keys.gather(1, rank.masked_fill(~inside, 0)).masked_fill(~inside, sort_key.NOWHERE)


def sample(window: Tensor, n: int, strategy: str, rows: Tensor, seed: int, temperature: float) -> Tensor:
    """window (B, W) sort keys, rows (B,) int64: global query rows -> (B, n) sort keys, hardest first, padded with NOWHERE."""
    if strategy == "top":
        sampled = window[:, :n]
    else:
        slots = torch.arange(window.shape[1], device="cpu")  # (W,)
        word = philox.words(rows, slots, philox.STREAM_SAMPLE, seed, 0)[0]  # (B, W)
        key = word.double()
        if strategy == "weighted":
            key = -(sort_key.unpack(window)[0].double() / temperature + philox.gumbel(word))
        key = key.masked_fill(window == sort_key.NOWHERE, torch.inf)
        rank = key.argsort(dim=1, stable=True)[:, :n].sort(1).values  # (B, min(n, W))
        sampled = window.gather(1, rank)
    return torch.nn.functional.pad(sampled, (0, n - sampled.shape[1]), value=sort_key.NOWHERE)
