"""The ops of the CUDA backend that make synthetic negatives, with and without a GPU.

kernels/cuda/mix_negatives.cu and mix_logsumexp.cu run on the CPU under tests/emulator, which executes the same source with one
fiber per CUDA thread. The same cases run on a GPU, where there is one, and are small enough for compute-sanitizer.
"""

import ctypes

import pytest
import torch

import negmine
from negmine import Mix, reference
from negmine.ops import backends, compiled
from negmine.ops.windows import Draw, mixing_draws
from negmine.options import beta_quantiles
from tests import emulate
from tests.cases import unit
from tests.compare import exact, rounded
from tests.emulate import PRODUCTS, STORAGE, on_gpu, pointer
from tests.emulated_mining import emulated as mining_by_emulator
from tests.test_cuda_logsumexp import as_declared, emulated_sum

i64, i32, f32, address = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class Mixing(ctypes.Structure):
    """kernels/cuda/mixing.h."""

    _fields_ = [
        *((name, i64) for name in ("B", "N", "D")),
        *((name, address) for name in ("query", "negative_keys", "hard_index")),
        *((name, i64) for name in ("query_stride", "negative_keys_stride", "hard_index_stride")),
        *((name, i32) for name in ("query_storage", "negative_keys_storage")),
        *((name, i64) for name in ("pairs", "with_query")),
        *((name, f32) for name in ("pair_low", "pair_high", "query_low", "query_high")),
        ("distinct", ctypes.c_bool), ("quantiles", address),
        ("seed", ctypes.c_uint32), ("step", address), ("row_offset", address),
    ]  # fmt: skip


def mixing_of(query, negative_keys, hard_index, mix, seed, step, row_offset):
    quantiles = beta_quantiles(mix.concentration)
    place = [torch.tensor(number) for number in (step, row_offset)]
    mixing = Mixing(
        *(len(query), hard_index.shape[1], query.shape[1]),
        *(pointer(tensor).value for tensor in (query, negative_keys, hard_index)),
        *(tensor.stride(0) for tensor in (query, negative_keys, hard_index)),
        *(STORAGE[query.dtype], STORAGE[negative_keys.dtype], mix.pairs, mix.with_query),
        *(*mix.pair_range, *mix.query_range, mix.distinct, pointer(quantiles).value),
        *(seed, *(pointer(tensor).value for tensor in place)),
    )
    mixing.place = place  # alive as long as their addresses
    return mixing


class Emulated:
    """Both ops by the emulator; undefined behaviour aborts."""

    def __init__(self, library):
        self.library = library

    def mix_negatives(self, query, negative_keys, hard_index, mix, *draw):
        (B, D), S = query.shape, mix.total
        vectors, coefficients = torch.full((B, S, D), torch.nan, dtype=query.dtype), torch.full((B, S), torch.nan)
        parents = torch.full((B, S, 2), -9)
        mixing = mixing_of(query, negative_keys, hard_index, mix, *draw)
        outputs = map(pointer, (vectors, parents, coefficients))
        assert self.library.emulated_mix_negatives(ctypes.byref(mixing), *outputs) == 0
        return vectors, parents, coefficients

    def mix_logsumexp(self, query, negative_keys, hard_index, scale, want_mean, mix, *draw, backwards=False):
        B, D = query.shape
        lse, mean = torch.full((B,), -9.0), torch.full((B if want_mean else 0, D), -9.0)
        mixing = mixing_of(query, negative_keys, hard_index, mix, *draw)
        how = pointer(scale), ctypes.c_bool(want_mean), ctypes.c_bool(backwards)
        assert self.library.emulated_mix_logsumexp(ctypes.byref(mixing), *how, pointer(lse), pointer(mean)) == 0
        return lse, mean


