"""fp32 and fp16 in AMX tiles, as sums of bf16: every score has the bits that kernels/cpu/simd/parts.h specifies.

Skipped where the processor has no AMX; tests/test_tiles.py runs this file on emulated tiles.
"""

import pytest
import torch

from negmine.ops import backends
from negmine.ops.pool import Pool
from tests import compare
from tests.cases import DTYPES, unit

U = 2.0**-24
PARTS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}
TYPES = [(q, k) for q in DTYPES for k in DTYPES if (q, k) != (torch.bfloat16, torch.bfloat16)]
LEAST, MOST = 2.0**-40, 2.0**40  # magnitudes that are split


@pytest.fixture(autouse=True)
def tiles():
    if next(row for row in backends.BACKENDS if row.name == "cpu").refusal:
        pytest.skip("this build has no CPU ops")
    from negmine import _ops_cpu

    before = _ops_cpu.isa()
    if not _ops_cpu.set_isa("amxbf16"):
        pytest.skip("this processor has no AMX")
    yield _ops_cpu
    assert _ops_cpu.set_isa(before)


def scores(q, keys):
    """Return the scores (B, K) that the kernels compute, with NaN for columns that are no candidates."""
    K = len(keys)
    found, index, _ = torch.ops.negmine_cpu.mine_hardest(q, keys, K, False, *Pool())
    return torch.full((len(q), K + 1), torch.nan).scatter_(1, torch.where(index < 0, K, index), found)[:, :K]


