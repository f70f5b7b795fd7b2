"""Block sizes and work splits, computed by functions of shape, storage size and compute capability.

There is no autotuning, so the same inputs on the same GPU always run the same code. The capability is major * 10 + minor, with
AMD added for AMD's GPUs. For Triton's interpreter it is 0; tiles are then small, so that small tests have several tiles.

The tile of scores must not depend on B, K or the op, because passes that compare scores must compute them in the same way
(kernels/README.md). It may depend on whether there is a guide, because the pools of all these passes have it. The number of tiles
of a program and how many tiles it loads in advance may differ between ops.
"""

import functools
from typing import NamedTuple

INTERPRETER = 0
AMD = 1000  # torch gives AMD's GPUs a compute capability too: 9.4 to gfx942, 11.0 to gfx1100
SCRATCH_BYTES = 256 << 20  # limit on the buffers of one mining pass; larger batches are processed in chunks of rows


class ScoreTile(NamedTuple):
    BLOCK_B: int
    BLOCK_K: int
    BLOCK_D: int  # D is one padded block if it fits, else it is processed in steps of this size
    SLICE: int  # how many elements of D a program accumulates when keys or queries are summed
    num_warps: int
    num_stages: int  # tiles in flight in kernels that sum keys


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def score_tile(D: int, itemsize: int, capability: int, guided: bool = False) -> ScoreTile:
    """The tile of scores. itemsize is the size (2 or 4 bytes) of the storage type in which products are computed.

    guided: the pool has a guide, whose scores need a second tile in registers.
    """
    padded = max(16, next_power_of_2(D))  # a tensor-core product contracts at least 16
    if capability == INTERPRETER:
        return ScoreTile(16, 32, min(padded, 64), min(padded, 64), 4, 1)
    if capability >= AMD:
        # A quarter of BLOCK_K, the narrowest part of a tile that is scored alone, must take the same product as all of it.
        if itemsize == 4:
            return ScoreTile(64, 64, min(padded, 32), min(padded, 64), 8, 1)
        if capability < AMD + 100:  # 64 lanes run together, with up to 512 registers each
            return ScoreTile(64, 128, min(padded, 128), min(padded, 128), 4, 1)
        return ScoreTile(64, 64, min(padded, 64), min(padded, 64), 8, 1)
    if itemsize == 4:  # fused multiply-adds: operands live in registers, so short steps of D
        return ScoreTile(64, 64, min(padded, 32), min(padded, 128), 8, 2)
    if guided:
        rows = 128 if 90 <= capability < 120 else 64
        return ScoreTile(rows, 64, min(padded, 128), min(padded, 128), 8, 2)
    if 100 <= capability < 120:  # sm_120 has the older products and the smaller shared memory
        return ScoreTile(128, 64, min(padded, 128), min(padded, 128), 8, 2)
    if capability == 90:
        if padded <= 128:
            return ScoreTile(128, 128, padded, padded, 8, 2)
        return ScoreTile(128, 64, 256 if padded == 256 else 64, 256, 8, 2)
    if padded <= 128:
        return ScoreTile(128, 64, padded, padded, 8, 2)
    return ScoreTile(64, 64, 128, 128, 4, 2)


@functools.cache
def prefix_tile(D: int, itemsize: int, capability: int, masked: bool) -> tuple[ScoreTile, int]:
    """The tile of scores at prefix widths, and how many columns of sums of keys one program may have.

    masked: some scores may not count, and which ones stays in registers while one width after the other is summed.
    """
    padded = max(16, next_power_of_2(D))
    if capability == INTERPRETER:
        return score_tile(D, itemsize, capability), 64
    if itemsize == 4:
        return ScoreTile(64, 32, min(padded, 32), min(padded, 128), 8, 2), 64 if masked else 128
    BLOCK_K, most = (32, 128) if masked else (64, 256)
    return ScoreTile(64, BLOCK_K, min(padded, 128), min(padded, 256), 8, 2 if capability >= 90 else 1), most


