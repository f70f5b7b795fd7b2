"""rank_thresholds of the CUDA backend with and without a GPU.

kernels/cuda/rank_thresholds.cu runs on the CPU under tests/emulator. The same cases run on a GPU, where
there is one, and are small enough for compute-sanitizer. On the CPU the sample is smaller, so that a short queue takes the path
of a long one.
"""

import pytest
import torch

from negmine.ops import compiled, sort_key
from negmine.ops.pool import Pool
from tests.cases import MASKS, masks, unit, whole
from tests.compare import exact
from tests.emulate import PRODUCTS, on_gpu, pool_of
from tests.emulated_mining import emulated as emulated_mining
from tests.emulated_ranking import emulated, plan_of, ranking_library
from tests.queues import QUEUES, queue
from tests.ranked import ranking, some_bounds

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
each_way = pytest.mark.parametrize("least_sample", [32, 2048], ids=["sampled", "short"])


@pytest.fixture(params=PRODUCTS)
def emulated_kernel(request):
    return emulated(request.param)


def gpu_ranks(query, negative_keys, ranks, pool, least_sample=2048, **changed):
    tensors = [on_gpu(x) for x in (query, negative_keys, ranks, *pool)]
    return torch.ops.negmine_cuda.rank_thresholds.default(*tensors).cpu()


on_both = pytest.fixture(params=[*PRODUCTS, pytest.param("gpu", marks=(pytest.mark.gpu, pytest.mark.sanitized))])


@on_both
def kernel(request):
    """rank_thresholds on CPU tensors, by the emulator or by the GPU."""
    if request.param in PRODUCTS:
        return emulated(request.param)
    if compiled.CUDA_REFUSAL:
        pytest.skip(compiled.CUDA_REFUSAL)
    return gpu_ranks


def recovered(kernel):
    """Ranks of the last call that were found by the digits of their places; None on a GPU, which does not say."""
    return int(kernel.recovered.sum()) if hasattr(kernel, "recovered") else None


def check(kernel, q, keys, ranks, least_sample=2048, changed=None, **given):
    """Of small integers: every place is that of the definition, ties included."""
    bounds = {name: given.pop(name, None) for name in ("lower", "upper")}
    same_label = given.pop("same_label", False)
    pool = pool_of(q, keys, same_label=same_label, **bounds, **given)
    got = kernel(q, keys, ranks, pool, least_sample, **(changed or {}))
    table, _ = ranking(q, keys, same_label, **bounds, **given)
    want = table.gather(1, ranks.clamp(0, len(keys))).masked_fill(ranks < 0, sort_key.NOWHERE)
    exact("places", got, want)


def some_ranks(B, K, R=2, seed=0):
    """(B, R), from -1 to past the end, in no order."""
    return torch.randint(-1, K + 2, (B, R), generator=torch.Generator().manual_seed(seed))


SHAPES = [  # B, K, D, R, least sample
    (1, 1, 1, 1, 2048),
    (0, 9, 7, 2, 2048),
    (2, 0, 7, 2, 2048),
    (2, 9, 7, 0, 2048),
    (3, 5, 7, 5, 2048),  # odd D, R of three passes
    (33, 130, 70, 2, 2048),  # B past a warp, K past two tiles, D past 64
    (3, 300, 200, 2, 32),  # wide D
    (130, 400, 16, 3, 32),  # B past a block
    (4, 1000, 64, 2, 32),
    (2, 600, 130, 1, 32),
    (1, 900, 256, 2, 32),
    (3, 9000, 16, 2, 2048),
]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_exact_on_integers(kernel, shape, dtype):
    B, K, D, R, least_sample = shape
    check(kernel, whole(B, D, dtype=dtype), whole(K, D, dtype=dtype, seed=1), some_ranks(B, K, R), least_sample)


def test_every_rank_of_a_row(kernel):
    """One row for each rank, beside the rank mirrored: brackets that meet, overlap and lie apart, at both ends of a queue."""
    K = 300
    q = whole(1, 12, dtype=torch.bfloat16).expand(K + 2, 12).contiguous()
    first = torch.arange(-1, K + 1)
    check(kernel, q, whole(K, 12, dtype=torch.bfloat16, seed=1), torch.stack([first, K - 1 - first], 1), 32)


