"""logsumexp_grad_keys of the CUDA backend with and without a GPU.

kernels/cuda/logsumexp_grad_keys.cu runs on the CPU under tests/emulator. The same cases run on a GPU, where there is one, and are
small enough for compute-sanitizer.
"""

import ctypes

import pytest
import torch

import negmine
from negmine.ops import backends, compiled, sort_key
from tests import emulate
from tests.cases import MASKS, masks, negatives, unit, whole
from tests.compare import exact, rounded
from tests.emulate import PRODUCTS, STORAGE, on_gpu, pointer, pool_arguments, pool_of
from tests.emulated_mining import emulated
from tests.test_cuda_logsumexp import allowed_of, as_declared, emulated_sum

PROCESSORS = 6
DTYPES = [torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
LOST = 2.0**-40  # of the largest weight: what a weighted probability loses at most where fp16 has no smaller number


@pytest.fixture(scope="module")
def libraries():
    """logsumexp_grad_keys, or another source, by each of PRODUCTS, built when it is asked for."""

    def build(product, source="logsumexp_grad_keys"):
        built = emulate.build(source, product)
        built.emulated_splits.restype = ctypes.c_int64
        return built

    return build


@pytest.fixture
def library(libraries):
    return libraries("emulated")


def splits_of(library, B, K, D, processors=PROCESSORS):
    return library.emulated_splits(*map(ctypes.c_int64, (B, K, D, processors)))


def emulated_grad(product, library):
    """logsumexp_grad_keys by the emulator."""

    def logsumexp_grad_keys(query, negative_keys, scale, lse, weight, pool, splits=None, backwards=False):
        (B, D), K = query.shape, len(negative_keys)
        splits = splits or splits_of(library, B, K, D)
        grad = torch.full((K, D), -9.0)
        error = library.emulated_logsumexp_grad_keys(
            *map(ctypes.c_int64, (B, K, D)), pointer(query), pointer(negative_keys),
            ctypes.c_int64(query.stride(0)), ctypes.c_int64(negative_keys.stride(0)), STORAGE[query.dtype],
            *map(pointer, (scale, lse, weight)), *pool_arguments(pool), ctypes.c_int64(splits),
            ctypes.c_bool(backwards), pointer(grad),
        )  # fmt: skip
        assert error == 0
        return grad

    logsumexp_grad_keys.product = product
    return logsumexp_grad_keys


def gpu_op(query, negative_keys, scale, lse, weight, pool, splits=None, backwards=False):
    tensors = [on_gpu(x) for x in (query, negative_keys, scale, lse, weight, *pool)]
    return torch.ops.negmine_cuda.logsumexp_grad_keys.default(*tensors).cpu()


@pytest.fixture(params=PRODUCTS)
def emulated_kernel(request, libraries):
    return emulated_grad(request.param, libraries(request.param))


@pytest.fixture(params=[*PRODUCTS, pytest.param("gpu", marks=(pytest.mark.gpu, pytest.mark.sanitized))])
def kernel(request, libraries):
    """logsumexp_grad_keys on CPU tensors, by the emulator or by the GPU."""
    if request.param in PRODUCTS:
        return emulated_grad(request.param, libraries(request.param))
    if compiled.CUDA_REFUSAL:
        pytest.skip(compiled.CUDA_REFUSAL)
    return gpu_op


def check(kernel, q, keys, scale=5.0, weight=None, splits=None, same_label=False, lower=None, upper=None, **given):
    """The kernel against the definition in float64, of the lse of the pool. Columns that a (K,) mask hides may be NaN."""
    pool = pool_of(q, keys, same_label=same_label, lower=lower, upper=upper, **given)
    B = len(q)
    weight = torch.linspace(-1, 2, B) if weight is None else weight
    kept = keys.nan_to_num()
    inside = allowed_of(q, kept, pool, given)[1]  # (B, K)
    wide, narrow = q.double(), kept.double()
    logits = scale * (wide @ narrow.T)
    lse = torch.logsumexp(logits.masked_fill(~inside, -torch.inf), 1)  # (B,)
    got = kernel(q, keys, torch.tensor(scale), lse.float(), weight, pool, splits)
    assert got.shape == keys.shape
    assert got.dtype == torch.float32
    p = torch.where(inside, (logits - lse[:, None]).exp(), 0.0) * weight.double()[:, None]  # (B, K)
    want, size = p.T @ wide, p.abs().T @ wide.abs()  # (K, D)
    if not got.numel() or not B:
        return exact("grad", got, want.float())
    # A probability rounded to the storage, the roundings of its logit, and what is too small for fp16.
    steepest = abs(scale) * float((wide.abs() @ narrow.abs().T).max())
    each = torch.finfo(q.dtype).eps / 2 + 1e-6 * max(steepest, 1.0)
    least = LOST * float(weight.abs().max()) * inside.double().T @ wide.abs()
    error = (got - want).abs()
    assert (error <= each * size + least).all(), f"off by {float((error - each * size - least).max()):.3g}"
    return got


@pytest.mark.parametrize(("D", "dtype"), [(20, torch.bfloat16), (100, torch.float16), (200, torch.bfloat16)], ids=str)
def test_hidden_queries_may_hold_anything(kernel, D, dtype):
    """A query that is not finite reaches only the keys that it sees."""
    B, K = 150, 70
    q, keys = whole(B, D, dtype=dtype), whole(K, D, dtype=dtype, seed=1)
    spoiled = q.clone()
    spoiled[3], spoiled[70, 1], spoiled[149, ::2] = torch.nan, torch.inf, -torch.inf
    bad = ~spoiled.isfinite().all(1)[:, None]  # (B, 1)
    even = torch.arange(K) % 2 == 0  # (K,)
    lse, weight = torch.full((B,), 5.0), torch.linspace(-1, 2, B)
    for given in (
        {"negative_mask": ~(bad & even)},
        {"query_ids": torch.where(bad[:, 0], 0, 2), "negative_ids": torch.arange(K) % 2},
    ):
        pool = pool_of(q, keys, **given)
        got, want = (kernel(each, keys, torch.tensor(0.05), lse, weight, pool) for each in (spoiled, q))
        exact("grad", got[even], want[even])
        assert got[~even].isnan().any()


def seen_by(kernel, q, keys, inside, splits=None, weight=None, **pool):
    """Who sees whom, exactly: all probabilities 1, so a key's row is a sum of small integers, in any order."""
    weight = torch.arange(len(q)).float() % 7 - 3 if weight is None else weight
    pool = pool_of(q, keys, **pool)
    got = kernel(q, keys, torch.tensor(0.0), torch.zeros(len(q)), weight, pool, splits)
    exact("grad", got, (inside.float() * weight[:, None]).T @ q.float())


SHAPES = [  # B, K, D
    (1, 1, 1),
    (0, 9, 7),
    (2, 0, 7),
    (5, 3, 7),  # odd D
    (130, 33, 70),  # K past a warp, B past two tiles, D past 64
    (300, 3, 200),  # wide D
    (400, 130, 16),  # K past a block
    (1000, 4, 64),
    (200, 140, 128),
    (96, 65, 256),  # K past a block of wide keys
]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(kernel, shape, dtype):
    B, K, D = shape
    q, keys = unit(B, D, dtype=dtype), unit(K, D, dtype=dtype, seed=1)
    check(kernel, q, keys, 14.0)
    q, keys = whole(B, D, dtype=dtype), whole(K, D, dtype=dtype, seed=1)
    seen_by(kernel, q, keys, torch.ones(B, K))


@pytest.mark.parametrize("D", [20, 70, 140])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kernel, kind, D):
    B, K = 75, 90
    q, keys = whole(B, D, dtype=torch.bfloat16), whole(K, D, dtype=torch.bfloat16, seed=1)
    given = masks(kind, B, K)
    inside = allowed_of(q, keys, pool_of(q, keys, **given), given)[1]
    if kind == "columns":
        keys[~given["negative_mask"]] = torch.nan  # never read
    check(kernel, q, keys, 0.05, **given)
    seen_by(kernel, q, keys, inside, **given)


