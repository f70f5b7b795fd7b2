"""The bias of a pool is added to the logits that each op sums, and does not change scores that are compared."""

import pytest
import torch

import negmine
from negmine import Mix, Negatives, Select
from negmine.losses.info_nce import InfoNCE
from negmine.ops import backends
from negmine.ops.pool import Pool
from negmine.ops.vectors import disable_autocast
from tests import compare
from tests.cases import DTYPES, dense_mask, masks, pool_of, unit
from tests.conftest import device_of, skip_what_the_interpreter_repeats

B, K, D = 18, 150, 24
NO_DRAWS = (0, 0, 0.0, 0.0, 0.0, 0.0, False, None, 0, None, None)


def ops_of(backend):
    functions = next(row for row in backends.BACKENDS if row.name == backend).functions
    if backend == "cuda":
        pytest.skip("cuda: refuses a bias")
    return functions


def inputs(backend, dtype=torch.float32, kind="pairs"):
    device = device_of(backend)
    q, keys = unit(B, D, dtype=dtype, device=device), unit(K, D, dtype=dtype, device=device, seed=1)
    given = masks(kind, B, K, device)
    bias = torch.linspace(-3.0, 2.0, K)[torch.randperm(K)].to(device)
    return q, keys, bias, pool_of(q, keys, given), dense_mask(q, keys, given)


def dense(q, keys, bias, allowed, scale, offset, weight, cast):
    """Return lse, mean, d lse / d keys and d bias, softplus sum, sigmoid keys, d softplus sum / d keys and d bias.

    Gradients are weighted by `weight` (B,).
    """
    q, keys, bias, scale, offset, weight = (t.to(cast) for t in (q, keys, bias, scale, offset, weight))
    with disable_autocast(q.device):
        x = scale * (q @ keys.T) + bias
        lse = x.masked_fill(~allowed, -torch.inf).logsumexp(1)
        p = (x - lse[:, None]).exp().masked_fill(~allowed, 0.0)
        sigmoid = (x + offset).sigmoid().masked_fill(~allowed, 0.0)
        total = torch.nn.functional.softplus(x + offset, threshold=1e9).masked_fill(~allowed, 0.0).sum(1)
        p_weights, weights = p * weight[:, None], sigmoid * weight[:, None]  # (B, K) each
        of_lse = lse, p @ keys, p_weights.T @ q, p_weights.sum(0)
        return *of_lse, total, sigmoid @ keys, weights.T @ q, weights.sum(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["columns", "everything"])
def test_sums_and_gradients(backend, kind, dtype):
    skip_what_the_interpreter_repeats(backend, dtype)
    ops = ops_of(backend)
    q, keys, bias, pool, allowed = inputs(backend, dtype, kind)
    some = allowed.any(1)
    bias[~allowed.any(0)] = torch.nan  # hidden from all
    shown = bias.nan_to_num()
    pool = pool._replace(bias=bias)
    scale, offset = torch.tensor(5.0, device=q.device), torch.tensor(-2.0, device=q.device)
    weight = torch.linspace(0.5, 1.0, B, device=q.device)
    lse, mean, *_ = ops["logsumexp"](q, keys, scale[None], None, True, 0, None, *pool)
    rows = ops["info_nce"](q, q, keys, scale, None, True, False, None, 0, 0, *NO_DRAWS, *pool)
    total, sigmoid_keys, _, _ = ops["softplus_sum"](q, keys, scale, offset, True, *pool)
    got = {
        "lse": lse[0],
        "mean": mean[0],
        "logsumexp_grad_keys": ops["logsumexp_grad_keys"](q, keys, scale, lse[0], weight, *pool),
        "logsumexp_grad_bias": ops["logsumexp_grad_bias"](q, keys, scale, lse[0], weight, *pool),
        "total": total,
        "sigmoid_keys": sigmoid_keys,
        "softplus_sum_grad_keys": ops["softplus_sum_grad_keys"](q, keys, scale, offset, weight, *pool),
        "softplus_sum_grad_bias": ops["softplus_sum_grad_bias"](q, keys, scale, offset, weight, *pool),
    }
    truth, plain = (
        dense(q, keys, shown, allowed, scale, offset, weight, cast) for cast in (torch.float64, torch.float32)
    )
    rounding = 0.0 if dtype == torch.float32 else float(torch.finfo(dtype).eps)
    for (name, value), a, b in zip(got.items(), truth, plain, strict=True):
        if value.dim() == 2 and rounding:  # probabilities are rounded to the storage dtype
            b = a + rounding * a.abs().max()
        by_row = some if len(a) == B else slice(None)
        compare.rounded(name, value[by_row], a[by_row], b[by_row], condition=8.0)
    compare.rounded("info_nce", rows[4][some], truth[0][some], plain[0][some], condition=8.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ["info_nce", "siglip"])
def test_the_gradient_of_a_learned_bias_is_not_rounded_to_16_bits(backend, loss, dtype):
    """For every storage, its error is that of fp32 sums, compared with float64 for the same vectors."""
    skip_what_the_interpreter_repeats(backend, dtype)
    ops_of(backend)
    q, keys, bias, _, _ = inputs(backend, dtype)
    positive = unit(B, D, dtype=dtype, device=q.device, seed=2)

    def graded(cast, name):
        leaf = bias.to(torch.promote_types(cast, torch.float32)).requires_grad_()
        vectors = [t.to(cast) for t in (q, positive)]
        pool = Negatives(keys.to(cast), bias=leaf)
        numbers = {"temperature": 0.2} if loss == "info_nce" else {"scale": 5.0, "bias": -2.0}
        value = getattr(negmine, loss)(*vectors, pool, reduction="sum", backend=name, **numbers)
        return torch.autograd.grad(value, leaf)[0]

    truth, plain = graded(torch.float64, "reference"), graded(torch.float32, "reference")
    compare.rounded("d_bias", graded(dtype, backend), truth, plain, condition=8.0)