@each_dtype
def test_brackets_hold_the_ranks_of_real_vectors(kernel, dtype):
    q, keys = unit(24, 64, dtype=dtype), unit(4000, 64, dtype=dtype, seed=1)
    for ranks in ([0, 39], [200, 399], [1999, 2000], [3960, 3999], [0, 3999], [1200, 2800]):
        got = kernel(q, keys, torch.tensor([ranks] * 24), pool_of(q, keys), 256)
        scores, index = sort_key.unpack(got)
        exact_scores = q.double() @ keys.double().T  # (B, K)
        torch.testing.assert_close(scores.double(), exact_scores.gather(1, index), rtol=0, atol=1e-6)
        for r, rank in enumerate(ranks):
            own = exact_scores.gather(1, index[:, r : r + 1])
            assert ((exact_scores > own + 1e-6).sum(1) <= rank).all()
            assert ((exact_scores >= own - 1e-6).sum(1) > rank).all()
        assert recovered(kernel) in (0, None), ranks


def test_brackets_are_of_the_columns_that_a_row_sees(emulated_kernel):
    """Three columns in ten, the hardest of all not among them."""
    q, keys = unit(9, 32, dtype=torch.bfloat16), unit(3000, 32, dtype=torch.bfloat16, seed=1)
    scores = q.float() @ keys.float().T
    allowed = (torch.rand(9, 3000, generator=torch.Generator().manual_seed(2)) < 0.3) & (scores < 0.1)
    upper = sort_key.pack(torch.full((9,), 0.1), 0)
    for pool in (pool_of(q, keys, negative_mask=allowed), pool_of(q, keys, upper=upper), pool_of(q, keys, lower=upper)):
        for ranks in ([0, 30], [200, 300], [2000, 2999]):
            emulated_kernel(q, keys, torch.tensor([ranks] * 9), pool, 256)
            assert recovered(emulated_kernel) == 0, ranks


def test_sort_keys_are_those_that_mining_finds():
    """To the bit: the two compare places with each other's."""
    q, keys = unit(7, 48, dtype=torch.bfloat16), unit(900, 48, dtype=torch.bfloat16, seed=1)
    for product in PRODUCTS:
        pool = pool_of(q, keys)
        mined = sort_key.pack(*emulated_mining(product)(q, keys, 60, pool))[:, ::10].contiguous()
        exact("places", emulated(product)(q, keys, torch.arange(0, 60, 10).repeat(7, 1), pool, 128), mined)


@each_way
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kernel, kind, least_sample):
    B, K = 35, 500
    q, keys = whole(B, 20, dtype=torch.bfloat16), whole(K, 20, dtype=torch.bfloat16, seed=1)
    given, ranks = masks(kind, B, K), some_ranks(B, K)
    ranks[:, 0] //= 3  # pools hold some of the columns
    check(kernel, q, keys, ranks, least_sample, **given)
    if kind == "columns":
        unread = keys.clone()
        unread[~given["negative_mask"]] = torch.nan
        got = [kernel(q, x, ranks, pool_of(q, x, **given), least_sample) for x in (keys, unread)]
        exact("places", got[1], got[0])


