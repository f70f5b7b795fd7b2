"""Compare every backend with the reference, op by op, through the public functions, with the tolerances of tests/compare.py."""

import itertools

import pytest
import torch

import negmine
from negmine import Mix, Negatives, Select, Weight, reference
from negmine.ops import backends, sort_key
from tests import compare
from tests.cases import DTYPES, FEW_SHAPES, MASKS, dense_mask, masks, negatives, pool_of, shapes_for, tags, unit, whole
from tests.conftest import device_of, interpreted, skip_what_the_interpreter_repeats


def each_shape(backend):
    device = device_of(backend)
    for seed, (B, K, D, N) in enumerate(shapes_for(backend)):
        yield B, K, D, N, device, seed


def each_mask(backend, B, K, device):
    """For functions whose use of masks is that of mine_hardest or rank_thresholds."""
    kinds = ["ids", "nothing left"] if interpreted(backend) else ["none", "ids", "nothing left"]
    return [masks(kind, B, K, device) for kind in kinds]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mining_is_exact_on_integers(backend, dtype):
    skip_what_the_interpreter_repeats(backend, dtype)
    for B, K, D, N, device, seed in each_shape(backend):
        q, keys = (
            whole(B, D, dtype=dtype, device=device, seed=seed),
            whole(K, D, dtype=dtype, device=device, seed=seed + 1),
        )
        got = negmine.mine_hardest(q, keys, N, backend=backend)
        want = reference.mine_hardest(q.float(), keys.float(), N)
        compare.exact(f"scores {B, K, D, N}", got.scores, want[0])
        compare.exact(f"index {B, K, D, N}", got.index, want[1])


