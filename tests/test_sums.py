"""logsumexp and softplus_sum on every backend compared with the reference, and the rules for all ops."""

from functools import partial

import pytest
import torch

import negmine
from negmine import Negatives, Select, reference
from tests import compare
from tests.cases import DTYPES, dense_mask, masks, negatives, tags, unit
from tests.conftest import device_of, interpreted, skip_what_the_interpreter_repeats
from tests.test_kernels import each_shape, gradients

CASES = [
    ({}, "none"),
    ({}, "everything"),
    ({}, "nothing left"),
    ({"select": Select(0, 0.05)}, "ids"),
    ({"select": Select(1, 0.5, absolute_margin=0.02)}, "columns"),
    ({"select": Select(0, 0.5, sample=6)}, "ids"),
    ({"select": Select(1, 5, sample=7, replace=True)}, "columns"),  # more samples than columns in the window
]
KEY = (2**32 - 1, 3, 2**33 + 7)  # seed, step, row_offset of samples
SUMS = {"logsumexp": negmine.logsumexp, "softplus_sum": negmine.losses.softplus_sum}
NUMBERS = {"logsumexp": {"temperature": 0.1}, "softplus_sum": {"scale": 12.0, "bias": -3.0}}
B, K, D = 4, 60, 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options, kind", CASES, ids=lambda v: v if isinstance(v, str) else ",".join(v) or "plain")
@pytest.mark.parametrize("op", NUMBERS)
def test_value_and_every_gradient(backend, op, options, kind, dtype):
    skip_what_the_interpreter_repeats(backend, dtype, kind)
    for rows, columns, width, _, device, seed in each_shape(backend):
        q, pos, keys = (
            unit(n, width, dtype=dtype, device=device, seed=seed + i) for i, n in enumerate((rows, rows, columns))
        )
        given = masks(kind, rows, columns, device)

        def run(cast, function, q=q, keys=keys, device=device, given=(), **more):
            leaves = [t.to(cast).detach().requires_grad_() for t in (q, keys)]
            wide = torch.promote_types(cast, torch.float32)
            numbers = {
                name: torch.tensor(x, dtype=wide, device=device).requires_grad_() for name, x in NUMBERS[op].items()
            }
            columns = negatives(leaves[1], given) if given else leaves[1]
            value = function(leaves[0], columns, **numbers, **more)
            finite = value.masked_fill(value == -torch.inf, 0.0)
            return value, *gradients(finite, [*leaves, *numbers.values()])

        dense = {"usable": dense_mask(q, keys, given), "positive_score": (q.float() * pos.float()).sum(1), **options}
        dense["draw"], key = KEY, dict(zip(("seed", "step", "row_offset"), KEY, strict=True))
        call = {"positive_key": pos, "backend": backend, **key, **options, **tags(given)}
        got = run(dtype, SUMS[op], given=given, **call)
        truth = run(torch.float64, getattr(reference.sums, op), **dense)
        plain = run(dtype, getattr(reference.sums, op), **dense)
        condition = 12.0  # the largest logit
        for name, k, t, p in zip(("value", "d_query", "d_keys", *NUMBERS[op]), got, truth, plain, strict=True):
            compare.rounded(f"{op} {name} {rows, columns, width}", k, t, p, condition)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_softplus_keeps_its_precision_far_below_zero(isa):
    """1 + exp(-60) rounds to 1, so the log of that sum would be 0. For large x, softplus(x) = x."""
    from negmine import _ops_cpu

    used = _ops_cpu.isa()
    if not _ops_cpu.set_isa(isa):
        pytest.skip(f"this processor or build lacks {isa}")
    try:
        q, keys = torch.ones(3, 1), torch.linspace(-1.0, 1.0, 301)[:, None]
        for scale, bias in ((30.0, -60.0), (80.0, 0.0), (1.0, 300.0), (2.0, -70.0)):
            got = negmine.losses.softplus_sum(q, keys, scale=scale, bias=bias, backend="cpu")
            truth = reference.softplus_sum(q.double(), keys.double(), scale, bias)
            torch.testing.assert_close(got.double(), truth, rtol=3e-6, atol=0)
    finally:
        _ops_cpu.set_isa(used)


@pytest.mark.parametrize("op", NUMBERS)
def test_finite_differences(op):
    q, keys = unit(B, D).double().requires_grad_(), unit(K, D, seed=1).double().requires_grad_()
    numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in NUMBERS[op].values()]
    given = masks("ids", B, K)

    def function(q, keys, *numbers):
        named = dict(zip(NUMBERS[op], numbers, strict=True))
        columns = negatives(keys, given)
        return SUMS[op](q, columns, select=Select(0, 0.5), backend="reference", **named, **tags(given))

    assert torch.autograd.gradcheck(function, (q, keys, *numbers))


