"""Every instruction set of this processor: exact and rounded results, and the same scores in every op and split."""

import math

import pytest
import torch

import negmine
from negmine import Mix, Negatives, Select, reference
from negmine.ops import backends, sort_key
from negmine.ops.pool import Pool, narrow, usable
from negmine.ops.windows import Draw, mixing_draws
from negmine.selection import Mined
from tests import compare
from tests.cases import DTYPES, ids, unit, whole

ISAS = ("amxbf16", "avx512bf16", "avx512", "avx2", "portable")
SHAPES = [(1, 1, 1), (3, 7, 5), (17, 129, 33), (65, 300, 130), (2, 260, 515)]  # (B, K, D)


@pytest.fixture(params=ISAS)
def isa(request):
    row = next(row for row in backends.BACKENDS if row.name == "cpu")
    if row.refusal:
        pytest.skip(row.refusal)
    from negmine import _ops_cpu

    before = _ops_cpu.isa()
    if not _ops_cpu.set_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    assert _ops_cpu.set_isa(before)


def summed(q, keys, scale, pivot, want_mean, pool, N=0, ranks=None):
    """Call the op logsumexp with one scale. Return lse (B,), mean (B or 0, D), and its other results."""
    lse, mean, *rest = torch.ops.negmine_cpu.logsumexp(q, keys, scale[None], pivot, want_mean, N, ranks, *pool)
    return lse[0], mean[0], *rest