class OnGPU:
    """Both ops by the GPU, on CPU tensors."""

    def mix_negatives(self, query, negative_keys, hard_index, mix, *draw):
        query, keys, index = map(on_gpu, (query, negative_keys, hard_index))
        draws = mixing_draws(mix, query, Draw(*draw))
        return tuple(out.cpu() for out in torch.ops.negmine_cuda.mix_negatives(query, keys, index, *draws))

    def mix_logsumexp(self, query, negative_keys, hard_index, scale, want_mean, mix, *draw, backwards=False):
        query, keys, index, scale = map(on_gpu, (query, negative_keys, hard_index, scale))
        draws = mixing_draws(mix, query, Draw(*draw))
        summed = torch.ops.negmine_cuda.mix_logsumexp(query, keys, index, scale, want_mean, *draws)
        return tuple(out.cpu() for out in summed)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return Emulated(emulate.build("mixing", tmp_path_factory.mktemp("emulator")))


@pytest.fixture(scope="module")
def compiled_sm80(tmp_path_factory):
    return Emulated(emulate.build("mixing", tmp_path_factory.mktemp("compiled"), *PRODUCTS["compiled_sm80"]))


@pytest.fixture(
    params=["emulated", "compiled_sm80", pytest.param("gpu", marks=(pytest.mark.gpu, pytest.mark.sanitized))]
)
def kernels(request):
    """The ops on CPU tensors, by the emulator, as compiled or by the GPU."""
    if request.param != "gpu":
        return request.getfixturevalue(request.param)
    if compiled.CUDA_REFUSAL:
        pytest.skip(compiled.CUDA_REFUSAL)
    return OnGPU()


def check(kernels, query, keys, mix, usable=None, seed=0, step=0, row_offset=0, scale=7.0):
    """The kernels against the reference: draws exact, vectors and what is summed of them within rounding."""
    _, index = reference.mine_hardest(query.double(), keys.double(), mix.skip + mix.hard, usable)
    index, place = index[:, mix.skip :], (seed, step, row_offset)
    got = kernels.mix_negatives(query, keys, index, mix, *place)
    draw = {"seed": seed, "step": step, "row_offset": row_offset}
    truth = reference.mix_negatives(query.double(), keys.double(), mix, usable, **draw)
    plain = reference.mix_negatives(query.float(), keys.float(), mix, usable, **draw)
    exact("parents", got[1], truth[1])
    exact("coefficients", got[2], plain[2])
    rounded("vectors", got[0], truth[0], plain[0].to(query.dtype))

    wants = []  # lse (B,), mean (B, D) of the truth and in fp32
    for vectors, q in ((truth[0], query.double()), (plain[0], query.float())):
        logits = scale * torch.einsum("bsd,bd->bs", vectors, q)
        logits = logits.masked_fill(truth[1][:, :, 1] < 0, -torch.inf)  # (B, S)
        lse = logits.logsumexp(1)
        p = torch.where(logits == -torch.inf, 0.0, (logits - lse[:, None]).exp())
        wants.append((lse, torch.einsum("bs,bsd->bd", p, vectors)))
    largest = abs(scale) * float(query.double().norm(dim=1).max()) if query.numel() else 0.0
    summed = kernels.mix_logsumexp(query, keys, index, torch.tensor(scale), True, mix, *place)
    for name, one, *both in zip(("lse", "mean"), summed, *wants, strict=True):
        rounded(name, one, *both, largest)
    alone = kernels.mix_logsumexp(query, keys, index, torch.tensor(scale), False, mix, *place)
    exact("lse alone", alone[0], summed[0])
    assert alone[1].shape == (0, query.shape[1])
    return got, summed


@pytest.mark.parametrize("query_dtype", STORAGE)
@pytest.mark.parametrize("keys_dtype", STORAGE)
@pytest.mark.parametrize("D", [4, 130])  # in quads, and one element at a time
def test_storage(kernels, query_dtype, keys_dtype, D):
    check(kernels, unit(2, D, dtype=query_dtype), unit(12, D, dtype=keys_dtype, seed=1), Mix(6, 3, 2))


