"""count_negatives of the CUDA backend with and without a GPU.

kernels/cuda/count_negatives.cu runs on the CPU under tests/emulator. The same cases run on a GPU, where there is one.
"""

import ctypes

import pytest
import torch

from negmine.ops import compiled, sort_key
from tests import emulate
from tests.cases import MASKS, masks, whole
from tests.compare import exact
from tests.emulate import PRODUCTS, STORAGE, on_gpu, pointer, pool_arguments, pool_of
from tests.emulated_mining import PROCESSORS
from tests.ranked import ranking, some_bounds

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(params=[*PRODUCTS, pytest.param("gpu", marks=(pytest.mark.gpu, pytest.mark.sanitized))])
def count(request):
    """count_negatives on CPU tensors, by the emulator or by the GPU."""

    def emulated_count(query, negative_keys, pool, processors=PROCESSORS):
        (B, D), K = query.shape, len(negative_keys)
        out = torch.full((B,), -9)
        error = emulate.build("count_negatives", request.param).emulated_count_negatives(
            *map(ctypes.c_int64, (B, K, D)), pointer(query), pointer(negative_keys),
            ctypes.c_int64(query.stride(0)), ctypes.c_int64(negative_keys.stride(0)), STORAGE[query.dtype],
            *pool_arguments(pool), ctypes.c_int64(processors), pointer(out),
        )  # fmt: skip
        assert error == 0
        return out

    def gpu_count(query, negative_keys, pool, processors=None):
        return torch.ops.negmine_cuda.count_negatives.default(*[on_gpu(x) for x in (query, negative_keys, *pool)]).cpu()

    if request.param in PRODUCTS:
        return emulated_count
    if compiled.CUDA_REFUSAL:
        pytest.skip(compiled.CUDA_REFUSAL)
    return gpu_count


@each_dtype
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (0, 9, 7), (2, 0, 7), (33, 130, 70), (130, 400, 16), (3, 300, 200)], ids=str
)
def test_counts_pools(count, shape, dtype):
    B, K, D = shape
    q, keys = whole(B, D, dtype=dtype), whole(K, D, dtype=dtype, seed=1)
    bottom = torch.full((B,), sort_key.BOTTOM)
    for kind in MASKS:
        given = masks(kind, B, K)
        for bounds in ({}, {"lower": bottom}, {"upper": sort_key.pack(torch.zeros(B), 0)}):
            pool = pool_of(q, keys, **bounds, **given)
            processors = 40 if bounds else 1
            exact(f"{kind} {bounds}", count(q, keys, pool, processors), ranking(q, keys, **bounds, **given)[1])


def test_counts_within_bounds(count):
    B, K = 9, 500
    q, keys = whole(B, 20, dtype=torch.bfloat16), whole(K, 20, dtype=torch.bfloat16, seed=1)
    lower, upper = some_bounds(q, keys)
    for bounds in ({"upper": upper}, {"lower": lower}, {"lower": lower, "upper": upper}):
        for given in ({}, {"same_label": True, **masks("labels", B, K)}):
            same_label = given.get("same_label", False)
            rest = {name: x for name, x in given.items() if name != "same_label"}
            pool = pool_of(q, keys, same_label=same_label, **bounds, **rest)
            exact(str(bounds), count(q, keys, pool), ranking(q, keys, same_label, **bounds, **rest)[1])


def test_a_nan_score_counts_where_nothing_bounds(count):
    q, keys = whole(3, 6, dtype=torch.bfloat16), whole(70, 6, dtype=torch.bfloat16, seed=1)
    keys[::7] = torch.nan
    q[1] = torch.nan
    mask = torch.arange(70) % 2 == 0
    exact("all", count(q, keys, pool_of(q, keys)), torch.tensor([70] * 3))
    exact("masked", count(q, keys, pool_of(q, keys, negative_mask=mask)), torch.tensor([35] * 3))
    bottom = torch.full((3,), sort_key.BOTTOM)
    exact("bounded", count(q, keys, pool_of(q, keys, lower=bottom)), torch.tensor([60, 0, 60]))
