"""The ops of the CUDA backend that make synthetic negatives, with and without a GPU.

kernels/cuda/mix_negatives.cu and mix_logsumexp.cu run on the CPU under tests/emulator, which executes the same source with one
fiber per CUDA thread. The same cases run on a GPU, where there is one, and are small enough for compute-sanitizer.
"""

import ctypes

import pytest
import torch

from negmine import Mix, reference
from negmine.ops import compiled
from negmine.ops.windows import Draw, mixing_draws
from tests import emulate
from tests.cases import unit
from tests.compare import exact, rounded
from tests.emulate import STORAGE, on_gpu, pointer


def mixing_of(query, negative_keys, hard_index, mix, *draw):
    return emulate.mixing_of(query, negative_keys, hard_index, mixing_draws(mix, query, Draw(*draw)))


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
def emulated():
    return Emulated(emulate.build("mixing"))


@pytest.fixture(scope="module")
def compiled_sm80():
    return Emulated(emulate.build("mixing", "compiled_sm80"))


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
