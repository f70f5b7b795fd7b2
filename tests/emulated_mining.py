"""Runs kernels/cuda/mine_hardest.cu on tensors under the emulator, with each matrix product of its target GPUs."""

import ctypes
import functools
import tempfile
from pathlib import Path

import torch

from tests import emulate
from tests.emulate import PRODUCTS, STORAGE, pointer, pool_arguments

FOLDER = tempfile.TemporaryDirectory(prefix="negmine-")
PROCESSORS = 6


@functools.cache
def mining_library(product):
    folder = Path(FOLDER.name) / product
    folder.mkdir()
    built = emulate.build("mine_hardest", folder, *PRODUCTS[product])
    built.emulated_terms.restype = ctypes.c_int64
    return built


def plan_of(library, B, K, N, processors=PROCESSORS, least_sample=2048):
    """The plan as a dict, and whether a row's finish fits in shared memory."""
    names = ("sample", "sample_rank", "capacity", "rows", "splits", "room", "workspace")
    numbers, fitting = (ctypes.c_int64 * len(names))(), ctypes.c_bool()
    library.emulated_plan(*map(ctypes.c_int64, (B, K, N, processors, least_sample)), numbers, ctypes.byref(fitting))
    return dict(zip(names, numbers, strict=True)), fitting.value


def emulated(product):
    """mine_hardest by the emulator; its attributes: what the last call recovered, and the boxes copied and terms added so far."""
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
        # What recover says of the rows lies after them, their counts and the cuts.
        buffers = 4 * plan["rows"] * plan["splits"]
        survivors = max(8 * buffers * plan["room"], -(-4 * plan["rows"] * plan["sample"] // 16) * 16)
        begin = survivors + 4 * buffers + 8 * plan["rows"]
        mine_hardest.recovered = workspace[begin : begin + 4 * min(B, plan["rows"])].view(torch.int32)
        return scores, index

    mine_hardest.boxes = library.emulated_boxes
    mine_hardest.terms = library.emulated_terms
    return mine_hardest
