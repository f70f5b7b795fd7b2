"""The prefilter gives the same bits as a scan of the stored vectors, for every kind of rows, and its error bounds hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import negmine
from negmine import Select
from negmine.mining import prefilter, scan
from negmine.mining.prefilter import BF16, CODES, Prefilter, Rounded
from negmine.ops import backends, compiled, sort_key
from negmine.ops.pool import Pool
from tests.cases import unit, whole

B, K, D = 70, 1500, 33
CPU = next(row for row in backends.BACKENDS if row.name == "cpu")
pytestmark = pytest.mark.skipif(bool(CPU.refusal), reason=CPU.refusal)
no_codes = pytest.mark.skipif(
    not compiled.isa_for(torch.uint8, torch.uint8), reason="this processor cannot multiply codes (AVX512-VNNI)"
)
ROUNDINGS = [pytest.param(BF16, id="bf16"), pytest.param(CODES, id="codes", marks=no_codes)]


@pytest.fixture
def prefilters(monkeypatch):
    """Prefilter small inputs too. Yields the list of the prefilters that ran."""
    seen = []

    class Watched(Prefilter):
        def __call__(self, *arguments):
            seen.append(self)
            return super().__call__(*arguments)

    for name in ("MIN_QUERIES", "MIN_ROWS", "MIN_DIM"):
        monkeypatch.setattr(prefilter, name, 1)
    made = scan.Scan.__init__

    def watched(self, *arguments, **named):
        made(self, *arguments, **named)
        self.prefilter = Watched()

    monkeypatch.setattr(scan.Scan, "__init__", watched)
    return seen


def kinds():
    """Yield (name, queries (B, D), rows (K, D)); the positive of query b is row b."""
    q, c = unit(B, D, seed=1), unit(K, D, seed=2)
    yield "unit", q, c
    yield "near", q, c[:1] + 1e-3 * unit(K, D, seed=3)  # a thousand rows that bf16 rounding cannot distinguish
    yield "equal", q, c[:5].repeat(K // 5, 1)
    yield "whole", whole(B, D, seed=1), whole(K, D, seed=2)
    yield "large", 1e18 * q, 1e18 * c
    yield "small", 1e-30 * q, 1e-12 * c
    yield "past bf16", q, torch.where(torch.rand(K, 1) < 0.01, 3.4e38, c)
    yield "as bf16", q.bfloat16().float(), c.bfloat16().float()
    broken_q, broken_c = q.clone(), c.clone()
    broken_q[3], broken_q[4, 1], broken_q[5], broken_q[6, 0] = 0, torch.nan, torch.inf, -torch.inf
    broken_c[100, 2], broken_c[200], broken_c[300, 0], broken_c[400] = torch.nan, 0, torch.inf, 1e-42
    yield "broken", broken_q, broken_c
    without = broken_c.clone()
    without[300] = 1
    yield "NaN alone", q, without


@pytest.mark.filterwarnings("ignore:.*contain NaN or infinity:UserWarning")
@pytest.mark.parametrize("name, q, c", [pytest.param(*kind, id=kind[0]) for kind in kinds()])
@pytest.mark.parametrize(
    "select", [Select(), Select(max_score=0.3), Select(absolute_margin=0.1), Select(3, relative_margin=0.05)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_bits_of_a_scan_as_stored(prefilters, monkeypatch, rounding, dtype, name, q, c, select):
    q, c = q.to(dtype), c.to(dtype)
    monkeypatch.setattr(prefilter, "fastest", lambda: rounding)
    # One positive becomes ids, several positives become a mask of pairs.
    forms = (list(range(B)), [[b, (b + 7) % K, 3] for b in range(B)])
    for positives, how in ((forms[0], "none"), (forms[1], "none"), (forms[0], "exact")):
        options = {"select": select, "num_negatives": 4, "deduplicate": how, "backend": "cpu"}
        got = negmine.mine_hard_negatives(q, c, positives, **options)
        if c.isfinite().any():  # 1e18 is infinite in float16
            assert prefilters and prefilters[-1].num_queries == B
        with monkeypatch.context() as patch:
            patch.setattr(prefilter, "fastest", lambda: None)
            before = len(prefilters)
            want = negmine.mine_hard_negatives(q, c, positives, **options)
            assert len(prefilters) == before
        np.testing.assert_array_equal(got.indices, want.indices)
        np.testing.assert_array_equal(got.scores.view(np.int32), want.scores.view(np.int32))
        assert got.skipped == want.skipped
    assert name != "unit" or prefilters[0].num_rescanned < B / 2  # but most queries need no second scan
    assert name != "near" or select != Select() or prefilters[0].num_rescanned > B / 2


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_without_the_bound_rows_are_missed(prefilters, monkeypatch, rounding):
    """The test above would find an error bound that is too small."""
    monkeypatch.setattr(prefilter, "fastest", lambda: replace(rounding, extra=1))
    _, q, c = next(kind for kind in kinds() if kind[0] == "near")
    want = negmine.mine_hard_negatives(q, c, list(range(B)), backend="cpu")
    monkeypatch.setattr(prefilter, "error_bound", lambda D, query, keys: torch.zeros(len(query.norm)))
    got = negmine.mine_hard_negatives(q, c, list(range(B)), backend="cpu")
    assert (got.indices != want.indices).any()


def scores_of(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the scores (B, K) that the CPU kernels compute."""
    B, K = len(query), len(keys)
    ranks = torch.arange(K).repeat(B, 1)
    score, index = sort_key.unpack(torch.ops.negmine_cpu.rank_thresholds(query, keys, ranks, *Pool()))
    return torch.zeros(B, K).scatter(1, index, score)


