"""Run kernels/cuda/rank_thresholds.cu on tensors in the emulator, with the matrix products of each target GPU."""

import ctypes
import functools

import torch

from tests import emulate
from tests.emulate import STORAGE, pointer, pool_arguments
from tests.emulated_mining import PROCESSORS


@functools.cache
def ranking_library(product):
    built = emulate.build("rank_thresholds", product)
    built.emulated_missing_at.restype = ctypes.c_int64
    built.emulated_terms.restype = ctypes.c_int64
    return built


def plan_of(library, B, K, R, processors=PROCESSORS, least_sample=2048):
    """Return the plan as a dict, and whether offsets into its workspace fit their integer type."""
    names = ("sample", "rows", "splits", "room", "workspace")
    numbers, fitting = (ctypes.c_int64 * len(names))(), ctypes.c_bool()
    library.emulated_plan(*map(ctypes.c_int64, (B, K, R, processors, least_sample)), numbers, ctypes.byref(fitting))
    return dict(zip(names, numbers, strict=True)), fitting.value


def emulated(product):
    """Return rank_thresholds of the emulator. Attributes of the function:

    recovered  which ranks of the last call the exact fallback computed, for the last one or two ranks and the last chunk of rows
    terms      a function: how many products have been added up for scores so far
    """
    library = ranking_library(product)

    def rank_thresholds(query, negative_keys, ranks, pool, least_sample=2048, **changed):
        (B, D), K, R = query.shape, len(negative_keys), ranks.shape[1]
        plan = plan_of(library, B, K, R, least_sample=least_sample)[0] | changed
        numbers = (ctypes.c_int64 * len(plan))(*plan.values())
        places = torch.full((B, R), -9)
        workspace = torch.full((plan["workspace"] + 15,), 0xFF, dtype=torch.uint8)
        workspace = workspace[-workspace.data_ptr() % 16 :][: plan["workspace"]]
        error = library.emulated_rank_thresholds(
            *map(ctypes.c_int64, (B, K, D, R)), pointer(query), pointer(negative_keys),
            ctypes.c_int64(query.stride(0)), ctypes.c_int64(negative_keys.stride(0)), STORAGE[query.dtype],
            pointer(ranks), *pool_arguments(pool), numbers, *map(pointer, (places, workspace)),
        )  # fmt: skip
        assert error == 0
        begin, cells = library.emulated_missing_at(numbers), ((B - 1) % plan["rows"] + 1) * ((R - 1) % 2 + 1)
        rank_thresholds.recovered = workspace[begin : begin + 4 * cells].view(torch.int32) >= 0
        return places

    rank_thresholds.terms = library.emulated_terms
    return rank_thresholds