@pytest.mark.parametrize("D", [20, 70, 140])
def test_same_labels_and_bounds(kernel, D):
    B, K = 70, 90
    q, keys = whole(B, D, dtype=torch.bfloat16), whole(K, D, dtype=torch.bfloat16, seed=1)
    check(kernel, q, keys, 0.1, same_label=True, **masks("labels", B, K))
    places = sort_key.pack(q.float() @ keys.float().T, torch.arange(K)).sort(1, descending=True).values  # (B, K)
    upper, lower = places[:, 7].contiguous(), places[:, 30].contiguous()  # ties lie on both sides of each
    upper[0], lower[1], upper[2], lower[3] = sort_key.NOWHERE, 2**63 - 1, lower[2] - 1, sort_key.NOWHERE
    upper[4] = sort_key.pack(torch.tensor(torch.inf), 0)
    lower[5] = sort_key.pack(torch.tensor(-torch.inf), sort_key.LAST_INDEX)
    for bounds in ({"upper": upper}, {"lower": lower}, {"lower": lower, "upper": upper}):
        pool = pool_of(q, keys, **bounds)
        seen_by(kernel, q, keys, allowed_of(q, keys, pool, {})[1], **bounds)
        check(kernel, q, keys, 0.1, **bounds)
    everything = masks("everything", B, K)
    both = pool_of(q, keys, lower=lower, upper=upper, **everything)
    seen_by(kernel, q, keys, allowed_of(q, keys, both, everything)[1], lower=lower, upper=upper, **everything)