@pytest.mark.parametrize(
    ("shape", "mix"),
    [  # B, K, D
        ((1, 1, 1), Mix(1, 1, 1)),
        ((0, 3, 4), Mix(2, 1, 1)),
        ((2, 5, 7), Mix(9, 3, 2)),  # fewer negatives than Mix.hard: -1 at the end
        ((3, 70, 3), Mix(64, 5, 0, skip=3)),
        ((2, 40, 128), Mix(33, 0, 5, query_range=(0.1, 0.9))),
        ((1, 1100, 8), Mix(1100, 16, 16, concentration=0.4)),
        ((1, 2, 1000), Mix(2, 16, 1, distinct=True)),
        ((1, 3, 2), Mix(3, 16, 1, distinct=False, pair_range=(0.25, 0.5))),
    ],
    ids=str,
)
def test_shapes_and_draws(kernels, shape, mix):
    B, K, D = shape
    check(kernels, unit(B, D), unit(K, D, seed=1), mix, seed=2**32 - 1, step=77, row_offset=2**33 + 5)


# What a warp holds is 128, 256 or 512 elements, and wider rows are summed in slices.
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("D", [128, 200, 256, 300, 512, 516, 1100])
def test_widths(kernels, D, dtype):
    check(kernels, unit(2, D, dtype=dtype), unit(20, D, dtype=dtype, seed=1), Mix(12, 9, 10))


@pytest.mark.parametrize(
    "slots", [(1, 0), (0, 7), (8, 0), (9, 8), (200, 55), (200, 56), (200, 57), (500, 300)], ids=str
)
def test_any_number_of_slots(kernels, slots):
    """Eight warps take 32 slots each at a time."""
    check(kernels, unit(2, 20), unit(40, 20, seed=1), Mix(30, *slots))


@pytest.mark.parametrize("scale", [0.0, 1e-30, -3.0, 100.0, 1e4])
def test_scales(kernels, scale):
    check(kernels, unit(3, 20), unit(40, 20, seed=1), Mix(30, 40, 20), scale=scale)


def test_a_score_past_all_numbers_makes_an_infinite_sum(kernels):
    query, keys = torch.full((2, 4), 1e37), torch.ones(3, 4)
    query[1] = -1e37
    index = torch.tensor([[0, 1, 2]] * 2)
    lse, _ = kernels.mix_logsumexp(query, keys, index, torch.tensor(100.0), True, Mix(3, 5, 0), 0, 0, 0)
    exact("lse", lse, torch.tensor([torch.inf, -torch.inf]))


def test_a_sum_that_starts_low_and_one_that_starts_high(kernels):
    """The shift follows scores that rise by more than an exponent holds, and stays where they fall."""
    query, mix, place = torch.ones(1, 4), Mix(2, 0, 300, query_range=(0.0, 1.0)), (0, 0, 0)
    index = torch.tensor([[0, 1]])
    for sign in (1, -1):
        keys = torch.tensor([[sign, 0.0, 0.0, 0.0], [0.0, -sign, 0.0, 0.0]])
        vectors = kernels.mix_negatives(query, keys, index, mix, *place)[0]
        for scale in (500.0, -500.0):
            logits = scale * vectors.double().sum(2)  # (1, S)
            lse, mean = kernels.mix_logsumexp(query, keys, index, torch.tensor(scale), True, mix, *place)
            plain = (scale * vectors.sum(2)).logsumexp(1)
            rounded("lse", lse, logits.logsumexp(1), plain, 1000.0)
            p = logits.softmax(1)
            rounded("mean", mean, (p[:, :, None] * vectors).sum(1), (p.float()[:, :, None] * vectors).sum(1), 1000.0)


def test_sums_depend_neither_on_the_order_of_blocks_nor_on_the_rows_beside_them(emulated):
    query, keys, mix, scale = unit(4, 600), unit(40, 600, seed=1), Mix(30, 40, 20), torch.tensor(9.0)
    index = reference.mine_hardest(query, keys, 30)[1]
    every = emulated.mix_logsumexp(query, keys, index, scale, True, mix, 3, 4, 5)
    back = emulated.mix_logsumexp(query, keys, index, scale, True, mix, 3, 4, 5, backwards=True)
    last = emulated.mix_logsumexp(query[3:], keys, index[3:], scale, True, mix, 3, 4, 8)
    for name, one, other, alone in zip(("lse", "mean"), every, back, last, strict=True):
        exact(name, other, one)
        exact(name, alone, one[3:])


