"""Runs the op info_nce of the CUDA backend on tensors under the emulator.

The host code of the op, csrc/torch/ops_cuda.cpp, needs torch's CUDA, so its order of kernels is repeated here. What is mined and
where a window ends are found by emulated kernels whatever computes the sums: they are input of those.
"""

import ctypes

import torch

from negmine.ops.pool import Pool
from tests import emulate, emulated_mining, emulated_ranking
from tests.emulate import STORAGE, pointer, pool_arguments

i64 = ctypes.c_int64


def narrowed(query, negative_keys, ranks, pool, **plan):
    """The pool between ranks (B, 2), and the sort keys there."""
    sort_keys = emulated_ranking.emulated("emulated")(query, negative_keys, ranks, pool, **plan)
    lower, upper = torch.full((len(query),), -9), torch.full((len(query),), -9)
    places = map(pointer, (ranks, pool.lower, sort_keys, lower, upper))
    assert emulate.build("rank_window", "emulated").emulated_rank_window(i64(len(query)), *places) == 0
    return pool._replace(lower=lower, upper=upper), sort_keys


def emulated(product, splits=2, least_sample=2048, backwards=False):
    """info_nce with the arguments and results of the declared op. `launches()`: how many kernels it launched so far."""
    built = emulate.build("logsumexp", product)

    def info_nce(query, positive_key, negative_keys, scale, pivot, want_gradient, decoupled, ranks, hard, skip, *rest):
        draws, pool = rest[:11], Pool(*rest[11:])
        (B, D), K = query.shape, len(negative_keys)
        mixing, sort_keys = None, torch.empty(B, 0, dtype=torch.int64)
        if hard and draws[0] + draws[1]:
            N = min(skip + hard, max(K, skip + 1))
            mine = emulated_mining.emulated("emulated")
            _, index = mine(query, negative_keys, N, pool, least_sample=least_sample)
            mixing = emulate.mixing_of(query, negative_keys, index[:, skip:], draws)
        if ranks is not None:
            pool, sort_keys = narrowed(query, negative_keys, ranks, pool, least_sample=least_sample)
        rows, weight, lse, total = (torch.full((B,), -9.0) for _ in range(4))
        d_query = torch.full((B if want_gradient else 0, D), -9.0)
        d_scale = torch.full((B if want_gradient else 0,), -9.0)
        num_kept, num_above, num_mixed = (torch.full((B,), -9) for _ in range(3))
        error = built.emulated_info_nce(
            *map(i64, (B, K, D)), pointer(query), pointer(negative_keys), i64(query.stride(0)),
            i64(negative_keys.stride(0)), STORAGE[query.dtype], pointer(scale), pointer(pivot), want_gradient,
            *pool_arguments(pool), i64(splits), pointer(positive_key), i64(positive_key.stride(0)),
            STORAGE[positive_key.dtype], decoupled, None if mixing is None else ctypes.byref(mixing), backwards,
            *map(pointer, (rows, d_query, d_scale, weight, lse, total, num_kept, num_above, num_mixed)),
        )  # fmt: skip
        assert error == 0
        return rows, d_query, d_scale, weight, lse, total, num_kept, num_above, num_mixed, sort_keys

    def launches():
        mining, ranking = emulated_mining.mining_library("emulated"), emulated_ranking.ranking_library("emulated")
        libraries = built, mining, ranking, emulate.build("rank_window", "emulated")
        return sum(each.emulated_launches() for each in libraries)

    info_nce.launches = launches
    return info_nce
