"""Counter-based random numbers: Philox4x32-10 in PyTorch, and the random draws of the package.

A draw is a function of (seed, step) and of a counter (global row, slot, stream). It does not depend on the backend, the tile
size, the batch split or the world size. The kernels compute the same integers; kernels/README.md states the counter's layout.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (the Random123 constants).
"""

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
# The last word of the counter is a stream, a number for each purpose of random draws.
STREAM_MIX, STREAM_SAMPLE, STREAM_WEIGHTED, STREAM_NORMAL, STREAM_PARTNER, STREAM_HASH = range(6)
SAMPLE_CHUNK = 4096  # how many members have their random words in memory at one time


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int, step: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute four random words (...) in [0, 2^32) from four counter words (...) int64 in [0, 2^32) and the key (seed, step)."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, step & MASK
    for _ in range(10):
        # The product of two 32-bit words may overflow int64, but its 64 bits are right, and masking removes the extended sign.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def words(
    rows: Tensor, slots: Tensor, stream: int, seed: int, step: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words (B, L) for global rows (B,) int64 and slots (L,) int64."""
    row, slot = rows[:, None].broadcast_to(len(rows), len(slots)), slots[None, :].broadcast_to(len(rows), len(slots))
    return philox((row & MASK, (row >> 32) & MASK, slot, torch.full_like(slot, stream)), seed, step)


def below(word: Tensor, bound: Tensor) -> Tensor:
    """Map random words (...) to integers (...) in [0, bound), or 0 if bound is 0. bound (...) is int64 below 2^31."""
    return (word * bound) >> 32


def gumbel(word: Tensor) -> Tensor:
    """Map random words (...) to Gumbel noise (...) float64: -log(-log u) with u = (word + 1/2) / 2^32.

    The index of the largest log p + gumbel is a draw from the distribution p.
    """
    return -(-((word.double() + 0.5) * 2.0**-32).log()).log()


def sample(count: Tensor, most: int, size: int, replace: bool, rows: Tensor, seed: int, step: int | Tensor) -> Tensor:
    """Draw `size` of the numbers [0, count) for each row: count (B,) int64 of at most `most`, rows (B,) -> (B, size) int64.

    With replacement, each slot is an independent draw. Without replacement, every number has a random word that is drawn with the
    number as the counter, and the numbers with the smallest words are kept (ties: the lower number). A row with fewer than `size`
    numbers keeps all of them, and -1 fills the rest.
    """
    if replace:
        word = words(rows, torch.arange(size, device=rows.device), STREAM_SAMPLE, seed, step)[0]  # (B, size)
        return below(word, count[:, None]).masked_fill(count[:, None] == 0, -1)
    empty = 2**63 - 1
    best = torch.full((len(rows), size), empty, device=rows.device)  # (B, size) word and member in one int64
    for start in range(0, most, SAMPLE_CHUNK):
        member = torch.arange(start, min(start + SAMPLE_CHUNK, most), device=rows.device)
        word = words(rows, member, STREAM_SAMPLE, seed, step)[0]  # (B, chunk)
        key = ((word << 31) | member).masked_fill(member >= count[:, None], empty)  # (B, chunk)
        best = torch.cat([best, key], 1).topk(size, dim=1, largest=False).values
    return (best & (MASK >> 1)).masked_fill(best == empty, -1)


def unit(word: Tensor, quantiles: Tensor | None) -> Tensor:
    """Map random words (...) to fp32 in [0, 1]: their top 24 bits as a fraction, mapped by the quantile table if there is one."""
    top = word >> 8
    if quantiles is None:
        return top.float() * 2.0**-24
    cell, rest = top >> 12, (top & 4095).float() * 2.0**-12
    return quantiles[cell] + rest * (quantiles[cell + 1] - quantiles[cell])


def normals(rows: Tensor, slots: Tensor, D: int, seed: int, step: int | Tensor) -> Tensor:
    """Standard normals (B, S, D) fp32 for rows (B,) and slots (S,) int64, by the Box-Muller transform: four words give four."""
    blocks = -(-D // 4)
    if rows.device.type == "cpu" and not torch.compiler.is_compiling() and len(rows) > 8:
        # A few rows at a time fit into the cache during the ten rounds. Under torch.compile this loop would fix the batch size.
        return torch.cat([normals(some, slots, D, seed, step) for some in rows.split(8)])
    place = (slots[:, None] * blocks + torch.arange(blocks, device=slots.device)).flatten()  # (S * blocks,)
    uniform = [((w >> 8) + 1).float() * 2.0**-24 for w in words(rows, place, STREAM_NORMAL, seed, step)]  # in (0, 1]
    halves = []
    for radius, turn in (uniform[:2], uniform[2:]):
        length = (-2.0 * radius.log()).sqrt()
        halves += [length * (math.tau * turn).cos(), length * (math.tau * turn).sin()]
    return torch.stack(halves, 2).reshape(len(rows), len(slots), 4 * blocks)[:, :, :D]