@pytest.mark.parametrize("splits", [1, 2, 7, 20])  # of 10 tiles
def test_any_split_of_the_batch_adds_up(emulated_kernel, splits):
    q, keys = unit(600, 64, dtype=torch.bfloat16), unit(50, 64, dtype=torch.bfloat16, seed=1)
    check(emulated_kernel, q, keys, 14.0, splits=splits)
    check(emulated_kernel, q, keys, 14.0, splits=splits, **masks("pairs", 600, 50))
    q, keys = whole(600, 65, dtype=torch.bfloat16), whole(50, 65, dtype=torch.bfloat16, seed=1)
    seen_by(emulated_kernel, q, keys, torch.ones(600, 50), splits)


@each_dtype
@pytest.mark.parametrize("scale", [1e-30, -3.0, 100.0, 1e4])
def test_scales(kernel, scale, dtype):
    """Temperatures from none to one key alone."""
    q, keys = unit(80, 70, dtype=dtype), unit(90, 70, dtype=dtype, seed=1)
    check(kernel, q, keys, scale)
    check(kernel, q, keys, scale, **masks("ids", 80, 90))


@each_dtype
@pytest.mark.parametrize("size", [1e-30, 1e-8, 2.0**16, 1e30])
def test_weights_of_any_size(kernel, size, dtype):
    """A gradient scaler's weights pass fp16's largest number, and means over long batches its smallest."""
    q, keys = unit(70, 24, dtype=dtype), unit(90, 24, dtype=dtype, seed=1)
    got = check(kernel, q, keys, 14.0, weight=size * torch.linspace(-1, 3, 70))
    assert (got != 0).all()
    q = whole(70, 24, dtype=dtype)
    seen_by(kernel, q, whole(90, 24, dtype=dtype), torch.ones(70, 90), weight=2.0 ** (torch.arange(70) % 8 - 4).float())


def test_what_the_largest_weight_leaves_of_the_others(kernel):
    """In fp16 a share of 2^-38 of the largest weight is still there; bf16 has its exponents anyway."""
    for dtype in DTYPES:
        q, keys = torch.eye(3, 8, dtype=dtype), torch.zeros(70, 8, dtype=dtype)
        weight = torch.tensor([1.5 * 2.0**10, 2.0**-28, -(2.0**-27)])
        got = kernel(q, keys, torch.tensor(1.0), torch.zeros(3), weight, pool_of(q, keys))
        exact("grad", got, (weight[:, None] * q.float()).sum(0).expand(70, 8))


def test_queries_that_add_nothing_may_hold_anything(kernel):
    B, K, D = 70, 90, 24
    q, keys = whole(B, D, dtype=torch.bfloat16), whole(K, D, dtype=torch.bfloat16, seed=1)
    scale, lse, weight = torch.tensor(0.0), torch.zeros(B), torch.arange(B).float() % 5 + 1
    silent = torch.tensor([0, 3, 64, 69])
    weight[silent[:2]] = 0.0
    lse[silent[2:]] = -torch.inf
    rest = weight.masked_fill(torch.isin(torch.arange(B), silent), 0.0)
    want = (rest @ q.float()).expand(K, D)
    q[silent] = torch.nan
    for given in ({}, {"negative_mask": torch.ones(B, K, dtype=torch.bool)}):
        exact("grad", kernel(q, keys, scale, lse, weight, pool_of(q, keys, **given)), want)
    nothing = kernel(q, keys, scale, lse, torch.zeros(B), pool_of(q, keys))
    exact("no weight at all", nothing, torch.zeros(K, D))


