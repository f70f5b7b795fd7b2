"""Counter-based random numbers: Philox4x32-10 in PyTorch, and the draws of the package made from it.

A draw is a function of (seed, step) and of a counter (global row, slot, stream), never of the backend, the tile, the batch split
or the world size. The kernels compute the same integers; kernels/README.md states the layout.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (the Random123 constants).
"""

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
# The counter's last word: one stream a purpose.
STREAM_MIX, STREAM_SAMPLE, STREAM_WEIGHTED, STREAM_NORMAL, STREAM_PARTNER, STREAM_HASH = range(6)
SAMPLE_CHUNK = 4096  # members whose words are in memory at one time


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int, step: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four counter words (...) int64 in [0, 2^32) and the key (seed, step) -> four random words (...) in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, step & MASK
    for _ in range(10):
        # The product of two 32-bit words wraps in int64, but its 64 bits are right, and the mask undoes the sign.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def words(
    rows: Tensor, slots: Tensor, stream: int, seed: int, step: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows (B,) int64 global rows, slots (L,) int64 -> four words (B, L)."""
    row, slot = rows[:, None].broadcast_to(len(rows), len(slots)), slots[None, :].broadcast_to(len(rows), len(slots))
    return philox((row & MASK, (row >> 32) & MASK, slot, torch.full_like(slot, stream)), seed, step)


def below(word: Tensor, bound: Tensor) -> Tensor:
    """word (...) random, bound (...) int64 below 2^31 -> (...) in [0, bound), or 0 where bound is 0."""
    return (word * bound) >> 32


def gumbel(word: Tensor) -> Tensor:
    """word (...) random -> (...) float64: -log(-log u), u = (word + 1/2) / 2^32; the largest log p + gumbel is a draw from p."""
    return -(-((word.double() + 0.5) * 2.0**-32).log()).log()


def sample(count: Tensor, most: int, size: int, replace: bool, rows: Tensor, seed: int, step: int | Tensor) -> Tensor:
    """Draw `size` members of each row's count: count (B,) int64 up to most, rows (B,) -> (B, size) int64, -1 = none.

    With replacement, slot i draws one of [0, count) for itself. Without, every member has a word, counted by its own number, and
    those with the smallest words are kept (ties: the lower number); a row of no more than `size` keeps all.
    """
    if replace:
        word = words(rows, torch.arange(size, device=rows.device), STREAM_SAMPLE, seed, step)[0]  # (B, size)
        return below(word, count[:, None]).masked_fill(count[:, None] == 0, -1)
    nobody = 2**63 - 1
    best = torch.full((len(rows), size), nobody, device=rows.device)  # (B, size) word and member as one number
    for start in range(0, most, SAMPLE_CHUNK):
        member = torch.arange(start, min(start + SAMPLE_CHUNK, most), device=rows.device)
        word = words(rows, member, STREAM_SAMPLE, seed, step)[0]  # (B, chunk)
        key = ((word << 31) | member).masked_fill(member >= count[:, None], nobody)  # (B, chunk)
        best = torch.cat([best, key], 1).topk(size, dim=1, largest=False).values
    return (best & (MASK >> 1)).masked_fill(best == nobody, -1)


def unit(word: Tensor, quantiles: Tensor | None) -> Tensor:
    """word (...) random -> (...) fp32 in [0, 1]: the top 24 bits, through the quantile table where one is given."""
    top = word >> 8
    if quantiles is None:
        return top.float() * 2.0**-24
    cell, rest = top >> 12, (top & 4095).float() * 2.0**-12
    return quantiles[cell] + rest * (quantiles[cell + 1] - quantiles[cell])


def normals(rows: Tensor, slots: Tensor, D: int, seed: int, step: int | Tensor) -> Tensor:
    """rows (B,), slots (S,) int64 -> (B, S, D) fp32 standard normals, by Box and Muller: four words make four of them."""
    blocks = -(-D // 4)
    if rows.device.type == "cpu" and not torch.compiler.is_compiling() and len(rows) > 8:
        # A few rows at a time stay in the cache through the ten rounds; a compiler would be bound to the number of rows.
        return torch.cat([normals(some, slots, D, seed, step) for some in rows.split(8)])
    place = (slots[:, None] * blocks + torch.arange(blocks, device=slots.device)).flatten()  # (S * blocks,)
    uniform = [((w >> 8) + 1).float() * 2.0**-24 for w in words(rows, place, STREAM_NORMAL, seed, step)]  # in (0, 1]
    made = []
    for radius, turn in (uniform[:2], uniform[2:]):
        length = (-2.0 * radius.log()).sqrt()
        made += [length * (math.tau * turn).cos(), length * (math.tau * turn).sin()]
    return torch.stack(made, 2).reshape(len(rows), len(slots), 4 * blocks)[:, :, :D]
