"""mine_hardest of the CUDA backend with and without a GPU.

kernels/cuda/mine_hardest.cu runs on the CPU under tests/emulator, fragments of tensor cores and late copies included. The same
cases run on a GPU, where there is one, and are small enough for compute-sanitizer. On the CPU the sample is smaller, so that a
short queue takes the path of a long one: cut, scan, check, exact search.
"""

import pytest
import torch

from negmine import reference
from negmine.ops import compiled, sort_key
from negmine.ops.pool import Pool
from tests.cases import MASKS, dense_mask, masks, unit, whole
from tests.compare import exact, selected
from tests.emulate import PRODUCTS, on_gpu, pool_of
from tests.emulated_mining import emulated, mining_library, plan_of
from tests.queues import QUEUES, queue

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(params=PRODUCTS)
def emulated_kernel(request):
    return emulated(request.param)


@pytest.fixture
def library():
    return mining_library("emulated")


def gpu_op(query, negative_keys, N, pool, least_sample=2048, **changed):
    tensors = [on_gpu(x) for x in (query, negative_keys, *pool)]
    found = torch.ops.negmine_cuda.mine_hardest.default(*tensors[:2], N, False, *tensors[2:])
    return tuple(x.cpu() for x in found[:2])


@pytest.fixture(params=[*PRODUCTS, pytest.param("gpu", marks=(pytest.mark.gpu, pytest.mark.sanitized))])
def kernel(request):
    """mine_hardest on CPU tensors, by the emulator or by the GPU."""
    if request.param in PRODUCTS:
        return emulated(request.param)
    if compiled.CUDA_REFUSAL:
        pytest.skip(compiled.CUDA_REFUSAL)
    return gpu_op


def check_exact(
    kernel, query, keys, N, least_sample=2048, same_label=False, lower=None, upper=None, changed=None, **given
):
    """Of small integers: bit-equal to the reference, ties included."""
    pool = pool_of(query, keys, same_label=same_label, lower=lower, upper=upper, **given)
    got = kernel(query, keys, N, pool, least_sample, **(changed or {}))
    allowed = dense_mask(query, keys, given)
    if same_label:
        allowed = given["query_labels"][:, None] == given["negative_labels"][None, :]
    if lower is not None or upper is not None:
        places = sort_key.pack(query.float() @ keys.float().T, torch.arange(len(keys)))
        inside = torch.ones_like(places, dtype=torch.bool)
        inside &= True if lower is None else places >= lower[:, None]
        inside &= True if upper is None else places <= upper[:, None]
        allowed = inside if allowed is None else inside & allowed
    want = reference.mine_hardest(query.float(), keys.float(), N, allowed)
    exact("scores", got[0], want[0])
    exact("index", got[1], want[1])
    return got


def recovered(kernel):
    """Rows of the last call that were done again; None on a GPU, which does not say."""
    return int((kernel.recovered >= 0).sum()) if hasattr(kernel, "recovered") else None


SHAPES = [  # B, K, D, N, least sample
    (1, 1, 1, 1, 2048),
    (0, 9, 7, 3, 2048),
    (2, 0, 7, 3, 2048),
    (3, 5, 7, 9, 2048),  # fewer candidates than N, odd D
    (33, 130, 70, 8, 2048),  # B past a warp, K past two tiles, D past 64
    (3, 300, 200, 5, 32),  # wide D
    (130, 400, 16, 24, 32),  # B past a block
    (4, 1000, 64, 40, 32),
    (2, 600, 130, 300, 32),  # N near K
    (1, 900, 256, 1, 32),
]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_exact_on_integers(kernel, shape, dtype):
    B, K, D, N, least_sample = shape
    check_exact(kernel, whole(B, D, dtype=dtype), whole(K, D, dtype=dtype, seed=1), N, least_sample)


