"""Run kernels/cuda/mine_hardest.cu on tensors in the emulator, with the matrix products of each target GPU."""

import ctypes
import functools

import torch

from tests import emulate
from tests.emulate import STORAGE, pointer, pool_arguments

PROCESSORS = 6


@functools.cache
def mining_library(product):
    built = emulate.build("mine_hardest", product)
    built.emulated_terms.restype = ctypes.c_int64
    return built


def plan_of(library, B, K, N, processors=PROCESSORS, least_sample=2048):
    """Return the plan as a dict, and whether the last step of a row fits into shared memory."""
    names = ("sample", "sample_rank", "capacity", "rows", "splits", "room", "workspace")
    numbers, fitting = (ctypes.c_int64 * len(names))(), ctypes.c_bool()
    library.emulated_plan(*map(ctypes.c_int64, (B, K, N, processors, least_sample)), numbers, ctypes.byref(fitting))
    return dict(zip(names, numbers, strict=True)), fitting.value


def emulated(product):
    """Return mine_hardest of the emulator. Attributes of the function:

    recovered  for each row of the last call, whether the exact fallback computed it
    boxes      a function: how many boxes (tiles of keys) the copy engine of sm_90a has copied so far
    terms      a function: how many products have been added up for scores so far
    """
    library = mining_library(product)

    def mine_hardest(query, negative_keys, N, pool, least_sample=2048, **changed):
        (B, D), K = query.shape, len(negative_keys)
        plan = plan_of(library, B, K, N, least_sample=least_sample)[0] | changed
        scores, index = torch.full((B, N), torch.nan), torch.full((B, N), -9)
        workspace = torch.full((plan["workspace"] + 15,), 0xFF, dtype=torch.uint8)
        workspace = workspace[-workspace.data_ptr() % 16 :][: plan["workspace"]]
        error = library.emulated_mine_hardest(
            *map(ctypes.c_int64, (B, K, D, N)), pointer(query), pointer(negative_keys),
            ctypes.c_int64(query.stride(0)), ctypes.c_int64(negative_keys.stride(0)), STORAGE[query.dtype],
            *pool_arguments(pool), (ctypes.c_int64 * len(plan))(*plan.values()),
            *map(pointer, (scores, index, workspace)),
        )  # fmt: skip
        assert error == 0
        # The flags of recovered rows follow the survivors, their counts, and the cuts in the workspace.
        buffers = 4 * plan["rows"] * plan["splits"]
        survivors = max(8 * buffers * plan["room"], -(-4 * plan["rows"] * plan["sample"] // 16) * 16)
        begin = survivors + 4 * buffers + 8 * plan["rows"]
        mine_hardest.recovered = workspace[begin : begin + 4 * min(B, plan["rows"])].view(torch.int32)
        return scores, index

    mine_hardest.boxes = library.emulated_boxes
    mine_hardest.terms = library.emulated_terms
    return mine_hardest