@pytest.mark.parametrize("op", NUMBERS)
def test_against_loops(op):
    q, keys = unit(B, D).double(), unit(K, D, seed=1).double()
    keep = torch.rand(B, K) < 0.5
    keep[1] = False
    got = SUMS[op](q, Negatives(keys, mask=keep), **NUMBERS[op])
    for b in range(B):
        kept = [float(q[b] @ keys[k]) for k in range(K) if keep[b, k]]
        x = torch.tensor(kept, dtype=torch.float64)
        if op == "logsumexp":
            want = (x / 0.1).exp().sum().log()
        else:
            want = (1 + (12.0 * x - 3.0).exp()).log().sum()
        torch.testing.assert_close(got[b], want)


@pytest.mark.parametrize("op", NUMBERS)
def test_rows_stand_alone_and_the_queue_may_be_overwritten(any_backend, op):
    device = device_of(any_backend)
    q, keys = unit(B, D, device=device), unit(K, D, seed=1, device=device)
    q[2] = torch.nan
    function, options = SUMS[op], {**NUMBERS[op], "backend": any_backend}
    q.requires_grad_()
    value = function(q, keys, **options)
    alone = torch.cat([function(q[b : b + 1], keys, **options) for b in range(B)])
    if any_backend == "reference":  # its matrix product may round differently for another shape
        torch.testing.assert_close(alone, value, equal_nan=True)
    else:
        compare.exact("rows alone", value, alone)
    assert value.isnan().tolist() == [False, False, True, False]
    (want,) = torch.autograd.grad(value[[0, 1, 3]].sum(), q, retain_graph=True)
    keys.fill_(7.0)
    (got,) = torch.autograd.grad(value[[0, 1, 3]].sum(), q)
    compare.exact("gradient", got[[0, 1, 3]], want[[0, 1, 3]])


@pytest.mark.parametrize("op", NUMBERS)
def test_windows_partition_the_pool(any_backend, op):
    """Together, [0, a) and [a, 1) have every column once."""
    device = device_of(any_backend)
    q, keys = unit(B, D, device=device), unit(K, D, seed=1, device=device)

    def value(select):
        return SUMS[op](q, keys, select=select, backend=any_backend, **NUMBERS[op])

    hard, easy, whole = value(Select(0, 0.3)), value(Select(0.3, 1.0)), value(None)
    both = torch.logaddexp(hard, easy) if op == "logsumexp" else hard + easy
    torch.testing.assert_close(both, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", NUMBERS)
def test_no_query_and_no_key(any_backend, op):
    if interpreted(any_backend):
        pytest.skip("triton: interpreted, the launchers' empty grids are those of the kernels' own tests")
    device = device_of(any_backend)
    empty, none = torch.zeros(0, D, device=device), torch.zeros(0, D, device=device)
    q = unit(B, D, device=device).requires_grad_()
    function = SUMS[op]
    assert function(empty, unit(K, D, device=device), backend=any_backend).shape == (0,)
    value = function(q, none, backend=any_backend)
    assert torch.equal(value, torch.full_like(value, -torch.inf if op == "logsumexp" else 0.0))
    value.masked_fill(value == -torch.inf, 0.0).sum().backward()
    assert not q.grad.any()


def test_sampling_runs_dense_and_agrees_with_info_nce():
    q, pos, keys = unit(B, D), unit(B, D, seed=2), unit(K, D, seed=1)
    options = {"select": Select(0, 0.5, sample=9, replace=True), "seed": 3, "step": 5, "row_offset": 2}
    lse = negmine.logsumexp(q, keys, temperature=0.2, **options)
    rows = torch.nn.functional.softplus(lse - (q * pos).sum(1) / 0.2)
    torch.testing.assert_close(rows, negmine.info_nce(q, pos, keys, temperature=0.2, reduction="none", **options))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    torch._dynamo.reset()

    def step(q, pos, keys):
        return negmine.siglip(q, pos, keys, select=Select(0, 0.5)) + negmine.logsumexp(q, keys).sum()

    inputs = unit(B, D), unit(B, D, seed=2), unit(K, D, seed=1)
    got = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, step(*inputs))


@pytest.mark.parametrize("op", NUMBERS)
def test_a_row_that_is_masked_for_all_is_never_read(op, any_backend):
    device = device_of(any_backend)
    q, keys = unit(B, D, device=device).requires_grad_(), unit(K, D, device=device, seed=1)
    mask = torch.arange(K, device=device) % 7 != 3
    call = partial(SUMS[op], q, backend=any_backend, **NUMBERS[op])
    want = call(Negatives(keys, mask=mask))
    got = call(Negatives(torch.where(mask[:, None], keys, torch.nan), mask=mask))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    d_got, d_want = (torch.autograd.grad(value.sum(), q)[0] for value in (got, want))
    torch.testing.assert_close(d_got, d_want, rtol=0, atol=0)