@each_dtype
def test_is_right_on_real_vectors_without_recovery(kernel, dtype):
    q, keys = unit(20, 64, dtype=dtype), unit(1500, 64, dtype=dtype, seed=1)
    scores, index = kernel(q, keys, 30, pool_of(q, keys), 64)
    selected("real", scores, index, q.double() @ keys.double().T)
    assert recovered(kernel) in (0, None)


def test_buffers_are_cleared_of_what_a_row_does_not_see(kernel):
    """One column in ten is in the pool: ten times as many reach the cut as there is room for, and no row is recovered."""
    q, keys = unit(9, 32, dtype=torch.bfloat16), unit(3000, 32, dtype=torch.bfloat16, seed=1)
    allowed = torch.rand(9, 3000, generator=torch.Generator().manual_seed(2)) < 0.1
    scores, index = kernel(q, keys, 20, pool_of(q, keys, negative_mask=allowed), 64)
    selected("masked", scores, index, q.double() @ keys.double().T, allowed)
    assert recovered(kernel) in (0, None)


@pytest.mark.parametrize("least_sample", [32, 2048], ids=["sampled", "short"])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kernel, kind, least_sample):
    B, K = 35, 500
    q, keys = whole(B, 20, dtype=torch.bfloat16), whole(K, 20, dtype=torch.bfloat16, seed=1)
    given = masks(kind, B, K)
    if kind == "columns":
        keys[~given["negative_mask"]] = torch.nan  # never read
    check_exact(kernel, q, keys.nan_to_num(), 12, least_sample, **given)
    pool = pool_of(q, keys, **given)
    for name, got, want in zip(
        ("scores", "index"), kernel(q, keys, 12, pool, least_sample), kernel(q, keys.nan_to_num(), 12, pool, least_sample),
        strict=True,
    ):  # fmt: skip
        exact(name, got, want)


@pytest.mark.parametrize("least_sample", [32, 2048], ids=["sampled", "short"])
def test_same_labels_and_bounds(kernel, least_sample):
    B, K, N = 9, 500, 12
    q, keys = whole(B, 20, dtype=torch.bfloat16), whole(K, 20, dtype=torch.bfloat16, seed=1)
    labels = masks("labels", B, K)
    check_exact(kernel, q, keys, N, least_sample, same_label=True, **labels)
    places = sort_key.pack(q.float() @ keys.float().T, torch.arange(K)).sort(1, descending=True).values  # (B, K)
    upper, lower = places[:, 7].contiguous(), places[:, 30].contiguous()  # ties lie on both sides of each
    upper[0], lower[1], upper[2], lower[3] = sort_key.NOWHERE, 2**63 - 1, lower[2] - 1, sort_key.NOWHERE
    upper[4] = sort_key.pack(torch.tensor(torch.inf), 0)
    # A bound that is no place keeps nothing: its score is NaN.
    for bounds in ({"upper": upper}, {"lower": lower}, {"lower": lower, "upper": upper}):
        pool = pool_of(q, keys, **bounds)
        scores, index = kernel(q, keys, N, pool, least_sample)
        for b in range(B):
            limits = {name: int(x[b]) for name, x in bounds.items()}
            kept = [p for p in places[b].tolist() if limits.get("lower", p) <= p <= limits.get("upper", p)]
            if {sort_key.NOWHERE, 2**63 - 1} & set(limits.values()):
                kept = []
            want = sort_key.unpack(torch.tensor((kept + [sort_key.NOWHERE] * N)[:N]))
            exact(f"scores {b}", scores[b], want[0])
            exact(f"index {b}", index[b], want[1])
    check_exact(kernel, q[4:], keys, N, least_sample, lower=lower[4:], upper=upper[4:], **masks("ids", B - 4, K))


@pytest.mark.parametrize("kind", QUEUES)
def test_adversarial_queues(kernel, kind):
    B, K, D, N = 5, 1000, 16, 40
    q = whole(B, D, dtype=torch.bfloat16).abs() + 1
    keys = queue(kind, K, D, 64).to(torch.bfloat16)
    check_exact(kernel, q, keys, N, 64)
    if kind == "hard between samples":
        assert recovered(kernel) in (B, None)
    check_exact(kernel, q, keys, N, 64, **masks("pairs", B, K))


