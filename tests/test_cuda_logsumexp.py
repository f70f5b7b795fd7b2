"""logsumexp of the CUDA backend with and without a GPU.

kernels/cuda/logsumexp.cu runs on the CPU under tests/emulator. The same cases run on a GPU, where there is one, and are small
enough for compute-sanitizer.
"""

import ctypes

import pytest
import torch

from negmine import reference
from negmine.ops import compiled, sort_key
from negmine.ops.pool import Pool, usable
from tests import cases, emulate
from tests.cases import MASKS, masks, unit, whole
from tests.compare import exact, rounded
from tests.emulate import PRODUCTS, STORAGE, on_gpu, pointer, pool_arguments, pool_of
from tests.emulated_mining import emulated

PROCESSORS = 6
DTYPES = [torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
RESULTS = ("lse", "mean", "kept", "above")


@pytest.fixture(scope="module")
def libraries():
    """logsumexp by each of PRODUCTS, built when it is asked for."""

    def build(product):
        built = emulate.build("logsumexp", product)
        built.emulated_splits.restype = ctypes.c_int64
        return built

    return build


@pytest.fixture
def library(libraries):
    return libraries("emulated")


def splits_of(library, B, K, D, want_mean, processors=PROCESSORS):
    return library.emulated_splits(*map(ctypes.c_int64, (B, K, D)), want_mean, ctypes.c_int64(processors))


@pytest.fixture(params=PRODUCTS)
def emulated_kernel(request, libraries):
    return emulated_sum(request.param, libraries(request.param))


def emulated_sum(product, library):
    """logsumexp by the emulator."""

    def logsumexp(query, negative_keys, scale, pivot, want_mean, pool, splits=None):
        (B, D), K = query.shape, len(negative_keys)
        splits = splits or splits_of(library, B, K, D, want_mean)
        lse, mean = torch.full((B,), -9.0), torch.full((B if want_mean else 0, D), -9.0)
        kept, above = torch.full((B,), -9), torch.full((B,), -9)
        error = library.emulated_logsumexp(
            *map(ctypes.c_int64, (B, K, D)), pointer(query), pointer(negative_keys),
            ctypes.c_int64(query.stride(0)), ctypes.c_int64(negative_keys.stride(0)), STORAGE[query.dtype],
            pointer(scale), pointer(pivot), want_mean, *pool_arguments(pool), ctypes.c_int64(splits),
            *map(pointer, (lse, mean, kept, above)),
        )  # fmt: skip
        assert error == 0
        return lse, mean, kept, above

    logsumexp.product, logsumexp.boxes = product, library.emulated_boxes
    return logsumexp


def as_declared(summed, mined=None):
    """An emulated logsumexp, and mining where the op mines, with the arguments and results of the declared op at one scale."""

    def logsumexp(query, negative_keys, scales, pivot, want_mean, N, ranks, *pool):
        lse, mean, num_kept, num_above = summed(query, negative_keys, scales[0], pivot, want_mean, pool)
        none = torch.empty(len(query), 0, dtype=torch.int64)
        scores, index = mined(query, negative_keys, N, pool) if N else (none.float(), none)
        return lse[None], mean[None], num_kept, num_above, scores, index, none

    return logsumexp


def gpu_op(query, negative_keys, scale, pivot, want_mean, pool, splits=None):
    q, keys, factor, bound, *rest = [on_gpu(x) for x in (query, negative_keys, scale, pivot, *pool)]
    op = torch.ops.negmine_cuda.logsumexp.default
    lse, mean, num_kept, num_above, *_ = (x.cpu() for x in op(q, keys, factor[None], bound, want_mean, 0, None, *rest))
    return lse[0], mean[0], num_kept, num_above


@pytest.fixture(params=[*PRODUCTS, pytest.param("gpu", marks=(pytest.mark.gpu, pytest.mark.sanitized))])
def kernel(request, libraries):
    """logsumexp on CPU tensors, by the emulator or by the GPU."""
    if request.param in PRODUCTS:
        return emulated_sum(request.param, libraries(request.param))
    if compiled.CUDA_REFUSAL:
        pytest.skip(compiled.CUDA_REFUSAL)
    return gpu_op


def allowed_of(q, keys, pool, given):
    """The pool of the definition, without and with bounds: (B, K) each."""
    same, (lower, upper) = pool[-1], pool[5:7]
    masked = usable(cases.pool_of(q, keys, given)._replace(same_label=same), q, keys)
    masked = torch.ones(len(q), len(keys), dtype=torch.bool) if masked is None else masked
    scores, columns = q.float() @ keys.float().T, torch.arange(len(keys))
    inside = masked.clone()
    for bound, sign in ((lower, 1), (upper, -1)):
        if bound is not None:
            score, index = (x[:, None] for x in sort_key.unpack(bound))
            inside &= (sign * scores > sign * score) | ((scores == score) & (sign * columns <= sign * index))
            inside &= (bound != sort_key.NOWHERE)[:, None]
    return masked, inside


def weights(q, keys, scale, lse, inside):
    """p (B, K) of the definition, zeros where a pool is empty."""
    return torch.where(inside, (scale * (q @ keys.T) - lse[:, None]).exp(), 0.0)


def check(
    kernel,
    q,
    keys,
    scale=5.0,
    want_mean=True,
    pivot=None,
    splits=None,
    same_label=False,
    lower=None,
    upper=None,
    **given,
):
    """The kernel against the definition in float64. Finite scores are asked for; columns that a (K,) mask hides may be NaN."""
    pool = pool_of(q, keys, same_label=same_label, lower=lower, upper=upper, **given)
    lse, mean, kept, above = kernel(q, keys, torch.tensor(scale), pivot, want_mean, pool, splits)
    keys = keys.nan_to_num()
    masked, inside = allowed_of(q, keys, pool, given)
    exact("kept", kept, inside.sum(1))
    higher = torch.zeros_like(inside) if pivot is None else (q.float() @ keys.float().T > pivot[:, None]) & masked
    exact("above", above, higher.sum(1))
    temperature = torch.tensor(scale).double().reciprocal()
    truth, plain = (
        reference.logsumexp(q.to(dtype), keys.to(dtype), temperature.to(dtype), inside)
        for dtype in (torch.float64, torch.float32)
    )
    largest = float((scale * (q.double() @ keys.double().T)).abs().max()) if keys.numel() and q.numel() else 0.0
    rounded("lse", lse, truth, plain, largest)
    assert mean.shape == (len(q) if want_mean else 0, q.shape[1])
    if want_mean and q.numel():
        p = weights(q.double(), keys.double(), scale, truth, inside)  # (B, K)
        want, size = p @ keys.double(), p @ keys.double().abs()  # (B, D)
        # Each p rounded to the storage, or to its smallest number, of those whose largest is at least 1.
        unit_roundoff = torch.finfo(q.dtype).eps / 2
        least = torch.finfo(q.dtype).smallest_normal * torch.finfo(q.dtype).eps
        each = unit_roundoff * size + least * inside.double() @ keys.double().abs()
        squares = q.double().square().sum(1, keepdim=True).clamp_min(1e-30)
        along = q.double().abs() / squares * (q.double().abs() * each).sum(1, keepdim=True)  # what is put right
        slack = 1e-6 * max(largest, 1.0) * float(size.max())
        assert ((mean - want).abs() <= each + along + slack).all(), (
            f"mean off by {float((mean - want).abs().max()):.3g}"
        )
        plainly = weights(q.float(), keys.float(), scale, plain, inside) @ keys.float()
        dots = [(q.to(m.dtype) * m).sum(1) for m in (mean, want, plainly)]
        terms = (q.double().abs() * size).sum(1)
        rounded("mean along the query", *dots, largest, terms)
        assert (mean[~inside.any(1)] == 0).all()
    return lse, mean, kept, above


SHAPES = [  # B, K, D
    (1, 1, 1),
    (0, 9, 7),
    (2, 0, 7),
    (3, 5, 7),  # odd D
    (33, 130, 70),  # B past a warp, K past two tiles, D past 64
    (3, 300, 200),  # wide D
    (130, 400, 16),  # B past a block
    (4, 1000, 64),
    (70, 200, 128),
    (65, 96, 256),  # B past a block of wide queries
]


@each_dtype
@pytest.mark.parametrize("want_mean", [True, False], ids=["mean", "lse alone"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(kernel, shape, want_mean, dtype):
    B, K, D = shape
    q, keys = unit(B, D, dtype=dtype), unit(K, D, dtype=dtype, seed=1)
    check(kernel, q, keys, 14.0, want_mean, pivot=torch.full((B,), 0.1))


@pytest.mark.parametrize("want_mean", [True, False], ids=["mean", "lse alone"])
@pytest.mark.parametrize("D", [20, 70, 140])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kernel, kind, D, want_mean):
    """Of small integers: what is kept and what is above are exact, ties with the pivot too."""
    B, K = 35, 200
    q, keys = whole(B, D, dtype=torch.bfloat16), whole(K, D, dtype=torch.bfloat16, seed=1)
    given = masks(kind, B, K)
    if kind == "columns":
        keys[~given["negative_mask"]] = torch.nan  # never read
    check(kernel, q, keys, 0.05, want_mean, pivot=torch.arange(B).float() - 17, **given)


@pytest.mark.parametrize(("D", "dtype"), [(20, torch.bfloat16), (100, torch.float16), (200, torch.bfloat16)], ids=str)
def test_hidden_columns_may_hold_anything(kernel, D, dtype):
    """Keys that are not finite reach only those queries that see them."""
    B, K = 70, 200
    q, keys = whole(B, D, dtype=dtype), whole(K, D, dtype=dtype, seed=1)
    spoiled = keys.clone()
    spoiled[3], spoiled[70:75, 1], spoiled[150:199, ::2] = torch.nan, torch.inf, -torch.inf
    bad = ~spoiled.isfinite().all(1)  # (K,)
    even = (torch.arange(B) % 2 == 0)[:, None]  # (B, 1)
    for given in (
        {"negative_mask": ~(bad & even)},
        {"query_ids": torch.arange(B) % 2, "negative_ids": torch.where(bad, 0, 2)},
    ):
        pool, hides = pool_of(q, keys, **given), slice(0, B, 2)  # even queries, which see none of them
        got, want = (kernel(q, each, torch.tensor(0.05), torch.zeros(B), True, pool) for each in (spoiled, keys))
        for name, a, b in zip(RESULTS, got, want, strict=True):
            exact(name, a[hides], b[hides])
        assert "negative_ids" not in given or got[0][1::2].isnan().all()


@pytest.mark.parametrize("D", [20, 70, 140])
def test_same_labels_and_bounds(kernel, D):
    B, K = 9, 300
    q, keys = whole(B, D, dtype=torch.bfloat16), whole(K, D, dtype=torch.bfloat16, seed=1)
    check(kernel, q, keys, 0.1, same_label=True, **masks("labels", B, K))
    places = sort_key.pack(q.float() @ keys.float().T, torch.arange(K)).sort(1, descending=True).values  # (B, K)
    upper, lower = places[:, 7].contiguous(), places[:, 30].contiguous()  # ties lie on both sides of each
    upper[0], lower[1], upper[2], lower[3] = sort_key.NOWHERE, 2**63 - 1, lower[2] - 1, sort_key.NOWHERE
    upper[4] = sort_key.pack(torch.tensor(torch.inf), 0)
    lower[5] = sort_key.pack(torch.tensor(-torch.inf), sort_key.LAST_INDEX)
    pivot = sort_key.unpack(places[:, 15])[0].contiguous()
    for bounds in ({"upper": upper}, {"lower": lower}, {"lower": lower, "upper": upper}):
        check(kernel, q, keys, 0.1, pivot=pivot, **bounds)  # a bound that is no place keeps nothing: its score is NaN
    check(kernel, q, keys, 0.1, pivot=pivot, lower=lower, upper=upper, **masks("everything", B, K))


@pytest.mark.parametrize("splits", [1, 2, 7, 40])  # of 16 tiles
def test_any_split_of_the_queue_adds_up(emulated_kernel, splits):
    q, keys = unit(5, 64, dtype=torch.bfloat16), unit(1000, 64, dtype=torch.bfloat16, seed=1)
    check(emulated_kernel, q, keys, 14.0, splits=splits, pivot=torch.zeros(5))
    check(emulated_kernel, q, keys, 14.0, splits=splits, **masks("pairs", 5, 1000))


@each_dtype
@pytest.mark.parametrize("scale", [1e-30, -3.0, 100.0, 1e4])
def test_scales(kernel, scale, dtype):
    """Temperatures from none to one key alone; the shift moves by more than an exponent holds."""
    q, keys = unit(5, 70, dtype=dtype), unit(300, 70, dtype=dtype, seed=1)
    check(kernel, q, keys, scale)
    check(kernel, q, keys, scale, **masks("ids", 5, 300))


@pytest.mark.parametrize("given", [{}, masks("pairs", 5, 300)], ids=["whole", "pairs"])
def test_scale_zero_is_a_plain_mean(kernel, given):
    q, keys = whole(5, 16, dtype=torch.bfloat16), whole(300, 16, dtype=torch.bfloat16, seed=1)
    pool = pool_of(q, keys, **given)
    lse, mean, kept, _ = kernel(q, keys, torch.tensor(0.0), None, True, pool)
    inside = given.get("negative_mask", torch.ones(5, 300, dtype=torch.bool)).float()
    torch.testing.assert_close(lse, inside.sum(1).log(), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean, inside @ keys.float() / inside.sum(1, keepdim=True), rtol=1e-5, atol=1e-5)
    exact("kept", kept, inside.sum(1).long())


@pytest.mark.parametrize("slope", [1, 0, -1], ids=["rising", "equal", "falling"])
def test_running_maxima_that_change(kernel, slope):
    """Scores from -120 to 120 along the queue: the shift moves at every chunk, never, or once."""
    K = 640
    q, keys = torch.zeros(3, 8, dtype=torch.bfloat16), torch.zeros(K, 8, dtype=torch.bfloat16)
    q[:, 0] = torch.tensor([1.0, -1.0, 0.5])
    keys[:, 0] = slope * torch.linspace(-120, 120, K) + (slope == 0)
    keys[:, 1] = 1
    for splits in (1, 3):
        check(kernel, q, keys, 1.0, splits=splits)


@pytest.mark.parametrize("want_mean", [True, False], ids=["mean", "lse alone"])
def test_nan_and_infinite_scores(kernel, want_mean):
    q, keys = whole(6, 12, dtype=torch.bfloat16).abs() + 1, whole(150, 12, dtype=torch.bfloat16, seed=1)
    pool, scale = pool_of(q, keys), torch.tensor(0.1)
    want = kernel(q, keys, scale, None, want_mean, pool)
    bad = q.clone()
    bad[2] = torch.nan
    lse, _, kept, _ = kernel(bad, keys, scale, None, want_mean, pool)  # NaN stays in its row
    exact("lse", lse, want[0].masked_fill(torch.arange(6) == 2, torch.nan))
    exact("kept", kept, torch.full((6,), 150))
    bad = keys.clone()
    bad[77] = torch.nan
    lse, _, kept, _ = kernel(q, bad, scale, torch.zeros(6), want_mean, pool)
    assert lse.isnan().all()
    exact("kept", kept, torch.full((6,), 150))
    least = sort_key.pack(torch.full((6,), -torch.inf), sort_key.LAST_INDEX)
    lse, _, kept, _ = kernel(q, bad, scale, None, want_mean, pool._replace(lower=least))
    rest = (torch.arange(150) != 77).expand(6, 150)
    exact("kept", kept, rest.sum(1))
    exact("bounded", lse, kernel(q, keys, scale, None, want_mean, pool_of(q, keys, negative_mask=rest.contiguous()))[0])
    bad[77] = -torch.inf
    exact("no weight", kernel(q, bad, scale, None, want_mean, pool)[0], lse)
    lse, _, kept, _ = kernel(q, torch.full_like(keys, -torch.inf), scale, None, want_mean, pool)
    exact("nothing weighs", lse, torch.full((6,), -torch.inf))
    exact("kept", kept, torch.full((6,), 150))
    bad[77] = torch.inf
    exact("all the weight", kernel(q, bad, scale, None, want_mean, pool)[0], torch.full((6,), torch.inf))
    assert kernel(q, keys, torch.tensor(torch.nan), None, want_mean, pool)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_a_score_of_minus_infinity_leaves_the_mean(kernel, dtype):
    """Of finite keys. Such a row's mean is as near along the query as its products, whose p are rounded, are elsewhere."""
    q, keys = whole(6, 12, dtype=dtype).abs() + 1, whole(150, 12, dtype=dtype, seed=1)
    scale, pool = torch.tensor(0.1), pool_of(q, keys)
    q[2, 0], keys[77, 0] = 3e38, -3e38
    keys[torch.arange(150) != 77, 0] = 0
    lse, mean, kept, _ = kernel(q, keys, scale, None, True, pool)
    exact("kept", kept, torch.full((6,), 150))
    scores = 0.1 * (q.double() @ keys.double().T)  # (B, K)
    scores[2, 77] = -torch.inf
    torch.testing.assert_close(lse, scores.logsumexp(1).float(), rtol=1e-5, atol=1e-5)
    p = scores.softmax(1)[[2]]
    assert ((mean[2] - p @ keys.double()).abs() <= torch.finfo(dtype).eps * (p @ keys.double().abs()) + 1e-6).all()


@pytest.mark.parametrize(("start", "masked", "tiles"), [(0, False, 4), (8, False, 4), (1, False, 0), (0, True, 0)])
@pytest.mark.parametrize("want_mean", [True, False], ids=["mean", "lse alone"])
def test_sm90a_copies_whole_tiles_where_rows_allow(libraries, start, masked, tiles, want_mean):
    kernel = emulated_sum("emulated_sm90a", libraries("emulated_sm90a"))
    q, wide = unit(3, 72, dtype=torch.bfloat16), torch.empty(300, 88, dtype=torch.bfloat16)
    keys, before = wide[:, start : start + 72].copy_(unit(300, 72, seed=1)), kernel.boxes()
    check(kernel, q, keys, 14.0, want_mean, splits=2, **(masks("columns", 3, 300) if masked else {}))
    assert kernel.boxes() - before == 2 * tiles  # slabs


@pytest.mark.parametrize("D", [24, 27, 100])
def test_strides_change_no_bit(kernel, D):
    q, keys = unit(9, D, dtype=torch.bfloat16), unit(200, D, dtype=torch.bfloat16, seed=1)
    plain = kernel(q, keys, torch.tensor(5.0), None, True, pool_of(q, keys))
    for width in (D + 8, D + 5):
        wide = torch.full((200, width), torch.nan, dtype=torch.bfloat16)
        for start in (0, width - D):
            wide[:, start : start + D] = keys
            view = wide[:, start : start + D]
            got = kernel(q, view, torch.tensor(5.0), None, True, pool_of(q, view))
            for name, a, b in zip(RESULTS, got, plain, strict=True):
                exact(name, a, b)


@pytest.mark.parametrize("rising", [False, True])
def test_a_row_does_not_depend_on_the_rows_beside_it(emulated_kernel, rising):
    """Not where scores rise along the queue either, and every row's shift moves at its own columns."""
    q, keys = unit(140, 48, dtype=torch.bfloat16), unit(500, 48, dtype=torch.bfloat16, seed=1)
    if rising:
        q[:, 0], keys[:, 0] = torch.linspace(0.1, 1, 140), torch.linspace(-4, 4, 500)
    every = emulated_kernel(q, keys, torch.tensor(20.0), None, True, pool_of(q, keys), splits=3)
    rows = torch.tensor([139, 3, 17])
    some = emulated_kernel(q[rows], keys, torch.tensor(20.0), None, True, pool_of(q[rows], keys), splits=3)
    for name, a, b in zip(RESULTS, some, every, strict=True):
        exact(name, a, b[rows])


@pytest.mark.parametrize(("D", "dtype"), [(48, torch.bfloat16), (100, torch.float16), (200, torch.bfloat16)], ids=str)
def test_scores_are_the_bits_of_mine_hardest(emulated_kernel, D, dtype):
    """A window that ends at a place which mining found keeps exactly what is ranked before it."""
    q, keys = unit(9, D, dtype=dtype), unit(300, D, dtype=dtype, seed=1)
    pool = pool_of(q, keys)
    places = sort_key.pack(*emulated(emulated_kernel.product)(q, keys, 200, pool))  # (B, 200)
    for rank in (0, 17, 199):
        window = pool._replace(lower=places[:, rank].contiguous(), upper=places[:, 0].contiguous())
        for want_mean in (True, False):
            kept = emulated_kernel(q, keys, torch.tensor(5.0), None, want_mean, window)[2]
            exact("kept", kept, torch.full((9,), rank + 1))


GOALS = [(256, 65_536, 128), (1024, 65_536, 128), (4096, 65_536, 128), (1024, 2**20, 256)]


@pytest.mark.parametrize(("B", "K", "D"), GOALS)
def test_plan_at_the_goal_shapes(library, B, K, D):
    """Two blocks on each of 132 processors, as near as whole parts of the queue come; a part is two tiles at least."""
    splits = splits_of(library, B, K, D, True, 132)
    blocks = splits * -(-B // (128 if D <= 128 else 64))
    assert 0.9 * 264 <= blocks <= 264
    assert splits_of(library, 1, 1000, D, True, 132) == 8
    assert splits_of(library, 0, 0, D, True, 132) == splits_of(library, 10**6, K, D, True, 132) == 1


@pytest.mark.gpu
@pytest.mark.skipif(bool(compiled.CUDA_REFUSAL), reason=compiled.CUDA_REFUSAL or "-")
@pytest.mark.parametrize(
    ("dtypes", "D", "said"),
    [
        ((torch.float32, torch.float32), 8, "both bfloat16 or both float16, got float32 and float32"),
        ((torch.bfloat16, torch.float16), 8, "got bfloat16 and float16"),
        ((torch.bfloat16, torch.bfloat16), 300, "D must be at most 256"),
    ],
)
def test_the_op_refuses_what_its_kernels_do_not_take(dtypes, D, said):
    q, keys = unit(2, D, dtype=dtypes[0], device="cuda"), unit(9, D, dtype=dtypes[1], device="cuda")
    with pytest.raises(RuntimeError, match=said):
        torch.ops.negmine_cuda.logsumexp(q, keys, torch.ones(1, device="cuda"), None, True, 0, None, *Pool())
