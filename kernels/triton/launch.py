"""Common code of the launchers: properties of the GPU, the tile of scores, and the common arguments of kernels.

Nothing here waits for the device. The time of a small batch is dominated by Python code before a launch, so properties of the GPU
are cached, and kernels are called with positional arguments.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import triton

from . import tiles
from .pool import KernelPool
from .score import widens

INTERPRET = triton.knobs.runtime.interpret

# For kernels that sum products over threads. For a b + c d, one thread may round a b and fuse c d, and another thread the
# reverse. Threads with the same sum would then differ in its last bit, and the hardware decides which of them stores it.
UNFUSED = {"enable_fp_fusion": False}


@functools.cache
def capability(device: torch.device) -> int:
    if INTERPRET:
        return tiles.INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor + (tiles.AMD if torch.version.hip else 0)


@functools.cache
def processors(device: torch.device) -> int:
    return 4 if INTERPRET else torch.cuda.get_device_properties(device).multi_processor_count


def programs_at_once(device: torch.device, tile: tiles.ScoreTile) -> int:
    """How many programs over scores the card surely holds at once."""
    return processors(device) * tiles.resident(tile, capability(device))


def launcher(op: Callable) -> Callable:
    """Run op on the device of its first tensor, because Triton launches on the current device."""
    if INTERPRET:
        return op

    @functools.wraps(op)
    def on_its_device(query: Tensor, *args):
        if query.device.index == torch.cuda.current_device():
            return op(query, *args)
        with torch.cuda.device(query.device):
            return op(query, *args)

    return on_its_device


def score_tile(query: Tensor, negative_keys: Tensor, pool: KernelPool) -> tiles.ScoreTile:
    itemsize = 4 if query.dtype != negative_keys.dtype else query.element_size()
    return tiles.score_tile(query.shape[1], itemsize, capability(query.device), pool.guide_query is not None)


def score_arguments(query: Tensor, negative_keys: Tensor, tile: tiles.ScoreTile, pool: KernelPool) -> tuple:
    """The first arguments of every kernel that computes scores.

    query_ptr, keys_ptr, stride_qb, stride_kk, B, K, pool, EVEN_K, WIDEN, D, BLOCK_B, BLOCK_K, BLOCK_D
    """
    (B, D), K = query.shape, negative_keys.shape[0]
    return (
        query, negative_keys, query.stride(0), negative_keys.stride(0), B, K, pool,
        K % tile.BLOCK_K == 0 and pool.num_rows is None, widens(query, negative_keys),
        D, tile.BLOCK_B, tile.BLOCK_K, tile.BLOCK_D,
    )  # fmt: skip