# Queues of which a sample says nothing: how many of 8 rows may be recovered.
READ_AGAIN = {"hard between samples": 8, "easy between samples": 8}


@pytest.mark.parametrize("kind", [*QUEUES, "random"])
def test_few_rows_are_recovered(kind):
    K, D, N = 2048, 8, 40
    kernel = emulated("emulated")
    q = whole(8, D, dtype=torch.bfloat16).abs() + 1
    keys = (unit(K, D, seed=5) if kind == "random" else queue(kind, K, D, 256)).to(torch.bfloat16)
    kernel(q, keys, N, pool_of(q, keys), 256)
    print(f"{kind}: {recovered(kernel)} of 8 recovered")
    assert recovered(kernel) <= READ_AGAIN.get(kind, 0)


def test_nan_and_infinite_scores(kernel):
    q, keys = whole(6, 12, dtype=torch.bfloat16), whole(700, 12, dtype=torch.bfloat16, seed=1)
    keys[5::7] = torch.nan
    keys[::11] *= torch.inf  # infinities, and NaN from 0 * inf
    q[2] = torch.nan
    for least_sample in (32, 2048):
        check_exact(kernel, q, keys, 20, least_sample)
        check_exact(kernel, q, keys, 600, 2048)  # past the end of what is no NaN


def test_negative_zero_is_zero(kernel):
    """-0.0 and +0.0 tie, so their columns come in the order of their index."""
    q, keys = torch.full((1, 8), -1.0, dtype=torch.bfloat16), torch.zeros(300, 8, dtype=torch.bfloat16)
    keys[::3] = -0.0
    for least_sample in (32, 2048):
        scores, index = kernel(q, keys, 9, pool_of(q, keys), least_sample)
        exact("index", index, torch.arange(9)[None])
        assert not scores.signbit().any()


@pytest.mark.parametrize("D", [24, 27])
def test_strides_change_no_bit(kernel, D):
    q, keys = unit(9, D, dtype=torch.bfloat16), unit(400, D, dtype=torch.bfloat16, seed=1)
    plain = kernel(q, keys, 15, pool_of(q, keys), 32)
    for width in (D + 8, D + 5):
        wide = torch.full((400, width), torch.nan, dtype=torch.bfloat16)
        for start in (0, width - D):
            wide[:, start : start + D] = keys
            view = wide[:, start : start + D]
            for name, got, want in zip(
                ("scores", "index"), kernel(q, view, 15, pool_of(q, view), 32), plain, strict=True
            ):
                exact(name, got, want)


def test_a_score_does_not_depend_on_the_batch_the_queue_or_the_pass(kernel):
    q, keys = unit(40, 48, dtype=torch.bfloat16), unit(700, 48, dtype=torch.bfloat16, seed=1)
    scores, index = kernel(q, keys, 700, pool_of(q, keys))
    table = torch.full((40, 700), torch.nan).scatter(1, index, scores)  # (B, K)
    rows, columns = torch.tensor([39, 3, 17]), torch.arange(650, 20, -3)
    again, chosen = kernel(q[rows], keys[columns], 30, pool_of(q[rows], keys[columns]), 32)
    exact("scores", again, table[rows].gather(1, columns[chosen]))


def test_rows_in_chunks(emulated_kernel):
    """What a long batch does where its buffers would pass the budget."""
    q, keys = whole(300, 8, dtype=torch.bfloat16), whole(200, 8, dtype=torch.bfloat16, seed=1)
    check_exact(emulated_kernel, q, keys, 9, 32, changed={"rows": 128}, **masks("everything", 300, 200))


