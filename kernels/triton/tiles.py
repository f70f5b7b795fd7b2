"""Block sizes and work splits, chosen by plain functions of shape, storage size and compute capability.

No autotuning: the same inputs on the same card always run the same code, and a reader can see which. Capability is
major * 10 + minor; 0 is Triton's interpreter, where tiles are small so that small tests still cross tile borders.

One rule binds the score tile: it must not depend on B, K or the op, for passes that compare scores must compute them
alike (kernels/README.md); with a guide, which the pool of each of them then has, it is another one. What may differ between
ops is how many tiles a program walks and how far it loads ahead.
"""

import functools
from typing import NamedTuple

INTERPRETER = 0
SCRATCH_BYTES = 256 << 20  # what the buffers of one mining pass may take; longer batches go in chunks of rows


class ScoreTile(NamedTuple):
    BLOCK_B: int
    BLOCK_K: int
    BLOCK_D: int  # D is one padded block where it fits, else steps of this
    SLICE: int  # columns of D that one program accumulates when keys or queries are summed
    num_warps: int
    num_stages: int  # tiles in flight in kernels that sum keys


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def score_tile(D: int, itemsize: int, capability: int, guided: bool = False) -> ScoreTile:
    """The tile of scores; itemsize is that of the storage type the product is taken in (2 or 4 bytes).

    guided: the pool has a guide, whose scores are a second tile in registers.
    """
    padded = max(16, next_power_of_2(D))  # a tensor-core product contracts at least 16
    if capability == INTERPRETER:
        return ScoreTile(16, 32, min(padded, 64), min(padded, 64), 4, 1)
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


def guide_block(G: int) -> int:
    """Columns of a guide that one step of its score takes: few, because tiles of the keys are in shared memory beside them."""
    return min(max(16, next_power_of_2(G)), 32)


def resident(tile: ScoreTile, capability: int) -> int:
    """How many programs over scores a processor surely holds at once; tests/test_aot.py asks the compiled kernels.

    They take more than 128 registers a thread, or little less: eight warps fill a processor.
    """
    if capability == INTERPRETER:
        return 2
    if 86 <= capability < 90 or capability >= 120:  # 100 KiB of shared memory for all of them
        return 1
    return 8 // tile.num_warps