def test_a_bias_of_zeros_changes_no_bit(backend):
    ops = ops_of(backend)
    q, keys, bias, pool, _ = inputs(backend)
    scale, weight = torch.tensor(5.0, device=q.device), torch.ones(B, device=q.device)
    for name, arguments in (
        ("logsumexp", (scale[None], None, True, 3, None)),
        ("logsumexp_grad_keys", (scale, weight, weight)),
        ("softplus_sum", (scale, -scale, True)),
        ("softplus_sum_grad_keys", (scale, -scale, weight)),
        ("logsumexp_grad_bias", (scale, weight, weight)),
        ("softplus_sum_grad_bias", (scale, -scale, weight)),
    ):
        made = [ops[name](q, keys, *arguments, *pool._replace(bias=each)) for each in (None, torch.zeros_like(bias))]
        for a, b in zip(*(each if isinstance(each, tuple) else (each,) for each in made), strict=True):
            compare.exact(name, b, a)


# Ranks up to `last` of 150: summed over the columns that ranking found, or in another pass.
@pytest.mark.parametrize("last", [9, 120])
def test_bias_does_not_change_comparisons(backend, last):
    ops = ops_of(backend)
    q, keys, bias, pool, allowed = inputs(backend)
    scale, pivot = torch.tensor(5.0, device=q.device), torch.zeros(B, device=q.device)
    ranks = torch.tensor([[2, last]], device=q.device).repeat(B, 1)
    plain, biased = (
        ops["logsumexp"](q, keys, scale[None], pivot, True, 0, ranks, *pool._replace(bias=b)) for b in (None, bias)
    )
    for name, at in (("num_kept", 2), ("num_above", 3), ("sort_keys", 6)):
        compare.exact(name, biased[at], plain[at])
    for name, arguments in (("mine_hardest", (5, True)), ("rank_thresholds", (ranks,)), ("count_negatives", ())):
        made = [ops[name](q, keys, *arguments, *pool._replace(bias=each)) for each in (None, bias)]
        for a, b in zip(*(each if isinstance(each, tuple) else (each,) for each in made), strict=True):
            compare.exact(name, b, a)
    scores = (q.double() @ keys.double().T).masked_fill(~allowed, -torch.inf)
    order = scores.argsort(1, descending=True)[:, 2 : last + 1]  # (B, columns)
    x = (5.0 * scores + bias).gather(1, order)
    compare.rounded("lse", biased[0][0], x.logsumexp(1), x.float().logsumexp(1), condition=8.0)
    mean = torch.einsum("bk,bkd->bd", x.softmax(1), keys.double()[order])
    compare.rounded("mean", biased[1][0], mean, mean.float(), condition=8.0)


def test_a_column_of_bias_minus_infinity_weighs_nothing(backend):
    ops = ops_of(backend)
    q, keys, bias, _, _ = inputs(backend)
    scale, out = torch.tensor(5.0, device=q.device), torch.arange(K, device=q.device) % 3 == 0
    without = ops["logsumexp"](q, keys, scale[None], None, True, 0, None, *Pool(~out, bias=bias))
    with_it = ops["logsumexp"](q, keys, scale[None], None, True, 0, None, *Pool(bias=bias.masked_fill(out, -torch.inf)))
    for a, b in zip(with_it[:2], without[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"decoupled": True}, {"select": Select(0.1, 0.6)}, {"mix": Mix(6, 5, 4)}],
    ids=lambda o: ",".join(o) or "plain",
)
def test_info_nce_is_one_op_with_a_bias(backend, options, monkeypatch):
    """Loss, statistics and every gradient are those of the reference."""
    calls, forward = [], InfoNCE.forward
    monkeypatch.setattr(InfoNCE, "forward", lambda ctx, *given: calls.append(1) or forward(ctx, *given))
    q, keys, bias, _, _ = inputs(backend)
    positive = unit(B, D, device=q.device, seed=2)

    def run(dtype, name):
        leaves = [t.to(dtype).requires_grad_() for t in (q, positive, keys, bias, torch.tensor(0.3, device=q.device))]
        pool = Negatives(leaves[2], bias=leaves[3])
        call = {"temperature": leaves[4], "reduction": "none", "return_stats": True, "backend": name}
        rows, stats = negmine.info_nce(leaves[0], leaves[1], pool, seed=2, **options, **call)
        weight = torch.linspace(0.5, 1, B, device=q.device)
        return [rows, stats.logsumexp, *torch.autograd.grad((rows * weight).sum(), leaves)], stats

    got, stats = run(torch.float32, backend)
    assert len(calls) == 1
    (truth, want), (plain, _) = (run(dtype, "reference") for dtype in (torch.float64, torch.float32))
    for name, k, t, p in zip(("loss", "lse", "query", "positive", "keys", "bias", "T"), got, truth, plain, strict=True):
        compare.rounded(name, k.detach(), t.detach(), p.detach(), condition=8.0)
    for name in ("positive_rank", "num_negatives", "num_empty"):
        compare.exact(name, getattr(stats, name), getattr(want, name))
