"""The choice of an instruction set, and shapes of every kind on each instruction set, as in test_isa.py."""

import pytest
import torch

from negmine.ops.pool import Pool
from tests import compare
from tests.cases import DTYPES, ids, unit
from tests.test_isa import ISAS
from tests.test_isa import isa as isa  # the fixture

TYPES = [(q, k) for q in DTYPES for k in DTYPES]  # of queries and of the queue


def summed(q, keys, scale, pivot, want_mean, pool):
    """Call logsumexp with one scale. Return lse (B,), mean (B, D), num_kept and num_above (B,)."""
    op = torch.ops.negmine_cpu.logsumexp
    lse, mean, num_kept, num_above, *_ = op(q, keys, scale[None], pivot, want_mean, 0, None, *pool)
    return lse[0], mean[0], num_kept, num_above


def names_of(types):
    return [str(dtype).removeprefix("torch.") for dtype in types]


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_the_choice_is_by_storage_and_the_same_for_all_ops(isa, types):
    from negmine import _ops_cpu

    assert _ops_cpu.isa() == _ops_cpu.isa_for(*names_of(types)) == isa  # forced
    q, keys = unit(70, 40, dtype=types[0]), unit(9000, 40, dtype=types[1], seed=1)

    def run():
        scores = torch.ops.negmine_cpu.mine_hardest(q, keys, 300, False, *Pool())[0]
        places = torch.ops.negmine_cpu.rank_thresholds(q, keys, torch.tensor([[7, 299]]).expand(70, 2), *Pool())
        return scores, places, *summed(q, keys, torch.tensor(9.0), None, True, Pool())[:2]

    assert _ops_cpu.set_isa("") and _ops_cpu.isa() == ""
    chosen, automatic = _ops_cpu.isa_for(*names_of(types)), run()
    assert chosen in ISAS and _ops_cpu.set_isa(chosen)
    for name, got, want in zip(("scores", "places", "lse", "mean"), automatic, run(), strict=True):
        compare.exact(name, got, want)
    with pytest.raises(ValueError, match="isa_for: query and keys must be float32, bfloat16 or float16"):
        _ops_cpu.isa_for("float32", "float64")


# Rows that tiles read directly, and rows that are copied first: D and K that are multiples of a tile or not; one, some and many
# blocks of queries; one chunk and several; D so large that chunks are short.
SUMMED = [
    (256, 4096, 128),
    (100, 1000, 96),
    (64, 300, 100),
    (33, 129, 31),
    (16, 32, 32),
    (1, 5000, 64),
    (130, 700, 300),
]
SUMMED += [(1100, 260, 32), (40, 200, 600)]


@pytest.mark.parametrize(
    "types", [(torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.float32,) * 2], ids=str
)
@pytest.mark.parametrize("B, K, D", SUMMED)
def test_every_class_of_shape_sums_right(isa, types, B, K, D):
    from negmine import _ops_cpu

    assert _ops_cpu.isa_for(*names_of(types)) == isa
    q, wide, scale = unit(B, D, dtype=types[0]), unit(K, D + 3, dtype=types[1], seed=1), torch.tensor(14.0)
    keys, pivot, tags = wide[:, :D], torch.zeros(B), ids(B, K)  # rows are not contiguous
    hidden = tags["query_ids"][:, None] == tags["negative_ids"]
    scores = q.double() @ keys.double().T
    per_row, per_column = torch.rand(B, K) < 0.7, torch.rand(K) < 0.7
    pools = [
        (Pool(), torch.ones(B, K, dtype=torch.bool)),
        (Pool(**tags), ~hidden),
        (Pool(per_row), per_row),
        (Pool(per_column, **tags), per_column & ~hidden),
    ]
    for pool, allowed in pools:
        lse, mean, kept, above = summed(q, keys, scale, pivot, True, pool)
        x = (14 * scores).masked_fill(~allowed, -torch.inf)
        compare.exact("kept", kept, allowed.sum(1))
        assert bool((above - (allowed & (scores > 0)).sum(1)).abs().le(1 + B * K // 100_000).all())
        compare.rounded("lse", lse, x.logsumexp(1), x.logsumexp(1).float(), 14.0)
        truth, rounds = x.softmax(1).nan_to_num(0.0) @ keys.double(), types == (torch.bfloat16,) * 2
        size = float(keys.abs().max())
        assert float((mean.double() - truth).abs().max()) <= (2.0**-8 if rounds else 2.0**-18) * size
        compare.exact("alone", summed(q, keys, scale, None, False, pool)[0], lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.5, 100.0, -60.0])
def test_a_shift_moves_for_one_query_and_no_other(isa, dtype, scale):
    """Scores rise along the queue for some queries, fall for others, and jump for a few. Each sum is the same as alone."""
    B, K, D = 70, 9000, 24
    q, keys = unit(B, D, dtype=dtype), unit(K, D, seed=1)
    keys = (keys[(keys @ q[0].float()).argsort()] * torch.linspace(0.1, 1.0, K)[:, None]).to(dtype)
    keys[[31, 32, 500, 4096, 8999]] *= 4.0
    args = torch.tensor(scale), None, True, Pool()
    lse, mean, *_ = summed(q, keys, *args)
    x = scale * (q.double() @ keys.double().T)
    condition = float(x.abs().max())
    compare.rounded("lse", lse, x.logsumexp(1), x.logsumexp(1).float(), condition)
    share = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20 * condition
    assert float((mean.double() - x.softmax(1) @ keys.double()).abs().max()) <= share * float(keys.abs().max())
    for b in (0, 17, 69):
        alone = summed(q[b : b + 1], keys, *args)
        compare.exact("lse", alone[0], lse[b : b + 1])
        compare.exact("mean", alone[1], mean[b : b + 1])
