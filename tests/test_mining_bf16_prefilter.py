"""Bf16Prefilter: the bits of the scan of fp32 and fp16 on every kind of row, and the error bound that it relies on."""

import numpy as np
import pytest
import torch

import negmine
from negmine import Select
from negmine.mining import bf16_prefilter, scan
from negmine.mining.bf16_prefilter import Bf16Prefilter
from negmine.ops import backends, compiled, sort_key
from negmine.ops.pool import Pool
from tests.cases import unit, whole

B, K, D = 70, 1500, 33
CPU = next(row for row in backends.BACKENDS if row.name == "cpu")
pytestmark = pytest.mark.skipif(bool(CPU.refusal), reason=CPU.refusal)


@pytest.fixture
def prefilters(monkeypatch):
    """Small inputs are prefiltered too, on any processor; the prefilters that ran."""
    seen = []

    class Watched(Bf16Prefilter):
        def __call__(self, *arguments):
            seen.append(self)
            return super().__call__(*arguments)

    for name in ("MIN_QUERIES", "MIN_ROWS", "MIN_DIM"):
        monkeypatch.setattr(bf16_prefilter, name, 1)
    monkeypatch.setattr(compiled, "isa_for", lambda *_: "avx512bf16")
    made = scan.Scan.__init__

    def watched(self, *arguments, **named):
        made(self, *arguments, **named)
        self.prefilter = Watched()

    monkeypatch.setattr(scan.Scan, "__init__", watched)
    return seen


def kinds():
    """name -> queries (B, D), rows (K, D); the positive of query b is row b."""
    q, c = unit(B, D, seed=1), unit(K, D, seed=2)
    yield "unit", q, c
    yield "near", q, c[:1] + 1e-3 * unit(K, D, seed=3)  # a thousand rows within the rounding of bf16
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


@pytest.mark.parametrize("name, q, c", [pytest.param(*kind, id=kind[0]) for kind in kinds()])
@pytest.mark.parametrize(
    "select", [Select(), Select(max_score=0.3), Select(absolute_margin=0.1), Select(3, relative_margin=0.05)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_bits_of_a_scan_as_stored(prefilters, monkeypatch, dtype, name, q, c, select):
    q, c = q.to(dtype), c.to(dtype)
    forms = (list(range(B)), [[b, (b + 7) % K, 3] for b in range(B)])  # ids, and a mask of pairs
    for positives, how in ((forms[0], "none"), (forms[1], "none"), (forms[0], "exact")):
        options = {"select": select, "num_negatives": 4, "deduplicate": how, "backend": "cpu"}
        got = negmine.mine_hard_negatives(q, c, positives, **options)
        assert prefilters and prefilters[-1].num_queries == B
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "isa_for", lambda *_: "avx512")
            before = len(prefilters)
            want = negmine.mine_hard_negatives(q, c, positives, **options)
            assert len(prefilters) == before
        np.testing.assert_array_equal(got.indices, want.indices)
        np.testing.assert_array_equal(got.scores.view(np.int32), want.scores.view(np.int32))
        assert got.skipped == want.skipped
    assert name != "unit" or prefilters[0].num_rescanned < B / 2  # and yet most queries need no second scan
    assert name != "near" or select != Select() or prefilters[0].num_rescanned > B / 2


def test_without_the_bound_rows_are_missed(prefilters, monkeypatch):
    """What the test above would see, were the bound too small."""
    monkeypatch.setattr(bf16_prefilter, "EXTRA", 1)
    _, q, c = next(kind for kind in kinds() if kind[0] == "near")
    want = negmine.mine_hard_negatives(q, c, list(range(B)), backend="cpu")
    monkeypatch.setattr(
        bf16_prefilter, "error_bound", lambda D, query_norms, key_norms: torch.zeros(len(query_norms[0]))
    )
    got = negmine.mine_hard_negatives(q, c, list(range(B)), backend="cpu")
    assert (got.indices != want.indices).any()


@pytest.mark.parametrize("D", [1, 2, 33, 384, 4096])
def test_the_bound_holds_where_rounding_is_worst(D):
    """Values just off the middle between two bf16 neighbours, all off to the same side; against scores in float64 as well."""
    generator = torch.Generator().manual_seed(D)
    ends = 2.0 ** torch.randint(-6, 6, (300, D), generator=generator)
    for sign in (1, -1):
        rows = ends * (1 + 2.0**-8 + sign * 2.0**-16)  # bf16 has seven bits behind the point
        q, k = rows[:100].contiguous(), rows[100:].contiguous()
        half = [bf16_prefilter.round_to_bf16(x) for x in (q, k)]
        bound = bf16_prefilter.error_bound(D, half[0][1:], half[1][1:])[:, None]
        s, a = (
            sort_key.unpack(torch.ops.negmine_cpu.rank_thresholds(x, y, torch.arange(200).repeat(100, 1), *Pool()))
            for x, y in ((q, k), (half[0][0], half[1][0]))
        )
        dense = [torch.zeros(100, 200).scatter(1, index, score) for score, index in (s, a)]
        assert bool(((dense[0] - dense[1]).abs() <= bound).all())
        assert bool(((q.double() @ k.double().T - dense[1]).abs() <= bound).all())
        assert bool((bound <= 2.0**-6 * (half[0][1] * half[1][1].max())[:, None]).all())  # and says something


def test_it_is_left_where_it_does_not_pay(monkeypatch):
    monkeypatch.setattr(compiled, "isa_for", lambda *_: "avx512bf16")
    ops = backends.choose("test", ("mine_hardest",), "cpu", (torch.empty(0, 1),))
    q, c, fresh = torch.empty(1024, 64), torch.empty(16384, 64), Bf16Prefilter()
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
    assert Bf16Prefilter(1000, 250).is_faster(ops, q, c, 5, Select()) and not Bf16Prefilter(1000, 251).is_faster(
        ops, q, c, 5, Select()
    )
    monkeypatch.setattr(compiled, "isa_for", lambda *_: "avx2")
    assert not fresh.is_faster(ops, q, c, 5, Select())


def test_what_a_list_must_be():
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