def split(x, most=3):
    """Split x (M, D) into parts, each (M, steps, 2, 16) fp32: the first and the second elements of the words of a tile."""
    steps, parts = -(-x.shape[1] // 32), []
    rest = torch.nn.functional.pad(x.float(), (0, 32 * steps - x.shape[1]))
    for _ in range(min(most, PARTS[x.dtype])):
        part = ((rest.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)
        parts.append(part.view(len(x), steps, 2, 16))
        rest = rest - part
    return parts


def modelled(q, keys, most=2):
    """Compute (B, K) scores as parts.h specifies, rounding by rounding, from products of parts i and j with i + j <= most."""
    q_parts, k_parts = split(q), split(keys)
    total = torch.zeros(len(q), len(keys))
    steps = q_parts[0].shape[1]
    small = [
        (i, j) for i in (2, 1, 0) for j in (2, 1, 0) if 0 < i + j <= most and i < len(k_parts) and j < len(q_parts)
    ]
    order = [(t, i, j) for t in range(steps) for i, j in small] + [(t, 0, 0) for t in range(steps)]
    for t, i, j in order:
        left, right = k_parts[i][:, t].double(), q_parts[j][:, t].double()  # (K, 2, 16), (B, 2, 16)
        chain = torch.zeros(2, len(q), len(keys))
        for word in range(16):
            terms = right[:, None, :, word] * left[None, :, :, word]  # (B, K, 2), exact
            chain = (chain.double() + terms.movedim(2, 0)).float()
        total = total + (chain[0] + chain[1])
    return total


def bound(D):
    return (min(-(-D // 2), 16) + 1.2 + 1.1 * -(-D // 32)) * U


@pytest.mark.parametrize("B, K, D", [(1, 1, 1), (3, 7, 5), (17, 129, 33), (65, 300, 130)])
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_scores_equal_the_modelled_sum(tiles, types, B, K, D):
    q, keys = unit(B, D, dtype=types[0]), unit(K, D, dtype=types[1], seed=1)
    got = scores(q, keys)
    compare.exact(f"{types}", got, modelled(q, keys))
    assert tiles.set_isa("avx512")
    if D >= 33:  # different from a single chain of sums
        assert int((scores(q, keys) != got).sum()) > B


def awkward(*shape, seed=0):
    """Numbers with 24 bits, of both signs and all magnitudes that are split, often halfway between two bf16 or one bit off."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(2**23, (*shape,), generator=generator)
    halves = (
        2**15
        + torch.randint(-2, 3, shape, generator=generator)
        + 2**16 * torch.randint(127, shape, generator=generator)
    )
    # In these, the second and third parts are as large as possible.
    below = (2**8 - 1) * 2**7 + torch.randint(-2, 3, shape, generator=generator)
    pick = torch.randint(3, shape, generator=generator)
    mantissa = torch.where(pick == 0, bits, torch.where(pick == 1, halves, below)).double() / 2**23 + 1
    sign = 1 - 2 * torch.randint(2, shape, generator=generator)
    return mantissa * sign


def test_a_split_loses_nothing():
    x = awkward(4000, 1) * 2.0 ** torch.randint(-40, 40, (4000, 1))
    x = torch.cat([x, torch.tensor([[LEAST], [MOST], [-MOST], [0.0], [1 + 2.0**-8], [1 + 2.0**-8 + 2.0**-23]])]).float()
    for one in (torch.ones(1, 1), torch.ones(1, 1).half(), torch.ones(1, 1).bfloat16()):
        compare.exact("keys", scores(one, x), x.T)
        compare.exact("queries", scores(x, one), x)


@pytest.mark.parametrize("D", [1, 2, 3, 31, 33, 128, 500])
def test_the_error_is_within_its_bound(D):
    q, keys = awkward(40, D).float(), awkward(150, D, seed=1).float()
    size = q.double().abs() @ keys.double().abs().T
    truth = q.double() @ keys.double().T

    def worst(score):
        return float(((score.double() - truth).abs() / size).max())

    assert worst(scores(q, keys)) <= bound(D)
    if D < 128:  # for larger D, rounding hides the difference
        assert worst(modelled(q, keys, most=1)) > bound(D)  # three products would not be enough


ODD = [torch.inf, -torch.inf, torch.nan, 2.0**-41, -(2.0**-127), 3.3e12, 3.4e38, 2.0**-149]


@pytest.mark.parametrize("D", [1, 40])
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_what_does_not_split_is_a_chain_and_disturbs_no_other(tiles, types, D):
    B, K = 67, 300  # more than a block and a chunk
    q, keys = unit(B, D, dtype=types[0]), unit(K, D, dtype=types[1], seed=1)
    q[5:9, 0], keys[100] = 0.0, 0.0
    for i, odd in enumerate(ODD):
        q[2 + 8 * i, D // 2] = odd
        keys[3 + 37 * i, D // 3] = -odd

    def splits(x):
        size = x.float().abs()
        return ((size == 0) | (size >= LEAST) & (size <= MOST)).all(1, keepdim=True)

    assert int((~splits(q)).sum()) >= 3 and int((~splits(keys)).sum()) >= 3
    got, split_ones = scores(q, keys), modelled(*(torch.where(splits(x), x, 0.0) for x in (q, keys)))
    assert tiles.set_isa("avx512")
    compare.exact("scores", got, torch.where(splits(q) & splits(keys).T, split_ones, scores(q, keys)))


def half_of(bias):
    """The weight sigmoid(bias) of every row in softplus_sum with scale 0, (1,) fp32."""
    one, zero = torch.ones(1, 1), torch.tensor(0.0)
    return torch.ops.negmine_cpu.softplus_sum(one, one, zero, bias, True, *Pool())[2]


# The last is 2^-123, whose parts would be subnormal without scaling.
@pytest.mark.parametrize("bias", [-0.7, -60.0, -85.0])
@pytest.mark.parametrize("K, D", [(5, 3), (96, 40), (97, 1), (300, 130)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_is_within_its_bound(dtype, K, D, bias):
    keys, bias = awkward(K, D).to(dtype), torch.tensor(bias)
    keys[K // 2] = 0.0
    q, p = torch.ones(70, D), half_of(bias).double()
    # Also with a row that is not split, so that a chunk is one chain of sums.
    for odd in (0.0, 6e4 if dtype == torch.float16 else 3.38e38):
        keys[K // 3, 0] = odd
        got = torch.ops.negmine_cpu.softplus_sum(q, keys, torch.tensor(0.0), bias, True, *Pool())[1].double()
        truth, size = p * keys.double().sum(0), p * keys.double().abs().sum(0)
        assert bool(((got - truth).abs() <= ((96 * U if odd else bound(min(K, 96))) + U * -(-K // 96)) * size).all())


@pytest.mark.parametrize("B, D", [(2, 3), (64, 40), (65, 130), (200, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_of_keys_is_within_its_bound(tiles, dtype, B, D):
    q, keys, zero, bias = awkward(B, D).to(dtype), torch.ones(100, D), torch.tensor(0.0), torch.tensor(-0.7)
    run = torch.ops.negmine_cpu.softplus_sum_grad_keys
    for size, odd in ((1.0, 0.0), (1e-42, 0.0), (1e12, 0.0), (1.0, 6e4 if dtype == torch.float16 else 3.38e38)):
        # Weights that are subnormal, and weights that are too large to split, like `odd`.
        weight, q[B // 2, 0] = (awkward(B, seed=2) * size).float(), odd
        got = run(q, keys, zero, bias, weight, *Pool())
        g = (weight * half_of(bias)).double()
        truth, terms = g @ q.double(), g.abs() @ q.double().abs()
        loss = (64 * U if size > 1 or odd else bound(min(B, 64))) + U * -(-B // 64)
        assert bool(((got.double() - truth).abs() <= loss * terms + B * 2.0**-149).all())
        if size > 1:
            assert tiles.set_isa("avx512")
            compare.exact("large", got, run(q, keys, zero, bias, weight, *Pool()))
            assert tiles.set_isa("amxbf16")