@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_exact_on_integers(backend, kind):
    scanned = [(17, 70, 16, 8, "cpu", 6)] if interpreted(backend) and kind in ("none", "everything") else []
    for B, K, D, N, device, seed in (*each_shape(backend), *scanned):
        q, keys = whole(B, D, device=device, seed=seed), whole(K, D, device=device, seed=seed + 1)
        given = masks(kind, B, K, device)
        allowed = dense_mask(q, keys, given)
        got = negmine.mine_hardest(q, negatives(keys, given), N, **tags(given), backend=backend)
        want = reference.mine_hardest(q, keys, N, allowed)
        compare.exact(f"scores {B, K, D, N}", got.scores, want[0])
        compare.exact(f"index {B, K, D, N}", got.index, want[1])
        ranks = [0, K // 2, max(K - 1, 0), K]
        got_ranks = negmine.rank_thresholds(q, negatives(keys, given), ranks, **tags(given), backend=backend)
        want_ranks = reference.rank_thresholds(q, keys, torch.tensor([ranks], device=device).expand(B, 4), allowed)
        compare.exact(f"ranks {B, K, D}", got_ranks, want_ranks)


@pytest.mark.parametrize("kind", MASKS)
def test_every_rank_has_its_sort_key(backend, kind):
    """Many ranks, more than are searched one by one. Equal scores are ranked by index, and NaN scores have no rank."""
    find = next(row for row in backends.BACKENDS if row.name == backend).functions.get("rank_thresholds")
    if find is None:
        pytest.skip(f"{backend} has no rank_thresholds")
    for B, K, D, _, device, seed in each_shape(backend):
        q, keys = whole(B, D, device=device, seed=seed), whole(K, D, device=device, seed=seed + 1)
        keys[K // 2] = torch.nan
        keys[K // 3] = -keys[K // 2]  # a NaN that is below all numbers as a bit pattern
        pool = pool_of(q, keys, masks(kind, B, K, device))
        scores, index = reference.mine_hardest(q, keys, K + 2, dense_mask(q, keys, masks(kind, B, K, device)))
        ranking = sort_key.pack(scores, index).masked_fill(index < 0, sort_key.NOWHERE)  # (B, K + 2)
        for first in (-1, K // 2, K - 25):
            shuffled = torch.randperm(K + 2 - first).to(device) + first
            ranks = torch.cat([shuffled, shuffled[:9]]).repeat(B, 1)  # (B, R), some twice
            want = ranking.gather(1, ranks.clamp_min(0)).masked_fill(ranks < 0, sort_key.NOWHERE)
            compare.exact(f"places from {first} of {B, K, D}", find(q, keys, ranks, *pool), want)


def test_quantile_is_torch_quantile(backend):
    for B, K, D, _, device, seed in each_shape(backend):
        q, keys = unit(B, D, device=device, seed=seed), unit(K, D, device=device, seed=seed + 1)
        for given in each_mask(backend, B, K, device):
            levels = [0.0, 0.25, 0.95, 1.0]
            got = negmine.quantile(q, negatives(keys, given), levels, **tags(given), backend=backend)
            wanted = torch.tensor(levels, dtype=torch.float64, device=device)
            allowed = dense_mask(q, keys, given)
            truth = reference.quantile(q.double(), keys.double(), wanted, allowed)
            plain = reference.quantile(q, keys, wanted, allowed)
            summed = q.abs() @ keys.abs().T  # sums of absolute products, which bound the rounding of scores
            compare.rounded(f"quantile {B, K, D}", got, truth, plain, terms=summed)


def test_quantile_past_torch_quantiles_limit():
    """Regression: torch.quantile refuses more than 2^24 elements at once."""
    q, keys = unit(260, 8), unit(65_536, 8, seed=1)
    got = negmine.quantile(q, keys, [0.05, 0.95, 0.999])
    scores = q @ keys.T
    assert scores.numel() > 2**24
    for b in (0, 131, 259):
        want = scores[b].quantile(torch.tensor([0.05, 0.95, 0.999]))
        torch.testing.assert_close(got[b], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mining_real_vectors(backend, dtype):
    skip_what_the_interpreter_repeats(backend, dtype)
    for B, K, D, N, device, seed in each_shape(backend):
        q, keys = (
            unit(B, D, dtype=dtype, device=device, seed=seed),
            unit(K, D, dtype=dtype, device=device, seed=seed + 1),
        )
        got = negmine.mine_hardest(q, keys, N, backend=backend)
        compare.selected(f"{B, K, D, N}", got.scores, got.index, q.double() @ keys.double().T)


SELECTS = [
    Select(0, 0.05),
    Select(0.001, 0.3),
    Select(0.05, 1.0),
    Select(2, 9),
    Select(0, 1),  # rank 1, an integer that is equal to the fraction 1.0
    Select(500, 600),
    Select(max_score=3.0, min_score=-5.0),
    Select(1, 0.5, absolute_margin=1.0),
    Select(0.1, 0.9, relative_margin=0.3, max_score=6.0),
]


@pytest.mark.parametrize("select", SELECTS, ids=repr)
def test_windows_keep_exactly_their_ranks(backend, select):
    """With integer vectors, many scores are equal, so a window that is bounded only by scores would keep too many columns."""
    if interpreted(backend) and select in SELECTS[2:6]:
        pytest.skip("triton: interpreted, where other windows say it: their kernels are the same")
    for B, K, D, N, device, seed in each_shape(backend):
        q, pos = whole(B, D, device=device, seed=seed), whole(B, D, device=device, seed=seed + 2)
        keys = whole(K, D, device=device, seed=seed + 1)
        given = masks("ids", B, K, device)
        allowed = dense_mask(q, keys, given)
        options = {"temperature": 8.0, "select": select}
        _, stats = negmine.info_nce(
            q, pos, negatives(keys, given), **options, **tags(given), return_stats=True, backend=backend
        )
        _, want = reference.info_nce(q, pos, keys, **options, usable=allowed)
        for name in ("num_negatives", "positive_rank", "num_empty"):
            compare.exact(f"{name} {B, K, D}", getattr(stats, name), want[name])
        call = {"select": select, "positive_key": pos, **tags(given), "backend": backend}
        mined = negmine.mine_hardest(q, negatives(keys, given), N, **call)
        times = reference.multiplicity(q @ keys.T, (q * pos).sum(1), select, allowed, 0, 0, 0)
        scores, index = reference.mine_hardest(q, keys, N, times > 0)
        compare.exact(f"mined {B, K, D}", mined.index, index)
        compare.exact(f"mined scores {B, K, D}", mined.scores, scores)


LOSSES = [
    ({}, "none"),
    ({"temperature": 0.01}, "ids"),
    ({"select": Select(0, 0.05)}, "ids"),
    ({"select": Select(0.001, 0.5), "decoupled": True}, "labels"),
    ({"select": Select(0.05, 1.0)}, "none"),
    ({"select": Select(0, 7, absolute_margin=0.02)}, "columns"),
    ({"mix": Mix(6, 9, 5), "seed": 3, "step": 8, "row_offset": 100}, "ids"),
    ({"mix": Mix(6, 9, 5, skip=2, concentration=0.5, distinct=False), "select": Select(0, 0.2)}, "everything"),
    ({"weight": Weight(1.0, 0.001), "temperature": 0.5}, "pairs"),
    ({"weight": Weight(0.5, 0.0, detach=True), "select": Select(0, 0.5)}, "none"),
    ({"weight": Weight(0.0, 0.01), "mix": Mix(4, 3, 3)}, "none"),
    ({"weight": Weight(0.0, 0.9)}, "none"),  # most rows are clamped
    ({"select": Select(0.0, 0.5, sample=6), "seed": 5, "step": 2**32 - 1, "row_offset": 2**33 + 7}, "ids"),
    ({"select": Select(1, 40, sample=70), "decoupled": True}, "labels"),  # more samples than columns in the window
    ({"decoupled": True}, "nothing left"),
    ({}, "nothing left"),
]


def debiasing_condition(inputs, options, allowed):
    """The largest (R + tau N pos) / (R - tau N pos): Weight's difference cancels, which magnifies rounding this much."""
    weight = options.get("weight")
    if weight is None or weight.tau_plus == 0:
        return 1.0
    q, pos, keys = (t.double() for t in inputs)
    T = options["temperature"]
    x = q @ keys.T / T  # (B, K)
    x = x if allowed is None else x.masked_fill(~allowed, -torch.inf)
    count = x.isfinite().sum(1)
    importance = (weight.beta * x).nan_to_num(nan=0.0).exp() * x.isfinite()
    R = count * (importance * x.exp()).sum(1) / importance.sum(1)
    minus = weight.tau_plus * count * ((q * pos).sum(1) / T).exp()
    unclamped = (R - minus) / (1 - weight.tau_plus) >= count * torch.tensor(-1 / T).double().exp()
    return float(((R + minus) / (R - minus))[unclamped].max()) if bool(unclamped.any()) else 1.0


def gradients(loss, leaves):
    return torch.autograd.grad(loss.double().sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options, kind", LOSSES, ids=lambda v: v if isinstance(v, str) else ",".join(v) or "plain")
def test_loss_and_every_gradient(backend, options, kind, dtype):
    skip_what_the_interpreter_repeats(backend, dtype, "select or mix" if options.keys() & {"select", "mix"} else kind)
    options = {"temperature": 0.2, **options}
    keywords = {name: value for name, value in options.items() if name != "temperature"}
    names = ("query", "positive_key", "negative_keys", "temperature")
    for B, K, D, _, device, seed in each_shape(backend):
        inputs = [unit(n, D, dtype=dtype, device=device, seed=seed + i) for i, n in enumerate((B, B, K))]
        given = masks(kind, B, K, device)
        allowed = dense_mask(inputs[0], inputs[2], given)

        def run(cast, function, inputs=inputs, device=device, given=(), **more):
            leaves = [t.to(cast).detach().requires_grad_() for t in inputs]
            temperature = torch.tensor(
                options["temperature"], dtype=torch.promote_types(cast, torch.float32), device=device
            )
            leaves.append(temperature.requires_grad_())
            columns = negatives(leaves[2], given) if given else leaves[2]
            rows, stats = function(*leaves[:2], columns, temperature=leaves[3], **keywords, **more)
            return [rows, *gradients(rows, leaves)], stats

        got, stats = run(
            dtype, negmine.info_nce, given=given, **tags(given), reduction="none", return_stats=True, backend=backend
        )
        truth, want = run(torch.float64, reference.info_nce, usable=allowed)
        plain, _ = run(dtype, reference.info_nce, usable=allowed)
        condition = debiasing_condition(inputs, options, allowed) / options["temperature"]  # 1 / T: the largest logit
        for name, k, t, p in zip(("loss", *(f"d_{n}" for n in names)), got, truth, plain, strict=True):
            # d_query is a difference of a term of the positive and a term of the negatives; so is a decoupled loss.
            # d_temperature is a difference of such terms too.
            terms = {
                "d_query": truth[2],
                "loss": (inputs[0] * inputs[1]).sum(1) if "decoupled" in options else None,
                "d_temperature": (truth[2] * inputs[1]).sum() / options["temperature"],
            }
            compare.rounded(f"{name} {B, K, D}", k, t, p, condition, terms.get(name))
        compare.exact(f"num_negatives {B, K, D}", stats.num_negatives, want["num_negatives"])
        compare.exact(f"num_empty {B, K, D}", stats.num_empty, want["num_empty"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "mix", [Mix(6, 9, 5), Mix(3, 4, 2, skip=1, concentration=3.0), Mix(50, 0, 3, distinct=False)], ids=repr
)
def test_mixed_vectors_have_the_same_draws_everywhere(backend, mix, dtype):
    skip_what_the_interpreter_repeats(backend, dtype, "none" if mix.distinct and not mix.skip else "other draws")
    for B, K, D, _, device, seed in each_shape(backend):
        q, keys = (
            whole(B, D, dtype=dtype, device=device, seed=seed),
            whole(K, D, dtype=dtype, device=device, seed=seed + 1),
        )
        key = {"seed": 2**32 - 1, "step": 7, "row_offset": 2**33 + 1}
        for given in each_mask(backend, B, K, device):
            allowed = dense_mask(q, keys, given)
            got = negmine.mix_negatives(q, negatives(keys, given), mix, **tags(given), **key, backend=backend)
            truth = reference.mix_negatives(q.double(), keys.double(), mix, allowed, **key)
            plain = reference.mix_negatives(q, keys, mix, allowed, **key)
            compare.exact(f"parents {B, K, D}", got.parents, truth[1])
            compare.rounded(f"coefficients {B, K, D}", got.coefficients, truth[2], truth[2].float())
            if dtype == torch.float32:  # with 16-bit storage, the coefficients are rounded
                compare.rounded(f"vectors {B, K, D}", got.vectors, truth[0], plain[0])


def test_hidden_keys_have_no_gradient_whatever_a_query_holds(backend):
    """Keys that a mask hides from all queries, single ones and a whole tile. The gradients of the other keys are NaN."""
    device = device_of(backend)
    q, keys = unit(3, 7, device=device), unit(64, 7, device=device, seed=1)
    q[1, 2] = torch.nan
    mask = torch.arange(64, device=device) < 20
    for function in negmine.logsumexp, negmine.losses.softplus_sum:
        leaf = keys.clone().requires_grad_()
        function(q, Negatives(leaf, mask=mask), backend=backend).sum().backward()
        assert not leaf.grad[~mask].any() and bool(leaf.grad[mask].isnan().all())


def test_mixed_storage(backend):
    """Queries in fp32 and a queue in a 16-bit dtype."""
    device = device_of(backend)
    q, pos, keys = unit(9, 24, device=device), unit(9, 24, device=device, seed=1), unit(70, 24, device=device, seed=2)
    for dtype in DTYPES[1:]:
        stored = keys.to(dtype)
        want = negmine.info_nce(q, pos, stored.float(), backend="reference")
        torch.testing.assert_close(negmine.info_nce(q, pos, stored, backend=backend), want, rtol=1e-5, atol=1e-5)
        whole_q, whole_keys = whole(9, 24, device=device), whole(70, 24, dtype=dtype, device=device, seed=1)
        got = negmine.mine_hardest(whole_q, whole_keys, 9, backend=backend)
        compare.exact("index", got.index, reference.mine_hardest(whole_q, whole_keys.float(), 9)[1])


@pytest.mark.parametrize("kind", MASKS)
def test_the_pass_that_mines_counts_its_pool(backend, kind):
    """mine_hardest with counting finds the same bits, and its counts are those of count_negatives. NaN does not count."""
    if interpreted(backend) and kind not in ("none", "everything", "nothing left"):
        pytest.skip("triton: interpreted, where test_masks_are_exact_on_integers runs the same kernels with this mask")
    ops = next(row for row in backends.BACKENDS if row.name == backend).functions
    for B, K, D, N, device, seed in each_shape(backend):
        q, keys = whole(B, D, device=device, seed=seed), whole(K, D, device=device, seed=seed + 1)
        keys[K // 2] = torch.nan
        pool = pool_of(q, keys, masks(kind, B, K, device))
        places = [sort_key.pack(torch.full((B,), bound, device=device), K // 4) for bound in (-3.0, 2.0)]
        both = [(None, None), places]
        for lower, upper in both if interpreted(backend) else itertools.product((None, places[0]), (None, places[1])):
            inside = pool._replace(lower=lower, upper=upper)
            scores, index, num_kept = ops["mine_hardest"](q, keys, max(N, 1), True, *inside)
            want = ops["mine_hardest"](q, keys, max(N, 1), False, *inside)
            compare.exact(f"scores {B, K, D, N}", scores, want[0])
            compare.exact(f"index {B, K, D, N}", index, want[1])
            everything = ops["mine_hardest"](q, keys, K + 1, False, *inside)[1]  # (B, K + 1)
            compare.exact(f"num_kept {B, K, D, N}", num_kept, (everything >= 0).sum(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "everything"])
def test_sums_at_prefix_widths(backend, kind, dtype):
    """For each width, the log-sum-exp and the mean of the prefix, with zeros after it. Columns are counted once."""
    skip_what_the_interpreter_repeats(backend, dtype, kind)
    op = next(row for row in backends.BACKENDS if row.name == backend).functions.get("prefix_logsumexp")
    if op is None:
        pytest.skip(f"{backend} has no prefix_logsumexp")
    for B, K, D, _, device, seed in each_shape(backend):
        q, keys = (unit(n, D, dtype=dtype, device=device, seed=seed + i) for i, n in enumerate((B, K)))
        given = masks(kind, B, K, device)
        allowed = dense_mask(q, keys, given)
        allowed = torch.ones(B, K, dtype=torch.bool, device=device) if allowed is None else allowed
        bias = torch.linspace(-1, 1, K, device=device) if given else torch.zeros(K, device=device)
        pool = pool_of(q, keys, given)._replace(bias=bias if given else None)
        scale = torch.tensor(5.0, device=device)
        for widths in ([D], sorted({1, D // 3 + 1, D // 2 + 1, D}))[FEW_SHAPES:]:
            lse, mean, num_kept = op(q, keys, widths, scale, True, *pool)
            alone, no_mean, _ = op(q, keys, widths, scale, False, *pool)
            assert no_mean.shape == (len(widths), 0, D)
            compare.exact("num_kept", num_kept, allowed.sum(1))
            for at, width in enumerate(widths):

                def dense(cast, q=q[:, :width], keys=keys[:, :width], allowed=allowed, bias=bias):
                    x = (q.to(cast) @ keys.to(cast).T) * 5 + bias.to(cast)
                    x = x.masked_fill(~allowed, -torch.inf)
                    return x.logsumexp(1), x.softmax(1).nan_to_num() @ keys.to(cast)

                truth, plain = dense(torch.float64), dense(torch.float32)
                compare.rounded(f"lse {B, K, width}", lse[at], truth[0], plain[0], condition=8.0)
                compare.rounded(f"lse alone {B, K, width}", alone[at], truth[0], plain[0], condition=8.0)
                rounding = 0.0 if dtype == torch.float32 else float(torch.finfo(dtype).eps)  # rounding of the weights
                near = plain[1].double() + rounding * truth[1].abs().max() if truth[1].numel() else plain[1]
                compare.rounded(f"mean {B, K, width}", mean[at, :, :width], truth[1], near, condition=8.0)
                assert not mean[at, :, width:].any()
