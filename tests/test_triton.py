"""What the Triton backend promises beyond tests/test_kernels.py, on a GPU or interpreted: torch ops for torch.compile, one score
by one sequence of operations, the reference's draws to the bit, fp16's range, grids that no axis limits."""

import importlib

import pytest
import torch

import negmine
from negmine import Mix, Select, reference
from negmine.ops import backends, sort_key
from negmine.ops.philox import beta_quantiles
from tests import compare
from tests.cases import DTYPES, ids, unit
from tests.conftest import DEVICE, _reason_not_here, interpreted, skip_what_the_interpreter_repeats
from tests.test_torch import arguments

pytestmark = pytest.mark.skipif(bool(_reason_not_here("triton")), reason=_reason_not_here("triton") or "-")
B, K, D = 5, 70, 8


def launchers():
    return next(row for row in backends.BACKENDS if row.name == "triton").functions


def on_device(args):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args]


def test_opcheck():
    """Of each op its last call: pools of equal labels, and both ops that mix."""
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs of ops that it calls by reflection
    last = dict(arguments())
    del last["mine_listed"], last["logsumexp_window"]  # on the CPU alone
    assert set(last) == set(launchers()) - set(backends.SPARED)
    # On Triton two calls of other ops, and no op of its own.
    for joined in ("logsumexp_pair", "logsumexp_mine", "mine_hardest_kept"):
        del last[joined]
    for op, args in last.items():
        torch.library.opcheck(getattr(torch.ops.negmine_triton, op).default, tuple(on_device(args)))


@pytest.mark.parametrize(
    "options",
    [{}, {"select": Select(0.01, 0.5)}, {"mix": Mix(6, 5, 4, concentration=2.0)}],
    ids=lambda o: ",".join(o) or "plain",
)
def test_a_loss_step_compiles_into_one_graph(options):
    torch._dynamo.reset()
    tags = ids(B, K, DEVICE)
    inputs = [unit(n, D, device=DEVICE, seed=i) for i, n in enumerate((B, B, K))]

    def step(q, pos, keys):
        return negmine.info_nce(q, pos, keys, **options, **tags, backend="triton")

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        q = inputs[0].clone().requires_grad_()
        loss = function(q, *inputs[1:])
        loss.backward()
        results.append((loss.detach(), q.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 64, 200], ids=lambda w: f"D={w}")