@each_way
def test_same_labels_and_bounds(kernel, least_sample):
    B, K = 9, 500
    q, keys = whole(B, 20, dtype=torch.bfloat16), whole(K, 20, dtype=torch.bfloat16, seed=1)
    ranks = some_ranks(B, K // 4)
    check(kernel, q, keys, ranks, least_sample, same_label=True, **masks("labels", B, K))
    lower, upper = some_bounds(q, keys)
    for bounds in ({"upper": upper}, {"lower": lower}, {"lower": lower, "upper": upper}):
        check(kernel, q, keys, ranks, least_sample, **bounds)
        check(kernel, q, keys, ranks, least_sample, **bounds, **masks("everything", B, K))


@pytest.mark.parametrize("kind", QUEUES)
def test_adversarial_queues(kernel, kind):
    B, K, D = 5, 1000, 16
    q = whole(B, D, dtype=torch.bfloat16).abs() + 1
    keys = queue(kind, K, D, 64).to(torch.bfloat16)
    for seed in range(3):
        check(kernel, q, keys, some_ranks(B, K, 2, seed), 64)
    check(kernel, q, keys, some_ranks(B, K), 64, **masks("pairs", B, K))


@pytest.mark.parametrize("kind", ["all equal", "two values", "shuffled clusters", "clustered"])
def test_ties_are_cut_by_their_columns(emulated_kernel, kind):
    """A sample tells where among equal scores a rank lies: none of these queues is read again."""
    K, D = 4000, 8
    q = whole(6, D, dtype=torch.bfloat16).abs() + 1
    keys = queue(kind, K, D, 256).to(torch.bfloat16)
    for ranks in ([0, 39], [400, 1999], [2500, 3999]):
        check(emulated_kernel, q, keys, torch.tensor([ranks] * 6), 256)
        assert recovered(emulated_kernel) == 0, ranks


def test_nan_and_infinite_scores(kernel):
    q, keys = whole(6, 12, dtype=torch.bfloat16), whole(700, 12, dtype=torch.bfloat16, seed=1)
    keys[5::7] = torch.nan
    keys[::11] *= torch.inf  # infinities, and NaN from 0 * inf
    q[2] = torch.nan
    for least_sample in (32, 2048):
        for seed in range(3):
            check(kernel, q, keys, some_ranks(6, 700, 2, seed), least_sample)


def test_scores_of_any_size(kernel):
    """Zeros of both signs, the largest numbers beside the least: cells over the range of a row say nothing of most of it."""
    keys = torch.zeros(600, 4, dtype=torch.bfloat16)
    keys[::3] = -0.0
    keys[1::5, 0] = torch.logspace(-36, 38, 120).to(torch.bfloat16)
    keys[2::5, 0] = -torch.logspace(-36, 38, 120).to(torch.bfloat16)
    q = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]], dtype=torch.bfloat16).repeat(20, 1)
    check(kernel, q, keys, some_ranks(40, 600), 32)


@pytest.mark.parametrize("D", [24, 27])
def test_strides_change_no_bit(kernel, D):
    q, keys = unit(9, D, dtype=torch.bfloat16), unit(400, D, dtype=torch.bfloat16, seed=1)
    ranks = some_ranks(9, 400)
    plain = kernel(q, keys, ranks, pool_of(q, keys), 32)
    for width in (D + 8, D + 5):
        wide = torch.full((400, width), torch.nan, dtype=torch.bfloat16)
        for start in (0, width - D):
            wide[:, start : start + D] = keys
            view = wide[:, start : start + D]
            exact("places", kernel(q, view, ranks, pool_of(q, view), 32), plain)


def test_rows_in_chunks(emulated_kernel):
    """What a long batch does where its buffers would pass the budget."""
    q, keys = whole(300, 8, dtype=torch.bfloat16), whole(200, 8, dtype=torch.bfloat16, seed=1)
    for given in ({}, masks("everything", 300, 200)):
        check(emulated_kernel, q, keys, some_ranks(300, 200, 3), 32, changed={"rows": 128}, **given)


def test_buffers_that_overflow_are_found_out(emulated_kernel):
    """Room for what one chunk of keys may add and no more: ranks are recovered, and nothing is written past a buffer."""
    q, keys = whole(5, 8, dtype=torch.bfloat16), whole(900, 8, dtype=torch.bfloat16, seed=1)
    check(emulated_kernel, q, keys, torch.tensor([[100, 400]] * 5), 32, changed={"room": 8})
    assert recovered(emulated_kernel) > 5
    check(
        emulated_kernel, q, keys, torch.tensor([[800, 100], [899, 900]] * 2 + [[-1, 10**12]]), 32, changed={"room": 8}
    )