def bounded_pool(B, K):
    """A mask, ids and both bounds."""
    lower, upper = (sort_key.pack(torch.full((B,), s), i) for s, i in ((-0.3, sort_key.LAST_INDEX), (0.4, 0)))
    return Pool(torch.rand(K) < 0.8, **ids(B, K), lower=lower, upper=upper)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mining_is_exact_on_integers(isa, dtype):
    for seed, (B, K, D) in enumerate(SHAPES):
        q, keys = whole(B, D, dtype=dtype, seed=seed), whole(K, D, dtype=dtype, seed=seed + 1)
        N = K // 2 + 1
        got = negmine.mine_hardest(q, keys, N, backend="cpu")
        scores, index = reference.mine_hardest(q.float(), keys.float(), N)
        compare.exact(f"scores {B, K, D}", got.scores, scores)
        compare.exact(f"index {B, K, D}", got.index, index)
        ranks = torch.tensor([K // 2, 0, K - 1, 0, K, -1]).expand(B, 6)
        want = reference.rank_thresholds(q.float(), keys.float(), ranks)
        compare.exact(f"ranks {B, K, D}", negmine.rank_thresholds(q, keys, ranks, backend="cpu"), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"select": Select(0.01, 0.2)}, {"mix": Mix(8, 6, 4)}], ids=lambda o: ",".join(o)
)
def test_losses_and_gradients_are_rounded(isa, dtype, options):
    for seed, (B, K, D) in enumerate(SHAPES):
        inputs = [unit(n, D, dtype=dtype, seed=seed + i) for i, n in enumerate((B, B, K))]

        def run(cast, function, inputs=inputs, **more):
            leaves = [t.to(cast).requires_grad_() for t in inputs]
            rows = function(*leaves, temperature=0.2, **options, **more)
            rows = rows[0] if isinstance(rows, tuple) else rows
            return [rows, *torch.autograd.grad(rows.double().sum(), leaves)]

        got = run(dtype, negmine.info_nce, reduction="none", backend="cpu")
        truth, plain = (run(cast, reference.info_nce) for cast in (torch.float64, dtype))
        for name, k, t, p in zip(("loss", "d_query", "d_positive", "d_keys"), got, truth, plain, strict=True):
            compare.rounded(f"{name} {B, K, D}", k, t, p, 5.0, truth[2] if name == "d_query" else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K, D, N", [(20_000, 9, 300), (5_000, 130, 1024)])
def test_one_score_whatever_the_op_and_the_split(isa, dtype, K, D, N):
    """Thresholds, counts and mining use bit-identical scores, and the scan with a sample returns the same as a full ranking."""
    q, keys = unit(5, D, dtype=dtype), unit(K, D, dtype=dtype, seed=1)
    ranking = negmine.mine_hardest(q, keys, K, backend="cpu")  # mines all columns, so without a sample
    mined = negmine.mine_hardest(q, keys, N, backend="cpu")
    compare.exact("index", mined.index, ranking.index[:, :N])
    compare.exact("scores", mined.scores, ranking.scores[:, :N])
    compare.exact("alone", negmine.mine_hardest(q[3:4], keys, N, backend="cpu").index[0], mined.index[3])
    ranks = [N - 1, 3, K // 2]
    compare.exact("ranks", negmine.rank_thresholds(q, keys, ranks, backend="cpu"), ranking.scores[:, ranks])
    many = [*range(K // 3, K // 3 + 40), *range(K - 9, K), 0]
    compare.exact("many ranks", negmine.rank_thresholds(q, keys, many, backend="cpu"), ranking.scores[:, many])
    own = ids(5, K)
    call = {"select": Select(3, N), "query_ids": own["query_ids"], "return_stats": True, "backend": "cpu"}
    _, stats = negmine.info_nce(q, q, Negatives(keys, ids=own["negative_ids"]), **call)
    compare.exact("window", stats.num_negatives, torch.full((5,), N - 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, K, D", SHAPES)
def test_listed_columns_rank_as_in_the_whole_queue(isa, dtype, B, K, D):
    """Scores of listed columns are bit-identical in any list, and the op that mines counts the same as count_negatives."""
    q, keys = unit(B, D, dtype=dtype), unit(K, D, dtype=dtype, seed=1)
    keys[K // 2] = torch.nan
    mask = torch.rand(B, K) < 0.4
    listed = torch.where(mask, torch.arange(K), -1).sort(1).values  # (B, K)
    most = torch.linspace(-0.5, 0.5, B)
    for highest in (None, most):
        pool = Pool(mask, upper=None if highest is None else sort_key.pack(highest, 0))
        for N in (3, K + 2):
            got = torch.ops.negmine_cpu.mine_gathered(q, keys, listed, N, highest)
            want = torch.ops.negmine_cpu.mine_hardest(q, keys, N, False, *pool)
            for name, k, t in zip(Mined._fields, got, want, strict=False):
                compare.exact(name, k, t)
            everything = pool._replace(lower=sort_key.pack(torch.full((B,), -torch.inf), sort_key.LAST_INDEX))
            compare.exact("num_kept", got[2], torch.ops.negmine_cpu.count_negatives(q, keys, *everything))
    deep, everything = unit(20_000, D, dtype=dtype, seed=2), Pool(lower=everything.lower)  # enough rows for a sample
    _, index, num_kept = torch.ops.negmine_cpu.mine_hardest(q, deep, 1500, True, *everything)
    compare.exact("sampled", index, negmine.mine_hardest(q, deep, 1500, backend="cpu").index)
    compare.exact("all are kept", num_kept, torch.full((B,), 20_000))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# The last shape: one task per block of queries, and several splits.
@pytest.mark.parametrize("B, K, D", [*SHAPES, (600, 5000, 9)])
def test_sums_at_several_scales_are_sums_at_each_to_the_bit(isa, dtype, B, K, D):
    q, keys, scales = unit(B, D, dtype=dtype), unit(K, D, dtype=dtype, seed=1), torch.tensor([30.0, 4.0, 0.0])
    pivot = torch.linspace(-0.5, 0.5, B)
    for pool in (Pool(), bounded_pool(B, K)):
        for want_mean in (True, False):
            for count in (2, 3):
                got = torch.ops.negmine_cpu.logsumexp(q, keys, scales[:count], pivot, want_mean, 0, None, *pool)
                for i in range(count):
                    want = summed(q, keys, scales[i], pivot, want_mean, pool)
                    each = got[0][i], got[1][i], *got[2:4]
                    for name, k, t in zip(("lse", "mean", "num_kept", "num_above"), each, want, strict=False):
                        compare.exact(f"{name} {i} of {count}", k, t)
                assert K < 100 or int(got[2].max()) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "B, K, D, N",
    [(1, 0, 3, 2), (3, 7, 5, 9), (65, 300, 130, 3), (2, 40_000, 33, 700), (7, 9000, 40, 2000), (600, 5000, 9, 4)],
)  # few blocks and many, one split and several, with a sample and without
def test_a_sum_that_mines_is_a_sum_and_a_mining_to_the_bit(isa, dtype, B, K, D, N):
    q, keys, scale = unit(B, D, dtype=dtype), unit(K, D, dtype=dtype, seed=1), torch.tensor(9.0)
    pivot = torch.linspace(-0.5, 0.5, B)
    for pool in (Pool(), bounded_pool(B, K)):
        for want_mean in (True, False):
            got = summed(q, keys, scale, pivot, want_mean, pool, N)
            want = summed(q, keys, scale, pivot, want_mean, pool)[:4]
            mined = torch.ops.negmine_cpu.mine_hardest(q, keys, N, False, *pool)[:2]
            names = ("lse", "mean", "num_kept", "num_above", "scores", "index")
            for name, k, t in zip(names, got, (*want, *mined), strict=False):
                compare.exact(name, k, t)


def window_pools(B, K):
    """Three pools: all columns; a mask, ids and both bounds; a mask for each query."""
    return Pool(), bounded_pool(B, K), Pool(torch.rand(B, K) < 0.5)


def summed_in_two_steps(q, keys, ranks, scale, pivot, pool):
    """Compute logsumexp between two ranks from thresholds and a sum in float64: lse, mean, counts and sort keys."""
    bounds = torch.ops.negmine_cpu.rank_thresholds(q, keys, ranks, *pool)  # (B, 2)
    empty = (ranks[:, 0] < 0) | (ranks[:, 1] < ranks[:, 0]) | (bounds[:, 0] == sort_key.NOWHERE)
    bounds[empty] = sort_key.NOWHERE
    window = narrow(pool, *bounds.unbind(1))
    scores, index, _ = torch.ops.negmine_cpu.mine_hardest(q, keys, max(1, len(keys)), False, *window)
    x = float(scale) * scores.double()  # (B, K), -inf past the window
    p = torch.where(index >= 0, x, -torch.inf).softmax(1).nan_to_num(0.0)
    dense = torch.zeros(len(q), max(1, len(keys)), dtype=torch.float64).scatter_add(1, index.clamp_min(0), p)
    mean = dense[:, : len(keys)] @ keys.double()
    num_above = summed(q, keys, scale, pivot, False, pool)[3]
    return x.logsumexp(1), mean, (index >= 0).sum(1), num_above, bounds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, K, D", [(1, 0, 3), (3, 7, 5), (65, 300, 130), (5, 20_000, 40)])  # the last: with a sample
def test_a_window_is_thresholds_and_a_sum(isa, dtype, B, K, D):
    q, keys, scale, pivot = unit(B, D, dtype=dtype), unit(K, D, dtype=dtype, seed=1), torch.tensor(9.0), torch.zeros(B)
    kinds = [(0, 4), (2, 2), (K // 9, K // 4), (K // 2, K + 5), (K - 1, K - 1), (K, K + 3), (3, 2), (-1, 4), (0, -1)]
    for pool in window_pools(B, K):
        for shift in range(len(kinds)):
            ranks = torch.tensor([kinds[(b + shift) % len(kinds)] for b in range(B)])
            got = summed(q, keys, scale, pivot, True, pool, ranks=ranks)
            want = summed_in_two_steps(q, keys, ranks, scale, pivot, pool)
            for name, k, t in zip(("num_kept", "num_above", "sort_keys"), (*got[2:4], got[6]), want[2:], strict=True):
                compare.exact(f"{name} {shift}", k, t)
            compare.rounded(f"lse {shift}", got[0], want[0], want[0].float(), condition=9.0)
            # The mean of a sum between bounds may round p to bf16, and so may the mean of a window.
            window = narrow(pool, *want[4].unbind(1))
            plain = summed(q, keys, scale, None, True, window)[1]
            compare.rounded(f"mean {shift}", got[1], want[1], plain, condition=9.0)
            short = summed(q, keys, scale, None, False, pool, ranks=ranks)
            compare.exact("lse alone", short[0], got[0])
            assert short[1].shape == (0, D) and not short[3].any()


def test_a_window_where_the_sample_misleads_or_scores_tie_or_are_not_finite(isa):
    K = 20_000
    pieces = torch.cat(
        [torch.arange(i * K // 8, i * K // 8 + K // 16 // 8) for i in range(8)]
    )  # where samples are taken
    misled = torch.linspace(-0.5, 0.5, K)[:, None]
    misled[pieces] += 2.0  # the hardest columns
    ties, broken = whole(K, 1, seed=3).float(), torch.linspace(-1, 1, K)[:, None]
    broken[7], broken[77], broken[777] = torch.nan, -torch.inf, -torch.inf
    q, scale = torch.tensor([[1.0], [0.5], [-1.0], [0.0]]), torch.tensor(3.0)
    for name, keys in (("misled", misled), ("ties", ties), ("not finite", broken)):
        rows = q if name != "not finite" else q[:2]  # the other queries would turn -inf into inf and NaN
        for first, last in ((0, 900), (3000, 4000), (19_000, 19_999), (19_990, 30_000)):
            ranks = torch.tensor([[first, last]]).repeat(len(rows), 1)
            got = summed(rows, keys, scale, None, False, Pool(), ranks=ranks)
            clean, some = keys.nan_to_num(0.0, neginf=-torch.inf), Pool(keys[:, 0] == keys[:, 0])
            want = summed_in_two_steps(rows, clean, ranks, scale, None, some)
            compare.exact(f"{name} num_kept", got[2], want[2])
            compare.exact(f"{name} sort_keys", got[6], want[4])
            compare.rounded(f"{name} lse", got[0], want[0], want[0].float(), condition=3.0)


def test_mining_where_the_sample_misleads(isa):
    """The sample of each split gives a cut that fewer than N columns reach, or that nearly all columns reach."""
    K = 80_000  # two threads take samples of splits with 20,000 columns each
    sampled = torch.arange(K) % 2500 < 156
    for extra in (2.0, -2.0):
        keys = (torch.linspace(-0.5, 0.5, K) + extra * sampled)[:, None]
        got = negmine.mine_hardest(torch.ones(1, 1), keys, 1500, backend="cpu")
        scores, index = reference.mine_hardest(torch.ones(1, 1), keys, 1500)
        compare.exact("scores", got.scores, scores)
        compare.exact("index", got.index, index)


def test_sums_of_a_long_queue_count_all_of_it(isa):
    q, keys = unit(3, 8), unit(9000, 8, seed=1)
    pool = Pool(torch.arange(9000) % 3 > 0)
    scale = torch.tensor(9.0)
    assert summed(q, keys, scale, None, False, pool)[2].tolist() == [6000] * 3
    assert torch.ops.negmine_cpu.softplus_sum(q, keys, scale, -scale, False, *pool)[3].tolist() == [6000] * 3
    assert torch.ops.negmine_cpu.count_negatives(q, keys, *pool).tolist() == [6000] * 3


def test_a_window_has_the_same_bits_alone_and_among_others(isa):
    q, keys = unit(70, 33), unit(20_000, 33, seed=1)
    ranks = torch.stack([torch.arange(70) * 9, torch.arange(70) * 30 + 5], 1)
    together = summed(q, keys, torch.tensor(7.0), None, True, Pool(), ranks=ranks)
    for b in (0, 17, 69):
        one = slice(b, b + 1)
        alone = summed(q[one], keys, torch.tensor(7.0), None, True, Pool(), ranks=ranks[one])
        names = ("lse", "mean", "num_kept", "num_above", "scores", "index", "sort_keys")
        for name, k, t in zip(names, alone, together, strict=True):
            compare.exact(name, k, t[one])


def test_many_equal_terms_are_not_all_rounded_to_one_side(isa):
    """The mean of half ones and half minus ones is tanh(scale). A plain sum of thousands of terms would round each term down."""
    q, K = torch.ones(1, 1), 13_400
    keys = (1.0 - 2.0 * (torch.arange(K) % 2))[:, None]
    columns, scale = torch.arange(K)[None], torch.tensor(1.0)
    means = {
        "logsumexp": summed(q, keys, scale, None, True, Pool())[1],
        "listed": torch.ops.negmine_cpu.gathered_logsumexp(q, keys, columns, scale, True)[2],
        "window": summed(q, keys, scale, None, True, Pool(), ranks=torch.tensor([[0, K]]))[1],
    }
    for name, mean in means.items():
        assert abs(float(mean) - math.tanh(1.0)) < 1e-5, name  # a plain sum has an error of 4e-5


def test_subnormals_of_bf16_cost_no_more_than_their_size(isa):
    """Products of pairs of bf16 treat subnormals as zero: an error of at most 2^-126 per term if the other factor is 1."""
    q, keys = torch.ones(2, 6, dtype=torch.bfloat16), torch.full((5, 6), 2.0**-130, dtype=torch.bfloat16)
    keys[1] = 2.0**-120
    mined = negmine.mine_hardest(q, keys, 5, backend="cpu")
    assert mined.index[:, 0].tolist() == [1, 1]
    assert (
        float((mined.scores.double() - (q.double() @ keys.double().T).gather(1, mined.index)).abs().max())
        <= 6 * 2.0**-126
    )


def test_the_temperature_gradient_from_bf16_is_as_exact_as_from_fp32(isa):
    """With p rounded to bf16 in the mean, it would lose four digits, so query . mean is corrected."""
    for B, K, D in [(3, 71, 33), (65, 5000, 128)]:
        q, keys = unit(B, D, dtype=torch.bfloat16), unit(K, D, dtype=torch.bfloat16, seed=1)
        q[0] = 0
        lse, mean, *_ = summed(q, keys, torch.tensor(20.0), None, True, Pool())
        x = 20 * (q.double() @ keys.double().T)  # (B, K)
        truth = x.softmax(1) @ keys.double()  # (B, D)
        scale = float(x.abs().max()) / 20
        assert float((lse.double() - x.logsumexp(1)).abs().max()) <= 1e-5
        assert float((mean.double() - truth).abs().max()) <= 2.0**-8 * float(keys.abs().max())
        error = (q.double() * (mean.double() - truth)).sum(1)  # (B,)
        assert float(error.abs().max()) <= 16 * torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_rows_may_hold_anything(isa, dtype):
    """For several blocks of queries and chunks of rows. A row that only odd queries see does not affect even queries."""
    for B, K, D in [(17, 129, 33), (130, 300, 64), (65, 700, 300)]:
        q, keys, row = unit(B, D, dtype=dtype), unit(K, D, dtype=dtype, seed=1), torch.arange(K)
        by_ids, by_mask, from_even = row % 5 == 1, row % 5 == 2, row % 50 == 3
        keys[by_ids | by_mask] = 0
        even = torch.arange(B) % 2 == 0
        spoiled = keys.clone()
        spoiled[by_ids, 2], spoiled[by_mask] = torch.inf, torch.nan
        mixed = keys.clone()
        mixed[from_even, D - 1] = torch.nan
        mask = ~(by_mask | (from_even & even[:, None]))  # (B, K)
        pool = Pool(mask, torch.zeros(B).long(), torch.where(by_ids, 0, row + 1))
        scale, weight = torch.tensor(5.0), torch.linspace(0.5, 1.0, B)
        lse = summed(q, keys, scale, None, False, pool)[0]

        def run(keys, q=q, pool=pool, scale=scale, weight=weight, lse=lse):
            ops, two = torch.ops.negmine_cpu, torch.stack([scale, scale / 3])
            sums, means, *_ = ops.logsumexp(q, keys, two, None, True, 0, None, *pool)
            total, sigmoid_keys, *_ = ops.softplus_sum(q, keys, scale, -scale, True, *pool)
            d_keys = ops.logsumexp_grad_keys(q, keys, scale, lse, weight, *pool)
            return (
                *sums,
                *means,
                total,
                sigmoid_keys,
                d_keys,
                ops.softplus_sum_grad_keys(q, keys, scale, -scale, weight, *pool),
            )

        want = run(keys)
        for at, (a, b) in enumerate(zip(run(spoiled), want, strict=True)):
            compare.rounded(f"result {at} of {B, K, D}", a, b, b)
        for at, (a, b) in enumerate(zip(run(mixed)[:6], want[:6], strict=True)):
            compare.rounded(f"even rows of result {at} of {B, K, D}", a[even], b[even], b[even])
            assert bool(a[~even].isnan().all()), (at, B, K, D)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [5, 300])  # splits combined at the end, and one after the other
def test_a_score_of_infinity_sums_to_infinity(isa, dtype, B):
    """At any place in the queue. A score of -inf adds nothing, NaN gives NaN, and a logit may also overflow."""
    K, D, scale = 9000, 3, torch.tensor(9.0)
    q, keys = unit(B, D, dtype=dtype).abs() + 0.1, unit(K, D, dtype=dtype, seed=1)
    q[3] = -q[3]
    for rows in ([0], [4500], [10, 8000], [K - 1]):
        keys[rows, 1] = torch.inf
        listed = torch.arange(K).expand(B, K).contiguous()
        for nan in (False, True):
            keys[20, 2] = torch.nan if nan else -1.0
            truth = (9 * (q.double() @ keys.double().T)).logsumexp(1)
            assert bool((truth.isnan() if nan else truth.isposinf())[0]) and bool(truth.isnan()[3]) == nan
            for want_mean in (False, True):
                got = {
                    "sum": summed(q, keys, scale, None, want_mean, Pool())[0],
                    "mine": summed(q, keys, scale, None, want_mean, Pool(), 4)[0],
                    "pair": torch.ops.negmine_cpu.logsumexp(
                        q, keys, scale.repeat(2), None, want_mean, 0, None, *Pool()
                    )[0][1],
                }
                if B == 5:  # listed columns are not split
                    got["listed"] = torch.ops.negmine_cpu.gathered_logsumexp(q, keys, listed, scale, want_mean)[1]
                if not nan:  # a window keeps no NaN scores
                    ranks = torch.tensor([[0, K - 1]]).repeat(B, 1)
                    got["window"] = summed(q, keys, scale, None, want_mean, Pool(), ranks=ranks)[0]
                for name, lse in got.items():
                    compare.rounded(name, lse, truth, truth, 9.0)
        keys[rows, 1] = 0.5
    near, steep, total = q.abs() * 99, torch.tensor(3e38), torch.full((B,), torch.inf)  # finite scores, no finite logit
    compare.exact("steep", summed(near, near, steep, None, False, Pool())[0], total)
    ranks = torch.tensor([[0, 2]]).repeat(B, 1)
    compare.exact("steep window", summed(near, near, steep, None, False, Pool(), ranks=ranks)[0], total)
    index, draws = torch.zeros(B, 4, dtype=torch.int64), mixing_draws(Mix(4, 6, 3), q, Draw())
    compare.exact("mixed", torch.ops.negmine_cpu.mix_logsumexp(near, near, index, steep, False, *draws)[0], total)


@pytest.mark.parametrize("B, kind", [(1, "random"), (5, "masked"), (17, "ordered"), (40, "ties"), (70, "random")])
def test_ranks_and_windows_do_not_depend_on_threads(B, kind):
    """With few blocks of queries, the queue is split; if its hardest columns are close together, one split finds most of them."""
    K, D = 20_000, 24
    q, keys = unit(B, D), unit(K, D, seed=1)
    keys = keys[(keys @ q[0]).argsort()] if kind == "ordered" else (keys * 2).round() if kind == "ties" else keys
    pool = Pool(torch.rand(B, K) < 0.3) if kind == "masked" else Pool()
    ranks = torch.stack([torch.randint(-1, K // 2, (B,)), torch.randint(K // 2, K + 9, (B,)), torch.arange(B)], 1)
    window = ranks[:, 2:] + torch.tensor([0, 700])  # (B, 2)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            deep, few = (torch.ops.negmine_cpu.rank_thresholds(q, keys, r, *pool) for r in (ranks, ranks[:, 2:]))
            sums = summed(q, keys, torch.tensor(5.0), None, True, pool, ranks=window)
            results.append((deep, few, *sums[:4], sums[6]))
    finally:
        torch.set_num_threads(threads)
    names = ("deep", "few", "lse", "mean", "num_kept", "num_above", "sort_keys")
    for name, *each in zip(names, *results, strict=True):
        for other in each[1:]:
            compare.exact(name, other, each[0])
    ranked = negmine.mine_hardest(q, Negatives(keys, mask=pool.negative_mask), 800, backend="cpu").index
    compare.exact("rank", sort_key.unpack(results[0][1])[1][:, 0], ranked.gather(1, ranks[:, 2:])[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maxsim_is_exact_on_integers(isa, dtype):
    """Documents with one token, with several chunks, and between; queries that end within a block."""
    for seed, (B, tokens, K, J, D) in enumerate([(3, 33, 70, 1, 5), (2, 4, 3, 300, 33), (5, 17, 9, 20, 64)]):
        q, keys = whole(B, tokens, D, dtype=dtype, seed=seed), whole(K, J, D, dtype=dtype, seed=seed + 1)
        scores, index = torch.ops.negmine_cpu.maxsim(q, keys, None, None, True)
        inner = torch.einsum("bid,kjd->bikj", q.double(), keys.double())
        best = (inner == inner.amax(3, keepdim=True)).int().argmax(3)  # the first of equal ones
        compare.exact("scores", scores, reference.maxsim(q.double(), keys.double()))
        assert torch.equal(index, best + J * torch.arange(K))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("types", ["float32 float32", "bfloat16 bfloat16", "float16 bfloat16"])
def test_prefix_widths_are_the_sums_of_prefixes(isa, types, masked):
    """Small integers, so scores equal those of logsumexp. Segments have odd widths, and chunks and blocks end early."""
    dtypes = [getattr(torch, name) for name in types.split()]
    scale = torch.tensor(0.2)
    for seed, (B, K, widths) in enumerate([(3, 7, [5]), (65, 300, [1, 32, 45, 130]), (2, 260, [64, 128, 515])]):
        D = widths[-1] + 3
        q, keys = whole(B, D, dtype=dtypes[0], seed=seed), whole(K, D, dtype=dtypes[1], seed=seed + 1)
        pool = Pool(torch.rand(B, K) < 0.8, **ids(B, K), bias=torch.randn(K)) if masked else Pool()
        lse, mean, num_kept = torch.ops.negmine_cpu.prefix_logsumexp(q, keys, widths, scale, True, *pool)
        for at, width in enumerate(widths):
            want_lse, _, want_kept, *_ = summed(q[:, :width], keys[:, :width], scale, None, False, pool)
            torch.testing.assert_close(lse[at], want_lse, rtol=1e-6, atol=1e-6)
            x = (q[:, :width].double() @ keys[:, :width].double().T) * scale
            x = x if not masked else (x + pool.bias).masked_fill(~usable(pool, q, keys), -torch.inf)
            p, prefix = x.softmax(1), keys[:, :width].double()
            rounding = 2**-7 if types == "bfloat16 bfloat16" else 1e-5  # of weights, and of the mean along the query
            assert ((mean[at, :, :width] - p @ prefix).abs() <= rounding * (p @ prefix.abs()).max()).all()
            assert torch.equal(num_kept, want_kept) and not mean[at, :, width:].any()
