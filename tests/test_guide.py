"""A guide in the kernels of every op gives the results of its dense mask, bit for bit, and hidden values have no effect."""

import pytest
import torch

from negmine.ops import backends, sort_key
from negmine.ops.pool import Pool, usable
from tests import compare
from tests.cases import DTYPES, ids, unit, whole
from tests.conftest import device_of, interpreted
from tests.test_bias import NO_DRAWS
from tests.test_isa import isa as isa  # the fixture

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where Triton is interpreted
B, D = 18, 24


def ops_of(backend):
    if backend not in backends.TAKE_EXTRAS:
        pytest.skip(f"{backend} takes no guide")
    return next(row for row in backends.BACKENDS if row.name == backend).functions


def columns_for(backend):
    """Return K with several tiles and a part of a tile."""
    return 70 if interpreted(backend) else 150


def other_tiles(backend):
    return ("logsumexp", "info_nce") if backend == "triton" else ()


def guided(device, G, dtypes, rows, columns):
    """A pool with a guide whose scores are integers, often equal to the limit. One key, one query and one limit are NaN."""
    g = whole(rows, G, dtype=dtypes[0], device=device, seed=20)
    g_keys = whole(columns, G, dtype=dtypes[1], device=device, seed=21)
    limit = whole(rows, device=device, seed=22)
    g_keys[columns // 3], g[rows // 2, 0], limit[rows // 3] = torch.nan, torch.nan, torch.nan
    return Pool(guide_query=g, guide_keys=g_keys, guide_limit=limit)


def as_mask(pool, q, keys):
    """The same pool with a (B, K) mask instead of the guide."""
    mask = usable(Pool(pool.negative_mask)._replace(**{name: getattr(pool, name) for name in GUIDE}), q, keys)
    assert 0 < int(mask.sum()) < mask.numel()
    return pool._replace(negative_mask=mask, **dict.fromkeys(GUIDE))


GUIDE = ("guide_query", "guide_keys", "guide_limit")


def results(ops, q, keys, pool):
    """Return the results of all ops that read a queue."""
    rows, device = len(q), q.device
    scale, weight = torch.tensor(0.5, device=device), torch.linspace(0.5, 1.0, rows, device=device)
    pivot, ranks = torch.zeros(rows, device=device), torch.tensor([[2, 9]], device=device).repeat(rows, 1)
    calls = {
        "logsumexp": (scale[None], pivot, True, 3, None),
        "info_nce": (scale, pivot, True, False, ranks, 0, 0, *NO_DRAWS),
        "softplus_sum": (scale, -scale, True),
        "logsumexp_grad_keys": (scale, 9 * weight, weight),
        "softplus_sum_grad_keys": (scale, -scale, weight),
        "logsumexp_grad_bias": (scale, 9 * weight, weight),
        "softplus_sum_grad_bias": (scale, -scale, weight),
        "mine_hardest": (7, True),
        "rank_thresholds": (torch.arange(0, 2 * len(keys), len(keys) // 4, device=device).repeat(rows, 1),),
        "count_negatives": (),
    }
    if "prefix_logsumexp" in ops and pool.lower is None:
        calls["prefix_logsumexp"] = ([5, q.shape[1]], scale, True)
    for name, arguments in calls.items():
        made = ops[name](q, *((q,) if name == "info_nce" else ()), keys, *arguments, *pool)
        yield from ((name, part) for part in (made if isinstance(made, tuple) else (made,)))


def agree(got, want, in_other_tiles, stored=torch.float32):
    """Check that all results are bit-identical, except sums that are added in another order (`in_other_tiles`)."""
    slack = 32 * torch.finfo(stored).eps  # weights are rounded to the dtype of the vectors
    for (name, a), (_, b) in zip(got, want, strict=True):
        if name in in_other_tiles and a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=slack, atol=slack, equal_nan=True, msg=name)
        else:
            compare.exact(name, a, b)


def same(ops, q, keys, pool, in_other_tiles=()):
    agree(results(ops, q, keys, pool), results(ops, q, keys, as_mask(pool, q, keys)), in_other_tiles, q.dtype)


@pytest.mark.parametrize("kind", ["alone", "with masks", "with bounds"])
def test_every_op_is_that_of_the_dense_mask(backend, kind):
    ops, device = ops_of(backend), device_of(backend)
    K = columns_for(backend)
    q, keys = whole(B, D, device=device), whole(K, D, device=device, seed=1)
    pool = guided(device, 5, (torch.float32,) * 2, B, K)
    if kind == "with masks":
        rows = torch.tensor(K - 11, device=device)
        pairs = torch.rand(B, K, generator=torch.Generator().manual_seed(7)).to(device) < 0.8
        pool = pool._replace(**ids(B, K, device), negative_mask=pairs, num_rows=rows)
    if kind == "with bounds":
        lower, upper = (sort_key.pack(torch.full((B,), at, device=device), K // 4) for at in (-20.0, 15.0))
        pool = pool._replace(lower=lower, upper=upper)
    same(ops, q, keys, pool, other_tiles(backend))


def test_hidden_values_may_be_anything(backend):
    """Keys that the guide hides from all queries, and guide keys that a (K,) mask hides, have no effect."""
    ops, device, K = ops_of(backend), device_of(backend), columns_for(backend)
    q, keys = whole(B, D, device=device), whole(K, D, device=device, seed=1)
    guide = Pool(
        torch.arange(K, device=device) % 5 > 0,
        guide_query=whole(B, 5, device=device).abs() + 1.0,
        guide_keys=whole(K, 5, device=device, seed=2),
        guide_limit=torch.full((B,), 5.0, device=device),
    )
    guide.guide_keys[:20] = 2.0
    poisoned, guide_keys = keys.clone(), guide.guide_keys.clone()
    poisoned[:20] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30], device=device).repeat(5)[:, None]
    poisoned[::5], guide_keys[::5] = torch.nan, torch.nan
    found = results(ops, q, poisoned, guide._replace(guide_keys=guide_keys))
    agree(found, results(ops, q, keys, guide), other_tiles(backend))


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_any_storage_and_width(backend, dtypes):
    """A guide may have another dtype and dimension than the keys."""
    if interpreted(backend) and dtypes != (torch.bfloat16, torch.float16):
        pytest.skip("triton: interpreted, where storage is widened on load, whatever it is")
    ops, device, K = ops_of(backend), device_of(backend), columns_for(backend)
    for G, dtype in ((1, dtypes[0]), (70, dtypes[1])):
        q, keys = whole(B, D, dtype=dtype, device=device), whole(K, D, dtype=dtype, device=device, seed=1)
        same(ops, q, keys, guided(device, G, dtypes, B, K), other_tiles(backend))


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_every_instruction_set(isa, dtypes):
    """Several blocks of queries, several chunks of keys, and every pair of dtypes of the guide and the queue."""
    ops = ops_of("cpu")
    for D, G in ((24, 40), (300, 7)):
        q, keys = whole(150, D, dtype=dtypes[0]), whole(300, D, dtype=dtypes[1], seed=1)
        for stored in (dtypes, (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
            same(ops, q, keys, guided("cpu", G, stored, 150, 300))


def test_a_long_queue_in_samples_and_splits():
    """Ranks bracketed by a sample, splits of the queue, and several blocks of queries at once."""
    ops = ops_of("cpu")
    q, keys = unit(200, 8), unit(20_000, 8, seed=1)
    same(ops, q, keys, guided("cpu", 3, (torch.float32,) * 2, 200, 20_000))