def test_row_without_negatives_is_zero(kernels):
    usable = torch.ones(3, 9, dtype=torch.bool)
    usable[1] = False
    (vectors, parents, coefficients), (lse, mean) = check(kernels, unit(3, 5), unit(9, 5, seed=1), Mix(4, 2, 2), usable)
    assert (parents[1] == -1).all()
    assert (vectors[1] == 0).all()
    assert (coefficients[1] == 0).all()
    assert lse[1] == -torch.inf
    assert (mean[1] == 0).all()


def test_a_mix_of_nothing_is_zero(kernels):
    (vectors, _, _), (lse, mean) = check(kernels, torch.zeros(1, 6), torch.zeros(4, 6), Mix(4, 2, 2))
    assert (vectors == 0).all()
    assert (mean == 0).all()
    torch.testing.assert_close(lse, torch.tensor([4.0]).log())


def test_layout_changes_no_bit(kernels):
    query, keys, mix = unit(2, 12), unit(30, 12, seed=1), Mix(8, 6, 6)
    both = torch.full((32, 13), torch.nan)
    both[:2, :12], both[2:, :12] = query, keys
    plain = check(kernels, query, keys, mix)
    for views in ((query, both[2:, :12]), (both[:2, :12], keys), (both[:2, :12], both[2:, :12])):
        strided = check(kernels, *views, mix)
        for made in range(2):
            for got, want in zip(strided[made], plain[made], strict=True):
                exact("layout", got, want)


def test_nan_stays_in_its_row(kernels):
    query, keys, mix = unit(2, 6), unit(9, 6, seed=1), Mix(4, 2, 3)
    _, index = reference.mine_hardest(query, keys, 4)
    rest = index, torch.tensor(5.0), True, mix, 0, 0, 0
    want = kernels.mix_logsumexp(query, keys, *rest)
    query[1] = torch.nan
    vectors, _, _ = kernels.mix_negatives(query, keys, index, mix, 0, 0, 0)
    assert vectors[0].isfinite().all()
    assert vectors[1, :2].isfinite().all()
    assert vectors[1, 2:].isnan().all()
    for got, plain in zip(kernels.mix_logsumexp(query, keys, *rest), want, strict=True):
        exact("the other row", got[0], plain[0])
        assert got[1].isnan().all()


def test_a_step_with_synthetic_negatives(emulated, tmp_path, monkeypatch):
    """info_nce by emulated kernels alone, under the name of their backend, against the reference in float64."""
    mix = Mix(20, 12, 9)
    sums = emulate.build("logsumexp", tmp_path)
    sums.emulated_splits.restype = ctypes.c_int64
    mined, summed = mining_by_emulator("emulated"), emulated_sum("emulated", sums)

    def mix_logsumexp(query, negative_keys, index, scale, want_mean, *draws):
        seed, *place = draws[-3:]
        assert draws[:-3] == mixing_draws(mix, query, Draw())[:-3]
        return emulated.mix_logsumexp(query, negative_keys, index, scale, want_mean, mix, seed, *map(int, place))

    found = {
        "mine_hardest": lambda *args: (*mined(*args[:3], args[4:]), None),
        "logsumexp": as_declared(summed, mined),
        "mix_logsumexp": mix_logsumexp,
    }
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "BACKENDS", (backends.Backend("cuda", "cpu", found), *backends.BACKENDS[1:]))
    given = [unit(n, 24, dtype=torch.bfloat16, seed=seed) for seed, n in enumerate((9, 9, 90))]
    outcomes = []
    for dtype, backend in ((torch.bfloat16, "cuda"), (torch.float64, "reference"), (torch.bfloat16, "reference")):
        q, pos, keys = (x.clone().to(dtype) for x in given)
        q.requires_grad_(), pos.requires_grad_()
        loss = negmine.info_nce(q, pos, keys, temperature=0.1, mix=mix, seed=3, step=4, row_offset=5, backend=backend)
        loss.backward()
        outcomes.append((loss.detach(), q.grad, pos.grad))
    for name, got, truth, plain in zip(("loss", "query", "positive_key"), *outcomes, strict=True):
        rounded(name, got, truth, plain)