def rounded_scores(rounding, query: Rounded, keys: Rounded, K: int) -> torch.Tensor:
    scores, index, _ = rounding.mine(query, keys, K, Pool())
    return torch.zeros(scores.shape).scatter(1, index, scores)


@pytest.mark.parametrize("D", [1, 2, 33, 384, 4096])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_bound_holds_where_rounding_is_worst(rounding, D):
    """All values are slightly above, or all below, the middle between two numbers of the format. Also tested in float64."""
    generator = torch.Generator().manual_seed(D)
    for sign in (1, -1):
        if rounding is BF16:
            ends = 2.0 ** torch.randint(-6, 6, (300, D), generator=generator)
            rows = ends * (1 + 2.0**-8 + sign * 2.0**-16)  # bf16 has seven fraction bits
        else:
            rows = torch.randint(20, 100, (300, D), generator=generator) + 0.5 + sign * 2.0**-10
            rows[:, 0] = 127  # so that the scale of the codes is 1
        q, k = rows[:100].contiguous(), rows[100:].contiguous()
        rounded = [rounding.round(x) for x in (q, k)]
        bound = prefilter.error_bound(D, *rounded)[:, None]
        exact, found = scores_of(q, k), rounded_scores(rounding, *rounded, 200)
        assert bool(((exact - found).abs() <= bound).all())
        assert bool(((q.double() @ k.double().T - found).abs() <= bound).all())
        norms = (rounded[0].norm * rounded[1].norm.max())[:, None]
        assert bool((bound <= (2.0**-6 if rounding is BF16 else 0.1) * norms).all())  # the bound is not trivially large
        if D > 2:
            assert bool(((exact - found).abs() > 0.1 * bound).any())