def test_a_score_is_the_same_bits_in_every_op(dtype, width):
    """Real vectors: a threshold found by one pass cuts the other passes exactly where it was found, whatever else they do."""
    skip_what_the_interpreter_repeats("triton", dtype)
    if interpreted("triton") and width > 16:
        pytest.skip("triton: interpreted, where every width adds up in one order")
    rows, keys_count = (3, 150) if interpreted("triton") else (130, 20_001)
    q, keys = (unit(n, width, dtype=dtype, device=DEVICE, seed=i) for i, n in enumerate((rows, keys_count)))
    ranks = torch.tensor([[0, keys_count // 30, keys_count // 2]], device=DEVICE).repeat(rows, 1)
    ops, nothing = launchers(), (None,) * 5
    places = ops["rank_thresholds"](q, keys, ranks)  # (B, R)
    mined = sort_key.pack(*ops["mine_hardest"](q, keys, keys_count // 30 + 1))  # (B, N)
    compare.exact("rank against mined", places[:, :2], mined[:, [0, -1]])
    scale = torch.tensor(5.0, device=DEVICE)
    top = sort_key.pack(torch.full((rows,), torch.inf, device=DEVICE), 0)
    for column, rank in enumerate(ranks[0].tolist()):
        pool = (*nothing, places[:, column].contiguous(), top)
        compare.exact("count", ops["count_negatives"](q, keys, *pool), ranks[:, column] + 1)
        lse, _, kept, _ = ops["logsumexp"](q, keys, scale, None, True, *pool)
        compare.exact("kept", kept, ranks[:, column] + 1)
        # Of a pool that ends at a rank, the key at that rank has a gradient and the next one has none.
        if rank + 1 < keys_count and column < 2:
            one = ops["logsumexp_grad_keys"](q[:1], keys, scale, lse[:1], lse.new_ones(1), *(x and x[:1] for x in nothing),
                                             *(x[:1].contiguous() for x in pool[5:]))  # fmt: skip
            touched = (one != 0).any(1)  # (K,)
            assert int(touched.sum()) == rank + 1


def test_ranks_at_both_ends_need_no_fallback(monkeypatch):
    """Regression: the last rank's bracket was empty, for want of sampled keys beyond it: percentile(0) took the slow way."""
    module = importlib.import_module(
        "negmine.kernels.triton.rank_thresholds"
    )  # the package's attribute is the launcher
    failed = []
    monkeypatch.setattr(
        module, "place_at_rank", lambda q, keys, missing, *rest: failed.append(int((missing >= 0).sum()))
    )
    q, keys = unit(16, 16, device=DEVICE), unit(1500 if interpreted("triton") else 20_001, 16, device=DEVICE, seed=1)
    last = len(keys) - 1
    got = negmine.rank_thresholds(q, keys, [0, 1, last - 20, last - 1, last], backend="triton")
    ends = torch.stack((q @ keys.T).aminmax(dim=1)[::-1], 1)  # (B, 2)
    torch.testing.assert_close(got[:, [0, -1]], ends, rtol=0, atol=1e-6)
    assert failed and sum(failed) == 0


@pytest.mark.parametrize("count", [2, 3, 70], ids=lambda R: f"{R} ranks")
def test_rows_in_chunks_are_the_rows_at_once(count, monkeypatch):
    """A row at a time, where scratch memory has room for no more: each path of ranks, and mining."""
    q, keys, tags = unit(B, D, device=DEVICE), unit(K, D, device=DEVICE, seed=1), ids(B, K, DEVICE)
    ranks = torch.arange(count).tolist()

    def found():
        mined = negmine.mine_hardest(q, keys, 6, **tags, backend="triton")
        return negmine.rank_thresholds(q, keys, ranks, **tags, backend="triton"), mined.scores, mined.index

    want = found()
    monkeypatch.setattr("negmine.kernels.triton.tiles.SCRATCH_BYTES", 1)
    for got, at_once in zip(found(), want, strict=True):
        compare.exact("rows", got, at_once)


@pytest.mark.parametrize("concentration", [1.0, 0.5])
def test_coefficients_are_the_references_bits(concentration):
    mix = Mix(6, 40, 40, pair_range=(0.1, 0.93), query_range=(0.07, 0.5), concentration=concentration)
    q, keys = unit(B, D, device=DEVICE), unit(K, D, device=DEVICE, seed=1)
    got = negmine.mix_negatives(q, keys, mix, seed=3, step=4, backend="triton")
    want = reference.mix_negatives(q.cpu(), keys.cpu(), mix, seed=3, step=4)
    compare.exact("coefficients", got.coefficients.cpu(), want[2])
    assert (beta_quantiles(concentration) is None) == (concentration == 1.0)


def test_nan_stays_in_its_mixes():
    q, keys = unit(2, 6, device=DEVICE), unit(9, 6, device=DEVICE, seed=1)
    index = negmine.mine_hardest(q, keys, 4, backend="triton").index
    q[1, 2] = torch.nan
    draws = (2, 3, 0.0, 1.0, 0.2, 0.5, True, None, 0, 0, 0)
    vectors, _, _ = launchers()["mix_negatives"](q, keys, index, *draws)
    assert bool(vectors[0].isfinite().all()) and bool(vectors[1, :2].isfinite().all())
    assert bool(vectors[1, 2:].isnan().all())  # all of a vector, as its norm is


@pytest.mark.parametrize("size", [2.0**22, 2.0**-30])
def test_fp16_key_gradients_have_the_range_of_fp32(size):
    """Regression: probabilities times weights overflow fp16 under a gradient scaler, and vanish for one key of many."""
    q, keys = unit(16, 16, dtype=torch.float16, device=DEVICE), unit(K, 16, dtype=torch.float16, device=DEVICE, seed=1)
    scale, weight = torch.tensor(14.0, device=DEVICE), torch.full((16,), size, device=DEVICE)
    lse = launchers()["logsumexp"](q, keys, scale, None, False)[0]
    got = launchers()["logsumexp_grad_keys"](q, keys, scale, lse, weight)
    p = torch.softmax(q.double() @ keys.double().T * 14.0, 1)  # (B, K)
    want = p.T @ (q.double() * size)  # (K, D)
    assert float((got - want).abs().max()) <= 4 * torch.finfo(torch.float16).eps * float(want.abs().max())


def test_more_mixes_than_a_grid_axis_takes():
    """65,535 blocks are the limit of the second axis of a grid."""
    slots = 70_000 if not interpreted("triton") else 90
    q, keys = unit(2, 5000, device=DEVICE), unit(3, 5000, device=DEVICE, seed=1)
    index = torch.tensor([[2, 0], [1, -1]], device=DEVICE)
    parents = launchers()["mix_negatives"](q, keys, index, 0, slots, 0.0, 1.0, 0.0, 0.5, True, None, 0, 0, 0)[1]
    assert bool((parents[1, :, 1] == 1).all()) and sorted(parents[0, :, 1].unique().tolist()) == [0, 2]