def test_a_buffer_that_overflows_beside_others_that_do_not(emulated_kernel):
    """Brackets of neighbouring columns: room for half a tile's, so that what is left of a bracket may pass its rank by."""
    q, keys = torch.ones(48, 8, dtype=torch.bfloat16), torch.ones(1000, 8, dtype=torch.bfloat16)
    ranks = torch.stack([torch.arange(48) * 20, 999 - torch.arange(48) * 17], 1)
    check(emulated_kernel, q, keys, ranks, 128, changed={"room": 20})
    assert recovered(emulated_kernel) > 10


# Queues of which a sample says nothing, or little: how many of 30 cells (3 rows, 5 pairs of ranks) may be recovered.
READ_AGAIN = {"hard between samples": 15, "easy between samples": 20}


@pytest.mark.parametrize("kind", [*QUEUES, "random"])
def test_few_ranks_are_recovered(kind):
    K, D = 2048, 8
    kernel = emulated("emulated")
    q = whole(3, D, dtype=torch.bfloat16).abs() + 1
    keys = (whole(K, D, seed=5) if kind == "random" else queue(kind, K, D, 256)).to(torch.bfloat16)
    count = 0
    for ranks in ([0, 20], [21, 204], [102, 1023], [1024, 1500], [2000, 2047]):
        check(kernel, q, keys, torch.tensor([ranks] * 3), 256)
        count += recovered(kernel)
    print(f"{kind}: {count} of 30 recovered")
    assert count <= READ_AGAIN.get(kind, 0)


GOALS = [(256, 65_536), (1024, 65_536), (4096, 65_536), (1024, 1_048_576)]


@pytest.mark.parametrize(("B", "K"), GOALS)
def test_plan_at_the_goal_shapes(B, K):
    library = ranking_library("emulated")
    for R in (1, 2):
        plan, fitting = plan_of(library, B, K, R, processors=132)
        assert fitting
        assert plan["sample"] == {65_536: 8192, 1_048_576: 32_768}[K]
        assert plan["workspace"] <= max(128 << 20, 0.25 * 2 * B * K)
        assert -(-B // plan["rows"]) <= 4
        assert -(-plan["rows"] // 128) * plan["splits"] >= 120  # blocks for 132 processors
        # The widest bracket: 4.75 deviations of a median's place in the sample, on either side.
        reach = 4.75 * (plan["sample"] / 4 * (1 - plan["sample"] / K)) ** 0.5
        assert plan["room"] * 4 * plan["splits"] > R * 2 * reach * K / plan["sample"]


def test_a_queue_of_any_length_has_a_plan():
    library = ranking_library("emulated")
    for K in (8192, 8193, 300_000, 2**22 + 1, 2**24, 2**28, 2**31 - 1025):
        for B in (1, 300, 5000):
            plan, fitting = plan_of(library, B, K, 2, processors=132)
            assert plan["sample"] == (0 if K == 8192 else min(32_768, max(2048, 1 << ((K - 1).bit_length() - 3))))
            assert fitting or K > 2**24  # which negmine/backends.py refuses


@pytest.mark.gpu
@pytest.mark.skipif(bool(compiled.CUDA_REFUSAL), reason=compiled.CUDA_REFUSAL or "-")
def test_the_ops_refuse_what_their_kernels_do_not_take():
    q, keys = unit(2, 8, dtype=torch.bfloat16, device="cuda"), unit(9, 8, device="cuda", seed=1)
    ranks = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="both bfloat16 or both float16, got bfloat16 and float32"):
        torch.ops.negmine_cuda.rank_thresholds(q, keys, ranks, *Pool())
    with pytest.raises(RuntimeError, match="both bfloat16 or both float16, got bfloat16 and float32"):
        torch.ops.negmine_cuda.count_negatives(q, keys, *Pool())
    with pytest.raises(RuntimeError, match="ranks must have 2 rows, one for each query"):
        torch.ops.negmine_cuda.rank_thresholds(q, keys.bfloat16(), ranks[:1], *Pool())