def splits(B: int, K: int, tile: ScoreTile, programs: int) -> int:
    """Into how many parts the queue is cut so that the card holds all programs at once, and as many as it can."""
    row_tiles = -(-B // tile.BLOCK_B)
    key_tiles = -(-K // tile.BLOCK_K)
    return max(1, min(programs // max(row_tiles, 1), key_tiles // 2))


@functools.lru_cache(1024)
def even_splits(B: int, K: int, tile: ScoreTile, programs: int) -> tuple[int, int]:
    """How many parts of the queue are summed apart, one at least, and how many tiles each of them takes, one at least."""
    key_tiles = -(-K // tile.BLOCK_K)
    per_split = max(1, -(-key_tiles // splits(B, K, tile, programs)))
    return max(1, -(-key_tiles // per_split)), per_split


class SamplePlan(NamedTuple):
    """How many keys to sample, and how wide a bracket around a rank must be to hold it nearly always."""

    size: int  # sampled keys, evenly spaced in ring order
    capacity: int  # survivors of one row that a scan must have room for, with certainty close to one


# A rank's position in a sample is hypergeometric. Brackets reach 4.75 standard deviations and a few places beyond it: a row
# fails with a chance near 1e-6, and is then found exactly by the fallback.
SIGMAS, PLACES_BELOW, PLACES_ABOVE = 4.75, 4, 3


def deviation(position: float, size: int, K: int) -> float:
    """Standard deviation of the number of sampled keys above a rank that lies at `position` of the sample on average."""
    return max(position * (1 - position / size) * (1 - size / K), 0.0) ** 0.5


def _capacity(kept: float, size: int, K: int) -> int:
    """Keys of the queue that `kept` neighbouring places of the sample stand for, at most."""
    return int(K / size * (kept + SIGMAS * kept**0.5 + PLACES_BELOW)) + 1


def sample_size(K: int, share: int, capability: int) -> int:
    """About K / share keys, a power of two small enough for one row of the sample to sit in registers."""
    least, most = (32, 1024) if capability == INTERPRETER else (2048, 16384)
    return max(least, min(next_power_of_2(K) // share, most))


@functools.cache
def mining_plan(K: int, N: int, capability: int) -> tuple[SamplePlan, int]:
    """The plan for the N hardest, and the rank in the sample (from 0) whose score nearly always admits at least N."""
    size = sample_size(K, 16, capability)
    position = N * size / K
    rank = int(position + SIGMAS * deviation(position, size, K) + PLACES_BELOW)
    return SamplePlan(size, _capacity(rank + 1, size, K)), rank


@functools.cache
def ranks_plan(K: int, brackets: int, capability: int) -> SamplePlan:
    """The plan for ranks known only on the device: wide enough for a median, the widest bracket there is."""
    size = sample_size(K, 8, capability)
    kept = 2 * SIGMAS * deviation(size / 2, size, K) + 2 * PLACES_BELOW + 1
    return SamplePlan(size, brackets * _capacity(kept, size, K))


def is_dense(K: int, wanted: int, capability: int) -> bool:
    """Whether to hold whole rows of sort keys instead: a short queue, or so much wanted that survivors would be the queue."""
    short = 64 if capability == INTERPRETER else 8192
    return short >= K or 4 * wanted >= K


def is_sorted(K: int, ranks: int, capability: int) -> bool:
    """Whether so many ranks are read off sorted rows: one sort for a few dozen scans, or for bisecting a short row as often."""
    if capability == INTERPRETER:
        return ranks > 8
    return ranks > (16 if is_dense(K, 0, capability) else 64)


class ScanPlan(NamedTuple):
    splits: int
    capacity: int  # of one buffer, private to a row, a split and a lane


LANES = 4  # threads that share a row of the tensor core's result


def levels(tile: ScoreTile) -> int:
    """log2 of the columns of a tile that one lane holds."""
    return (tile.BLOCK_K // LANES).bit_length() - 1


@functools.lru_cache(1024)
def scan_plan(B: int, K: int, capacity: int, tile: ScoreTile, programs: int) -> ScanPlan:
    """Splits for a scan, and room in each private buffer for its share of `capacity` plus six deviations."""
    parts = min(splits(B, K, tile, programs), max(1, capacity // (8 * LANES)))
    share = capacity / (parts * LANES)
    key_tiles = -(-K // tile.BLOCK_K)
    most = -(-key_tiles // parts) * (tile.BLOCK_K // LANES)
    return ScanPlan(parts, min(most, int(share + 6 * share**0.5 + 6)))


def rows_at_once(B: int, K: int, plan: SamplePlan | None, tile: ScoreTile) -> int:
    """Rows per chunk, whole row tiles where one fits, that keep scratch below SCRATCH_BYTES.

    No plan: whole rows, which take about 32 bytes a column while sort keys are packed, or scores sorted.
    """
    bytes_per_row = 32 * K if plan is None else 4 * plan.size + 16 * plan.capacity
    rows = max(SCRATCH_BYTES // bytes_per_row, 1)
    return min(B, rows // tile.BLOCK_B * tile.BLOCK_B or rows)


def row_block(width: int, capability: int) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_W, num_warps) to search rows of `width` entries, each one block where it fits in registers."""
    if capability == INTERPRETER:
        return 16, min(next_power_of_2(width), 1024), 4
    block = max(32, min(next_power_of_2(width), 16384))
    return 1, block, 4 if block <= 4096 else (8 if block <= 8192 else 16)


@functools.cache
def mix_block(D: int, capability: int) -> tuple[int, int, int]:
    """(BLOCK_S, BLOCK_D, num_warps): slots mixed at once by one program, each over the whole of D."""
    padded = next_power_of_2(D)
    if capability == INTERPRETER:
        return 8, padded, 4
    return max(1, min(64, 4096 // padded)), padded, 4 if padded <= 1024 else 8


@functools.cache
def merge_block(D: int, splits: int) -> tuple[int, int, int]:
    """(BLOCK_P, BLOCK_D, num_warps): parts of a row that one program adds at once, each over the whole of D."""
    BLOCK_D = next_power_of_2(D)
    BLOCK_P = max(8, min(next_power_of_2(splits), 4096 // BLOCK_D, 32))
    return BLOCK_P, BLOCK_D, max(1, min(BLOCK_P * BLOCK_D // 1024, 16))