class PrefixGroup(NamedTuple):
    """Widths that one launch sums, each with its segment, which begins at the width before."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]  # of the segments
    widths: tuple[int, ...]
    blocks: tuple[int, ...]  # columns of the segment that are multiplied in one step
    columns: tuple[int, ...]  # of the mean that one program sums


@functools.lru_cache(1024)
def prefix_groups(widths: tuple[int, ...], tile: ScoreTile, most: int) -> tuple[tuple[int, PrefixGroup], ...]:
    """The groups in order, each with the number of its first width, as large as they may be.

    A group of several widths has `most` columns of sums at most, and each is one slice; most = 0: there are no such sums.
    """

    def summed(width: int) -> int:
        return min(max(16, next_power_of_2(width)), tile.SLICE)

    groups: list[list[int]] = []
    for width in widths:
        together = [*groups[-1], width] if groups else []
        fits = sum(map(summed, together)) <= most and width <= tile.SLICE
        if together and (fits or not most):
            groups[-1] = together
        else:
            groups.append([width])
    made, first = [], 0
    for group in groups:
        starts = (0, *group[:-1])
        lengths = tuple(end - start for start, end in zip(starts, group, strict=True))
        blocks = tuple(min(max(16, next_power_of_2(length)), tile.BLOCK_D) for length in lengths)
        made.append((first, PrefixGroup(starts, lengths, tuple(group), blocks, tuple(map(summed, group)))))
        first += len(group)
    return tuple(made)


def guide_block(G: int) -> int:
    """How many elements of G one step of a guide's score uses: few, because tiles of keys are in shared memory too."""
    return min(max(16, next_power_of_2(G)), 32)


def resident(tile: ScoreTile, capability: int) -> int:
    """A lower limit for the number of programs that a processor runs at once. tests/test_aot.py checks it.

    The programs need about 128 registers per thread or more, so eight warps fill a processor.
    """
    if capability == INTERPRETER:
        return 2
    if 86 <= capability < 90 or capability >= 120:  # 100 KiB of shared memory for all of them, or an AMD GPU with 64
        return 1
    return 8 // tile.num_warps


