"""Which ranks a run needs, and which members of a query's window are kept: the hardest, any, or the harder ones more often.

    window   (B, W) int64 order (negmine/order.py), hardest first, NOWHERE past its end
    top        the first n
    random     the n whose Philox words are smallest: every subset of n is as likely
    weighted   the n largest of  s / temperature + g,  g = -log(-log u): drawn one by one without replacement, each
               time with probability proportional to exp(s / temperature)     (Gumbel-top-k, Kool et al. 2019)

The word of a member is counted by (global query row, its place in the window), so the draw knows nothing of batches and chunks.
"""

import torch
from torch import Tensor

from negmine import order, philox
from negmine.options import Select

STRATEGIES = ("top", "random", "weighted")
DRAWN_FROM = 10  # members of an open window for each negative drawn, as sentence-transformers derives its range_max


def wanted_of(select: Select, n: int, strategy: str) -> int | None:
    """Members of a window that matter: "top" needs no more than n, a draw from an open window 10 n, from a closed one all."""
    if strategy == "top":
        return n
    return DRAWN_FROM * n if select.range_max is None else None


def window_of(places: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """places (B, depth), ranks [first, end) of each row -> (B, W) padded with NOWHERE."""
    width = int((end - first).max().clamp_min(0)) if len(first) else 0
    rank = first[:, None] + torch.arange(width, device=places.device)  # (B, W)
    inside = rank < end[:, None]
    return places.gather(1, rank.masked_fill(~inside, 0)).masked_fill(~inside, order.NOWHERE)


def draw(window: Tensor, n: int, strategy: str, rows: Tensor, seed: int, temperature: float) -> Tensor:
    """window (B, W) order, rows (B,) int64 global -> (B, n) order, hardest first, NOWHERE past the end."""
    if strategy == "top":
        kept = window[:, :n]
    else:
        slots = torch.arange(window.shape[1])  # (W,)
        word = philox.words(rows, slots, philox.STREAM_SAMPLE, seed, 0)[0]  # (B, W)
        key = word.double()
        if strategy == "weighted":
            key = -(order.unpack(window)[0].double() / temperature + philox.gumbel(word))
        key = key.masked_fill(window == order.NOWHERE, torch.inf)
        rank = key.argsort(dim=1, stable=True)[:, :n].sort(1).values  # (B, min(n, W))
        kept = window.gather(1, rank)
    return torch.nn.functional.pad(kept, (0, n - kept.shape[1]), value=order.NOWHERE)
