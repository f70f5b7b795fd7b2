"""num_rows in the CUDA kernels, which read it on the device: rows past it are never candidates and never read. And rank_window.

A queue of K rows, of which num_rows are there and the rest are NaN, gives bit for bit what a queue of num_rows rows gives.
"""

import ctypes

import pytest
import torch

from negmine.ops import sort_key
from tests import emulate, emulated_mining, emulated_ranking
from tests.emulate import PRODUCTS, STORAGE, pointer, pool_arguments, pool_of

B, K, D, SPLITS = 20, 200, 24, 2
i64 = ctypes.c_int64


def queue(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return torch.randn(B, D).to(dtype), torch.randn(K, D).to(dtype)


def pools(kind, rows):
    """The pool of a queue that has K rows, num_rows of them valid, and of one that has no more."""
    torch.manual_seed(1)
    given = {}
    if kind == "masked":
        given["negative_mask"] = torch.rand(K) < 0.7
    if kind == "by_pair":
        given["negative_mask"] = torch.rand(B, K) < 0.7
        given |= {"query_ids": torch.randint(5, (B,)), "negative_ids": torch.randint(5, (K,))}
        given["lower"] = sort_key.pack(torch.full((B,), -3.0), sort_key.LAST_INDEX)
    whole = pool_of(None, None, **given, num_rows=torch.tensor(rows))
    cut = {name: t[..., : max(rows, 0)] if name.startswith("negative") else t for name, t in given.items()}
    return whole, pool_of(None, None, **cut)


def arguments(query, keys):
    return (*map(i64, (len(query), len(keys), D)), pointer(query), pointer(keys), i64(query.stride(0)),
            i64(keys.stride(0)), STORAGE[query.dtype])  # fmt: skip


def compare(run):
    for kind, num_rows in CASES:
        compare_case(run, kind, num_rows)


def compare_case(run, kind, num_rows):
    query, keys = queue()
    rows = min(max(num_rows, 0), K)
    broken = keys.clone()
    broken[rows:] = torch.nan
    whole, cut = pools(kind, num_rows)
    got, want = run(query, broken, whole), run(query, keys[:rows], cut)
    for one, other in zip(got, want, strict=True):
        if one.shape != other.shape:  # (K, D)
            assert not one[rows:].any()
            one = one[:rows]
        assert torch.equal(one, other)


each_product = pytest.mark.parametrize("product", PRODUCTS)
CASES = [("plain", 70), ("masked", 128), ("by_pair", 70), ("plain", 0), ("plain", -1), ("plain", 999)]


@each_product
def test_count_negatives(product):
    library = emulate.build("count_negatives", product)

    def run(query, keys, pool):
        count = torch.full((B,), -9)
        assert (
            library.emulated_count_negatives(*arguments(query, keys), *pool_arguments(pool), i64(6), pointer(count))
            == 0
        )
        return (count,)

    compare(run)


@each_product
def test_logsumexp(product):
    library = emulate.build("logsumexp", product)

    def run(query, keys, pool):
        lse, mean = torch.full((B,), -9.0), torch.full((B, D), -9.0)
        kept, above = torch.full((B,), -9), torch.full((B,), -9)
        pivot, scale = torch.zeros(B), torch.tensor(2.0)
        error = library.emulated_logsumexp(
            *arguments(query, keys), pointer(scale), pointer(pivot), True, *pool_arguments(pool), i64(SPLITS),
            *map(pointer, (lse, mean, kept, above)),
        )  # fmt: skip
        assert error == 0
        return lse, mean, kept, above

    compare(run)


@each_product
def test_logsumexp_grad_keys(product):
    library = emulate.build("logsumexp_grad_keys", product)

    def run(query, keys, pool):
        grad_keys, lse, weight, scale = (
            torch.full((len(keys), D), -9.0),
            torch.ones(B),
            torch.rand(B),
            torch.tensor(2.0),
        )
        torch.manual_seed(2)
        weight = torch.rand(B)
        error = library.emulated_logsumexp_grad_keys(
            *arguments(query, keys), *map(pointer, (scale, lse, weight)), *pool_arguments(pool), i64(SPLITS), False,
            pointer(grad_keys),
        )  # fmt: skip
        assert error == 0
        return (grad_keys,)

    compare(run)


@each_product
@pytest.mark.parametrize("least_sample", [16, 2048])  # with a sample and without
def test_mine_hardest(product, least_sample):
    kernel = emulated_mining.emulated(product)
    compare(lambda query, keys, pool: kernel(query, keys, 5, pool, least_sample=least_sample))


@each_product
@pytest.mark.parametrize("least_sample", [16, 2048])
def test_rank_thresholds(product, least_sample):
    kernel, ranks = emulated_ranking.emulated(product), torch.tensor([[0, 40, 199]] * B)
    compare(lambda query, keys, pool: (kernel(query, keys, ranks, pool, least_sample=least_sample),))


@pytest.mark.parametrize("product", ["emulated", "compiled_sm80"])
@pytest.mark.parametrize("with_lower", [False, True])
def test_rank_window(product, with_lower):
    nowhere, lowest = sort_key.NOWHERE, sort_key.BOTTOM
    ranks = torch.tensor([[0, 5], [3, 2], [-1, 4], [7, 9], [2, 99]] + [[1, 2]] * 200)
    keys = torch.tensor([[90, 50], [60, 70], [nowhere, 40], [nowhere, nowhere], [80, nowhere]] + [[30, 20]] * 200)
    want = keys.clone()
    want[1:4] = nowhere
    pool_lower = torch.full((205,), 55) if with_lower else None
    lower, upper = torch.full((205,), -9), torch.full((205,), -9)
    places = (ranks, pool_lower, keys, lower, upper)
    assert emulate.build("rank_window", product).emulated_rank_window(i64(205), *map(pointer, places)) == 0
    assert torch.equal(keys, want)
    assert torch.equal(upper, want[:, 0])
    assert torch.equal(lower, want[:, 1].clamp_min(55 if with_lower else lowest))