def splits(B: int, K: int, tile: ScoreTile, programs: int) -> int:
    """The number of parts of the queue, as large as possible while the GPU can run all programs at once."""
    row_tiles = -(-B // tile.BLOCK_B)
    key_tiles = -(-K // tile.BLOCK_K)
    return max(1, min(programs // max(row_tiles, 1), key_tiles // 2))


@functools.lru_cache(1024)
def even_splits(B: int, K: int, tile: ScoreTile, programs: int) -> tuple[int, int]:
    """The number of parts of the queue that are summed separately and the number of tiles in each, both at least 1."""
    key_tiles = -(-K // tile.BLOCK_K)
    per_split = max(1, -(-key_tiles // splits(B, K, tile, programs)))
    return max(1, -(-key_tiles // per_split)), per_split


class SamplePlan(NamedTuple):
    """The number of keys to sample, and the room for the survivors of a scan."""

    size: int  # number of sampled keys, evenly spaced
    capacity: int  # number of survivors of one row that a scan needs room for, with a probability close to 1


# The position of a rank in a sample has a hypergeometric distribution. Brackets extend 4.75 standard deviations and a few places
# beyond it, so a row fails with a probability near 1e-6. The exact search then finds its result.
SIGMAS, PLACES_BELOW, PLACES_ABOVE = 4.75, 4, 3


def deviation(position: float, size: int, K: int) -> float:
    """The standard deviation of the number of sampled keys above a rank whose mean position in the sample is `position`."""
    return max(position * (1 - position / size) * (1 - size / K), 0.0) ** 0.5


def _capacity(kept: float, size: int, K: int) -> int:
    """An upper limit on the number of keys of the queue between sampled keys that are `kept` places apart."""
    return int(K / size * (kept + SIGMAS * kept**0.5 + PLACES_BELOW)) + 1


def sample_size(K: int, share: int, capability: int) -> int:
    """About K / share keys, as a power of two that is small enough for one row of the sample to fit into registers."""
    least, most = (32, 1024) if capability == INTERPRETER else (2048, 16384)
    return max(least, min(next_power_of_2(K) // share, most))


@functools.cache
def mining_plan(K: int, N: int, capability: int) -> tuple[SamplePlan, int]:
    """The plan for the N hardest, and the 0-based rank in the sample whose score at least N columns nearly always reach."""
    size = sample_size(K, 16, capability)
    position = N * size / K
    rank = int(position + SIGMAS * deviation(position, size, K) + PLACES_BELOW)
    return SamplePlan(size, _capacity(rank + 1, size, K)), rank


@functools.cache
def ranks_plan(K: int, brackets: int, capability: int) -> SamplePlan:
    """The plan for ranks that are known only on the device: it has room for the widest bracket, that of a median."""
    size = sample_size(K, 8, capability)
    kept = 2 * SIGMAS * deviation(size / 2, size, K) + 2 * PLACES_BELOW + 1
    return SamplePlan(size, brackets * _capacity(kept, size, K))


def is_dense(K: int, wanted: int, capability: int) -> bool:
    """Whether to store the sort keys of all columns instead: for a short queue, or if most columns would survive a scan."""
    short = 64 if capability == INTERPRETER else 8192
    return short >= K or 4 * wanted >= K


def is_sorted(K: int, ranks: int, capability: int) -> bool:
    """Whether ranks are read from sorted rows: one sort costs as much as a few dozen scans, or bisections of a short row."""
    if capability == INTERPRETER:
        return ranks > 8
    return ranks > (16 if is_dense(K, 0, capability) else 64)


class ScanPlan(NamedTuple):
    splits: int
    capacity: int  # of one buffer; each row, split and lane has its own


LANES = 4  # number of threads that share a row of the tensor core's result


def levels(tile: ScoreTile) -> int:
    """log2 of the columns of a tile that one lane holds."""
    return (tile.BLOCK_K // LANES).bit_length() - 1


@functools.lru_cache(1024)
def scan_plan(B: int, K: int, capacity: int, brackets: int, tile: ScoreTile, programs: int) -> ScanPlan:
    """Splits for a scan, and room in each private buffer for its share of `capacity` plus six deviations, or plus a tile for each
    bracket, which neighbouring columns of one score fill."""
    parts = min(splits(B, K, tile, programs), max(1, capacity // (8 * LANES)))
    share = capacity / (parts * LANES)
    key_tiles = -(-K // tile.BLOCK_K)
    of_tile = tile.BLOCK_K // LANES
    most = -(-key_tiles // parts) * of_tile
    return ScanPlan(parts, min(most, int(share + max(6 * share**0.5 + 6, brackets * of_tile))))


def rows_at_once(B: int, K: int, plan: SamplePlan | None, tile: ScoreTile) -> int:
    """The number of rows in a chunk, a multiple of the row tile if one fits, so that buffers stay below SCRATCH_BYTES.

    Without a plan, rows are stored whole, which needs about 32 bytes for each column while sort keys are packed or scores sorted.
    """
    bytes_per_row = 32 * K if plan is None else 4 * plan.size + 16 * plan.capacity
    rows = max(SCRATCH_BYTES // bytes_per_row, 1)
    return min(B, rows // tile.BLOCK_B * tile.BLOCK_B or rows)


def row_block(width: int, capability: int) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_W, num_warps) for searching rows of `width` entries. A row is one block if it fits into registers."""
    if capability == INTERPRETER:
        return 16, min(next_power_of_2(width), 1024), 4
    block = max(32, min(next_power_of_2(width), 16384))
    return 1, block, 4 if block <= 4096 else (8 if block <= 8192 else 16)


@functools.cache
def mix_block(D: int, capability: int) -> tuple[int, int, int]:
    """(BLOCK_S, BLOCK_D, num_warps) for mixing: a program computes BLOCK_S synthetic negatives at a time, each with all of D."""
    padded = next_power_of_2(D)
    if capability == INTERPRETER:
        return 8, padded, 4
    return max(1, min(64, 4096 // padded)), padded, 4 if padded <= 1024 else 8


@functools.cache
def merge_block(D: int, splits: int) -> tuple[int, int, int]:
    """(BLOCK_P, BLOCK_D, num_warps) for merging: a program adds BLOCK_P parts of a row at a time, each with all of D."""
    BLOCK_D = next_power_of_2(D)
    BLOCK_P = max(8, min(next_power_of_2(splits), 4096 // BLOCK_D, 32))
    return BLOCK_P, BLOCK_D, max(1, min(BLOCK_P * BLOCK_D // 1024, 16))