@each_dtype
def test_nan_and_infinity(kernel, dtype):
    B, K, D = 100, 90, 24
    q, keys = whole(B, D, dtype=dtype).abs() + 1, whole(K, D, dtype=dtype, seed=1)
    scale, weight, plain = torch.tensor(0.1), torch.ones(B), pool_of(q, keys)
    lse = torch.logsumexp(0.1 * q.float() @ keys.float().T, 1)
    want = kernel(q, keys, scale, lse, weight, plain)
    bad = keys.clone()
    bad[77] = torch.nan
    rows = torch.arange(K) == 77
    got = kernel(q, bad, scale, lse, weight, plain)  # a NaN score stays in its key's row
    assert got[77].isnan().all()
    exact("the other keys", got[~rows], want[~rows])
    least = sort_key.pack(torch.full((B,), -torch.inf), sort_key.LAST_INDEX)
    got = kernel(q, bad, scale, lse, weight, pool_of(q, bad, lower=least))  # which no bound keeps
    exact("a bound", got, want.masked_fill(rows[:, None], 0.0))
    bad[77] = -torch.inf
    got = kernel(q, bad, scale, lse, weight, plain)
    exact("no weight", got, want.masked_fill(rows[:, None], 0.0))
    blind = torch.ones(B, K, dtype=torch.bool)
    blind[5, :40] = False
    fifth, seeing = torch.arange(B) == 5, pool_of(q, keys, negative_mask=blind)
    rest = kernel(q, keys, scale, lse, weight.masked_fill(fifth, 0.0), plain)
    for broken in (torch.nan, torch.inf):  # a weight of this kind stays where its query sees
        got = kernel(q, keys, scale, lse, weight.masked_fill(fifth, broken), seeing)
        exact("seen", got[40:], torch.full((50, D), broken))
        exact("not seen", got[:40], rest[:40])
    assert kernel(q, keys, torch.tensor(torch.nan), lse, weight, plain).isnan().all()
    exact("all the weight elsewhere", kernel(q, keys, scale, torch.full((B,), torch.inf), weight, plain), 0 * want)


@pytest.mark.parametrize("D", [24, 27, 100])
def test_strides_change_no_bit(kernel, D):
    q, keys = unit(80, D, dtype=torch.bfloat16), unit(70, D, dtype=torch.bfloat16, seed=1)
    rest = torch.tensor(5.0), torch.full((80,), 4.0), torch.ones(80)
    plain = kernel(q, keys, *rest, pool_of(q, keys))
    for width in (D + 8, D + 5):
        wide = torch.full((150, width), torch.nan, dtype=torch.bfloat16)
        for start in (0, width - D):
            wide[:80, start : start + D], wide[80:, start : start + D] = q, keys
            views = wide[:80, start : start + D], wide[80:, start : start + D]
            exact("grad", kernel(*views, *rest, pool_of(*views)), plain)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_depends_neither_on_the_rows_beside_it_nor_on_the_order_of_blocks(emulated_kernel, splits):
    q, keys = unit(500, 48, dtype=torch.bfloat16), unit(140, 48, dtype=torch.bfloat16, seed=1)
    rest = torch.tensor(20.0), torch.full((500,), 9.0), torch.ones(500)
    every = emulated_kernel(q, keys, *rest, pool_of(q, keys), splits)
    exact("backwards", emulated_kernel(q, keys, *rest, pool_of(q, keys), splits, True), every)
    rows = torch.tensor([139, 3, 17])
    exact("grad", emulated_kernel(q, keys[rows], *rest, pool_of(q, keys[rows]), splits), every[rows])