def test_buffers_that_overflow_are_found_out(emulated_kernel):
    """Room for what one chunk of keys may add and no more: rows are recovered, and nothing is written past a buffer."""
    q, keys = whole(5, 8, dtype=torch.bfloat16), whole(900, 8, dtype=torch.bfloat16, seed=1)
    check_exact(emulated_kernel, q, keys, 50, 32, changed={"room": 8})
    assert recovered(emulated_kernel) == 5
    check_exact(emulated_kernel, q, keys, 50, 32, changed={"capacity": 50})
    assert recovered(emulated_kernel) > 0


@pytest.mark.gpu
@pytest.mark.skipif(bool(compiled.CUDA_REFUSAL), reason=compiled.CUDA_REFUSAL or "-")
@pytest.mark.parametrize(
    ("dtypes", "K", "D", "N", "said"),
    [
        ((torch.float32, torch.float32), 9, 8, 2, "both bfloat16 or both float16, got float32 and float32"),
        ((torch.bfloat16, torch.float16), 9, 8, 2, "got bfloat16 and float16"),
        ((torch.bfloat16, torch.bfloat16), 9, 300, 2, "D must be at most 256"),
        ((torch.bfloat16, torch.bfloat16), 9, 8, -1, "N must not be negative, got -1"),
        ((torch.bfloat16, torch.bfloat16), 20_000, 8, 15_000, "N = 15000 of K = 20000 takes more shared memory"),
    ],
)
def test_the_op_refuses_what_its_kernels_do_not_take(dtypes, K, D, N, said):
    q, keys = unit(2, D, dtype=dtypes[0], device="cuda"), unit(K, D, dtype=dtypes[1], device="cuda")
    with pytest.raises(RuntimeError, match=said):
        torch.ops.negmine_cuda.mine_hardest(q, keys, N, False, *Pool())


GOALS = [(256, 65_536), (1024, 65_536), (4096, 65_536), (1024, 1_048_576)]


@pytest.mark.parametrize(("B", "K"), GOALS)
def test_plan_at_the_goal_shapes(library, B, K):
    plan, fitting = plan_of(library, B, K, 1024, processors=132)
    assert fitting
    assert plan["sample"] == {65_536: 4096, 1_048_576: 16_384}[K]
    assert plan["sample_rank"] == {65_536: 104, 1_048_576: 38}[K]
    assert plan["workspace"] <= max(144 << 20, 0.08 * 2 * B * K)
    assert plan["rows"] * -(-B // plan["rows"]) >= B
    row_tiles = -(-plan["rows"] // 128)
    if K == 65_536 and B > 256:  # two blocks for each of 132 processors, as far as they divide into whole tiles of rows
        assert row_tiles * plan["splits"] > 0.95 * 2 * 132
    assert row_tiles * plan["splits"] >= 120
    expected = (plan["sample_rank"] + 1) * K / plan["sample"]
    assert plan["room"] * 4 * plan["splits"] > 2 * expected > 2 * 1024


@pytest.mark.parametrize("K", [2**22 + 1, 2**23, 2**30 + 1, 2**31 - 1025])
def test_a_queue_of_any_length_has_a_plan(library, K):
    """The sample is never longer than what the threads of a row's cut hold; what fits no block is refused."""
    for N in (1, 2048):
        plan, fitting = plan_of(library, 300, K, N, processors=132)
        assert plan["sample"] == 32_768
        assert fitting == (8 * (plan["capacity"] + N) + 1056 <= 99 << 10)
    assert not plan_of(library, 1, K, 2**28)[1]  # whose bytes pass 2^31


def test_every_plan_that_the_chooser_admits_fits(library):
    for K in (8193, 10_000, 65_536, 300_000, 2**19, 2**20, 2**22):
        for N in (1, 7, 1024, 2048, 4096):
            if N <= 2048 or K <= 2**19:
                for B in (1, 300, 5000):
                    plan, fitting = plan_of(library, B, K, N, processors=132)
                    assert fitting, (B, K, N)
                    assert plan["workspace"] <= 1 << 30, (B, K, N)
                    assert 4 * plan["splits"] * plan["room"] >= min(N, K)
