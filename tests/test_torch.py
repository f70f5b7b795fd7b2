"""torch's own toolbox on our ops: opcheck, torch.compile(fullgraph=True), offsets past 2^31, the table of backends."""

import numpy as np
import pytest
import torch

import negmine
from negmine import FalseNegatives, Mix, Select, Weight, backends, order
from negmine.mixing import draws_of
from tests.cases import ids, unit
from tests.conftest import device_of

B, K, D = 5, 70, 8


@pytest.fixture(autouse=True)
def _cold_compiler():
    torch._dynamo.reset()


def cpp_ops():
    row = next(row for row in backends.BACKENDS if row.name == "cpu")
    if row.refusal:
        pytest.skip(row.refusal)
    return row.launchers


def arguments():
    """One set of arguments for every compiled op, with and without a pool."""
    q, keys, scale = unit(B, D), unit(K, D, seed=1), torch.tensor(5.0)
    tags = ids(B, K)
    bounds = (order.pack(torch.full((B,), -0.5), order.LAST_INDEX), order.pack(torch.full((B,), 0.5), 0))
    pools = [
        (None,) * 7,
        (torch.rand(B, K) < 0.8, *tags.values(), *tags.values(), *bounds),
        (None, None, None, *tags.values(), None, None, True),  # the pool of equal labels
    ]
    index = torch.randint(0, K, (B, 6))
    draws = draws_of(Mix(6, 5, 4, concentration=2.0), q.device, 1, 2, 3)
    for pool in pools:
        yield "logsumexp", (q, keys, scale, torch.zeros(B), True, *pool)
        yield "logsumexp", (q, keys.bfloat16(), scale, None, False, *pool)
        yield "logsumexp_mine", (q, keys, 7, scale, torch.zeros(B), True, *pool)
        yield "logsumexp_window", (q, keys, torch.tensor([[1, 4]]).repeat(B, 1), scale, torch.zeros(B), True, *pool)
        yield "logsumexp_pair", (q, keys, torch.stack([scale, 2 * scale]), torch.zeros(B), True, *pool)
        yield "logsumexp_pair", (q, keys.bfloat16(), torch.stack([scale, 2 * scale]), None, False, *pool)
        yield "logsumexp_grad_keys", (q, keys, scale, torch.ones(B), torch.ones(B), *pool)
        yield "softplus_sum", (q, keys, scale, -scale, True, *pool)
        yield "softplus_sum_grad_keys", (q, keys.bfloat16(), scale, -scale, torch.ones(B), *pool)
        yield "mine_hardest", (q, keys, 9, *pool)
        yield "mine_hardest_kept", (q, keys, 9, *pool)
        yield "rank_thresholds", (q, keys, torch.tensor([[0, 3, 99]]).repeat(B, 1), *pool)
        yield "count_negatives", (q, keys, *pool)
    yield "mine_listed", (q, keys.bfloat16(), index.sort(1).values, 3, None)
    yield "mine_listed", (q, keys, index.sort(1).values, 9, torch.zeros(B))
    yield "mix_negatives", (q, keys, index, *draws)
    yield "mix_logsumexp", (q, keys, index, scale, True, *draws)
    yield "listed_logsumexp", (q, keys.bfloat16(), index, scale, True)
    yield "listed_logsumexp", (q, keys, index[:, :0], scale, False)
    yield "listed_grad_keys", (q, index, torch.ones(index.shape), K)


def test_opcheck():
    ops = cpp_ops()
    seen = set()
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs of ops that it calls by reflection
    for op, args in arguments():
        torch.library.opcheck(ops[op], args)
        seen.add(op)
    assert seen == set(ops)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"select": Select(0.01, 0.5)},
        {"select": Select(1, 3)},
        {"mix": Mix(6, 5, 4, concentration=2.0)},
        {"weight": Weight(1.0, 0.01)},
        {"decoupled": True},
        {"select": Select(0.0, 0.5, sample=5)},
        {"select": Select(1, 9, sample=5, replace=True)},
        {"mix": Mix(6, 5, 4, detach=False)},
        {"false_negatives": FalseNegatives(3, 0.1, mode="attract"), "support": unit(B, 2, D, seed=7)},
        {"false_negatives": FalseNegatives(None, 0.1), "support": unit(B, 2, D, seed=7)},
    ],
    ids=lambda o: ",".join(o) or "plain",
)
def test_a_loss_step_compiles_into_one_graph(options, dynamic):
    cpp_ops()
    tags = ids(B, K)

    def step(q, pos, keys):
        return negmine.info_nce(q, pos, keys, **options, **tags)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs = unit(B, D), unit(B, D, seed=1), unit(K, D, seed=2)
    results = []
    for function in (step, compiled):
        q = inputs[0].clone().requires_grad_()
        loss = function(q, *inputs[1:])
        loss.backward()
        results.append((loss.detach(), q.grad))
    torch.testing.assert_close(results[1], results[0])


def test_mining_compiles_into_one_graph():
    cpp_ops()
    q, keys = unit(B, D), unit(K, D, seed=1)
    compiled = torch.compile(lambda q, keys: negmine.mine_hardest(q, keys, 4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, keys).index, negmine.mine_hardest(q, keys, 4).index)


def test_offsets_past_two_to_the_31(backend):
    """Rows 2^28 elements apart: row 8 starts 2^31 elements in. Only the pages of the rows are ever touched."""
    if device_of(backend) != "cpu":
        storage = torch.empty(2**31 + 64, dtype=torch.float16, device=device_of(backend))
    else:
        storage = torch.from_numpy(np.zeros(2**31 + 64, dtype=np.float16))
    far = storage.as_strided((9, 8), (2**28, 1))
    near = unit(9, 8, dtype=torch.float16, device=storage.device)
    far.copy_(near)
    q, pos = (unit(3, 8, device=storage.device, seed=s) for s in (1, 2))
    for keys in (far, near):
        q.grad = None
        leaf = q.clone().requires_grad_()
        loss = negmine.info_nce(leaf, pos, keys, mix=Mix(3, 4, 2), backend=backend)
        loss.backward()
        mined = negmine.mine_hardest(q, keys, 9, backend=backend)
        if keys is far:
            want = loss.detach(), leaf.grad, mined
    # A kernel compiled for another row stride may add in another order.
    torch.testing.assert_close(want[0], loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(want[1], leaf.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(want[2].index, mined.index)


def test_the_table_says_why():
    rows = {row.name: row for row in backends.BACKENDS}
    for name, row in rows.items():
        assert name == "reference" or bool(row.launchers) != bool(row.refusal)
        assert set(row.launchers) <= {*backends.OPS, *backends.SPARED}
    if rows["cuda"].refusal:
        with pytest.raises(backends.BackendUnavailable, match="takes cuda tensors"):
            negmine.mine_hardest(unit(2, 4), unit(5, 4), 2, backend="cuda")


def test_a_gpu_call_on_the_reference_warns_once(monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match="stores the score matrix"):
        backends._warn_dense("info_nce", "cuda", "float64 input")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends._warn_dense("info_nce", "cuda", "float64 input")
        backends._warn_dense("info_nce", "cpu", "float64 input")