@pytest.mark.parametrize(("D", "dtype"), [(48, torch.bfloat16), (100, torch.float16), (200, torch.bfloat16)], ids=str)
def test_scores_are_the_bits_of_mine_hardest(emulated_kernel, D, dtype):
    """A window that ends at places which mining found keeps exactly what is ranked between them."""
    B, K = 70, 200
    q, keys = unit(B, D, dtype=dtype), unit(K, D, dtype=dtype, seed=1)
    q[:, -1], keys[:, -1] = 1, 0  # a last element that counts and is in no score
    pool = pool_of(q, keys)
    scores, index = emulated(emulated_kernel.product)(q, keys, 150, pool)  # (B, 150)
    places = sort_key.pack(scores, index)
    for first, last in ((0, 0), (3, 90), (20, 149)):
        window = pool._replace(lower=places[:, last].contiguous(), upper=places[:, first].contiguous())
        got = emulated_kernel(q, keys, torch.tensor(0.0), torch.zeros(B), torch.ones(B), window)
        exact("seen", got[:, -1], index[:, first : last + 1].flatten().bincount(minlength=K).float())


@pytest.mark.parametrize(
    ("D", "start", "silent", "tiles"),
    [(72, 0, False, 3), (72, 8, False, 3), (72, 1, False, 0), (71, 0, False, 0), (72, 0, True, 0)],
    ids=["plain", "aligned", "not aligned", "odd D", "a silent query"],
)
def test_sm90a_copies_whole_tiles_where_rows_allow(libraries, D, start, silent, tiles):
    library = libraries("emulated_sm90a")
    wide, keys = torch.empty(200, 88, dtype=torch.bfloat16), whole(20, D, dtype=torch.bfloat16, seed=1)
    q = wide[:, start : start + D].copy_(whole(200, D))
    before = library.emulated_boxes()
    weight = torch.ones(200)
    weight[7] -= float(silent)
    seen_by(emulated_grad("emulated_sm90a", library), q, keys, torch.ones(200, 20), weight=weight)
    assert library.emulated_boxes() - before == 2 * tiles  # slabs


OPTIONS = [({}, "none"), ({"decoupled": True}, "none"), ({}, "pairs")]


@pytest.mark.parametrize(("options", "kind"), OPTIONS, ids=["plain", "decoupled", "masked pairs"])
def test_a_loss_trains_its_keys(emulated_kernel, options, kind, libraries, monkeypatch):
    """info_nce by the emulated kernels under the name of their backend, against the reference in float64."""
    product = emulated_kernel.product
    sum_up = emulated_sum(product, libraries(product, "logsumexp"))
    found = {
        "logsumexp": as_declared(sum_up),
        "logsumexp_grad_keys": lambda *args: emulated_kernel(*args[:5], args[5:]),
    }
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "BACKENDS", (backends.Backend("cuda", "cpu", found), *backends.BACKENDS[1:]))
    given = [unit(n, 24, dtype=torch.bfloat16, seed=seed) for seed, n in enumerate((40, 40, 90))]
    grads = []
    for dtype, backend in ((torch.bfloat16, "cuda"), (torch.float64, "reference"), (torch.bfloat16, "reference")):
        inputs = [x.clone().to(dtype).requires_grad_() for x in given]
        columns = negatives(inputs[2], masks(kind, 40, 90))
        negmine.info_nce(*inputs[:2], columns, temperature=0.1, backend=backend, **options).backward()
        grads.append([x.grad for x in inputs])
    for name, got, truth, plain in zip(("query", "positive_key", "negative_keys"), *grads, strict=True):
        rounded(name, got, truth, plain)


GOALS = [(256, 65_536, 128), (4096, 65_536, 128), (4096, 4096, 128), (1024, 1024, 256)]


@pytest.mark.parametrize(("B", "K", "D"), GOALS)
def test_plan_at_the_goal_shapes(library, B, K, D):
    """Short queues split the batch until two blocks are on each of 132 processors; a part is two tiles at least."""
    splits = splits_of(library, B, K, D, 132)
    tiles = -(-K // (128 if D <= 128 else 64))
    assert splits == 1 if tiles > 132 else (0.9 * 264 <= splits * tiles <= 264 or splits == (B // 64 + 1) // 2)
    library.emulated_workspace.restype = ctypes.c_int64
    room = library.emulated_workspace(*map(ctypes.c_int64, (B, K, D, 132)))
    assert room <= (4 * 264 * 128 * D if splits > 1 else 0) + 9 * B + 16
    assert splits_of(library, 0, 0, D, 132) == splits_of(library, B, 10**6, D, 132) == 1