@no_codes
@pytest.mark.parametrize("lanes", [1, 16, 17, 40, 64, 130])
@pytest.mark.parametrize("D", [1, 3, 4, 64, 130, 1100])
def test_sums_of_codes_are_exact(lanes, D):
    """Every shape of block, compared with float64 products of the bytes, with a mask and with incomplete groups of rows."""
    codes = [torch.randint(1, 256, (rows, (D + 3) // 4 * 4), dtype=torch.uint8) for rows in (lanes, 131)]
    scales = [torch.rand(len(part)) for part in codes]
    mask = torch.rand(131) < 0.8
    scores, index, num_kept = torch.ops.negmine_cpu.mine_hardest_codes(
        codes[0], scales[0], codes[1], scales[1], 131, *Pool(negative_mask=mask)
    )
    q, k = ((part.double() - 128) * scale[:, None] for part, scale in zip(codes, scales, strict=True))
    want = (q @ k.T).masked_fill(~mask, -torch.inf)
    assert (num_kept == mask.sum()).all()
    torch.testing.assert_close(scores.double(), want.sort(1, descending=True).values, rtol=1e-6, atol=1e-5)
    kept = int(mask.sum())
    torch.testing.assert_close(scores[:, :kept].double(), want.gather(1, index[:, :kept]), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [1, 5, 16, 100])
def test_codes_are_the_nearest_integers_at_the_scale_of_a_row(dtype, D):
    rows = torch.randn(37, D).to(dtype)
    rows[3], rows[4, 0], rows[5, 0] = 0, torch.nan, torch.inf
    codes, scale, norms = torch.ops.negmine_cpu.round_to_codes(rows)
    exact, plain = rows.double(), [row for row in range(37) if row not in (3, 4, 5)]
    torch.testing.assert_close(scale[plain].double(), exact[plain].abs().amax(1) / 127, rtol=1e-6, atol=0)
    kept = (codes[:, :D].double() - 128) * scale[:, None].double()
    error = exact - kept
    assert (error[plain].abs() <= 0.5001 * scale[plain, None]).all()
    torch.testing.assert_close(norms[0, plain].double(), exact[plain].norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(norms[1, plain].double(), error[plain].norm(dim=1), rtol=1e-4, atol=1e-7)
    assert scale[3] == 0 and (codes[3] == 128).all() and (codes[:, D:] == 128).all()
    assert scale[4].isnan() and norms[0, 4].isnan() and norms[1, 5] == torch.inf


def test_the_prefilter_is_used_only_where_it_is_faster(monkeypatch):
    monkeypatch.setattr(prefilter, "fastest", lambda: BF16)
    ops = backends.choose("test", ("mine_hardest",), "cpu", (torch.empty(0, 1),))
    q, c, fresh = torch.empty(1024, 64), torch.empty(16384, 64), Prefilter()
    assert fresh.is_faster(ops, q, c, 5, Select(max_score=0.5))
    assert fresh.is_faster(ops, q.half(), c.half(), 5, Select())
    assert not fresh.is_faster(None, q, c, 5, Select())
    assert not fresh.is_faster(backends.Kernels(mine_hardest=len), q, c, 5, Select())
    for other_q, other_c, N, select in (
        (q[:1000], c, 5, Select()),
        (q, c[:16000], 5, Select()),
        (q[:, :32], c[:, :32], 5, Select()),
        (q.half(), c, 5, Select()),
        (q.bfloat16(), c.bfloat16(), 5, Select()),
        (q, c, 300, Select()),
        (q, c, 5, Select(min_score=0.1)),
        (q, c, 5, Select(1)),
        (q, c, 5, Select(0, 9)),
    ):
        assert not fresh.is_faster(ops, other_q, other_c, N, select)
    assert Prefilter(1000, 250).is_faster(ops, q, c, 5, Select()) and not Prefilter(1000, 251).is_faster(
        ops, q, c, 5, Select()
    )
    monkeypatch.setattr(prefilter, "fastest", lambda: CODES)
    assert fresh.is_faster(ops, q.bfloat16(), c.bfloat16(), 5, Select())
    monkeypatch.setattr(prefilter, "fastest", lambda: None)
    assert not fresh.is_faster(ops, q, c, 5, Select())


@pytest.mark.parametrize(
    ("isa", "rounding"),
    [
        ({torch.bfloat16: "amxbf16", torch.uint8: "avx512vnni"}, BF16),
        ({torch.bfloat16: "avx512", torch.uint8: "avx512vnni"}, CODES),
        ({torch.bfloat16: "avx2", torch.uint8: ""}, None),
    ],
)
def test_the_rounding_is_that_of_the_fastest_products(monkeypatch, isa, rounding):
    monkeypatch.setattr(compiled, "isa_for", lambda query, keys: isa[keys])
    assert prefilter.fastest() is rounding


def test_invalid_lists_raise_errors():
    q, c, listed = unit(2, 3), unit(5, 3), torch.zeros(2, 1, dtype=torch.int64)
    listed_op = torch.ops.negmine_cpu.mine_gathered
    with pytest.raises(RuntimeError, match="N must be at least 1, got 0"):
        listed_op(q, c, listed, 0, None)
    for column in (5, -2):
        with pytest.raises(
            RuntimeError, match=rf"index must hold rows of negative_keys in \[0, 5\) or -1, got {column}"
        ):
            listed_op(q, c, listed + column, 1, None)
    with pytest.raises(RuntimeError, match="mine_hardest: N must not be negative, got -1"):
        torch.ops.negmine_cpu.mine_hardest(q, c, -1, True, *Pool())
