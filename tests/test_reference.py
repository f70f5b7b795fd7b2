"""The reference compared with simple loops in float64, and its gradients with finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from negmine import reference
from negmine.ops import philox
from negmine.options import FalseNegatives, Mix, Select, Weight, beta_quantiles
from tests.cases import unit, whole

B, K, D, T = 4, 23, 6, 0.3


def vectors(seed=0):
    q, pos, keys = (unit(n, D, seed=seed + i).double() for i, n in enumerate((B, B, K)))
    usable = torch.rand(B, K, generator=torch.Generator().manual_seed(seed)) < 0.8
    return q, pos, keys, usable


def ranked(scores, usable):
    """Return the columns of a row, hardest first, with Python's stable sort."""
    return sorted((k for k in range(len(scores)) if usable[k]), key=lambda k: (-scores[k], k))


def test_philox_known_answers():
    def words(counter, key):
        return [int(w) for w in philox.philox(tuple(torch.tensor([c]) for c in counter), *key)]

    assert words((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert words((ones,) * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(pi, (0xA4093822, 0x299F31D0)) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("concentration", [0.2, 0.5, 2.0, 6.0])
def test_beta_quantiles_have_the_moments_of_beta(concentration):
    f = beta_quantiles(concentration).double()
    middle = (f[1:] + f[:-1]) / 2
    assert bool((f.diff() >= 0).all())
    assert abs(middle.mean() - 0.5) < 1e-6
    assert abs(middle.var() - 1 / (4 * (2 * concentration + 1))) < 2e-4
    assert beta_quantiles(1.0) is None


@pytest.mark.parametrize("make", [unit, whole])
def test_mining_ranks_and_quantiles(make):
    q, keys = make(B, D).double(), make(K, D, seed=1).double()
    usable = torch.rand(B, K) < 0.7
    usable[1] = False
    scores = q @ keys.T
    N = K + 2
    got, index = reference.mine_hardest(q, keys, N, usable)
    at = reference.rank_thresholds(q, keys, torch.tensor([[0, 3, K, -1]]).expand(B, 4), usable)
    levels = torch.tensor([0.0, 0.31, 0.5, 1.0], dtype=torch.float64)
    quantiles = reference.quantile(q, keys, levels, usable)
    for b in range(B):
        order = ranked(scores[b].tolist(), usable[b])
        assert index[b].tolist() == order + [-1] * (N - len(order))
        assert got[b].tolist() == [scores[b, k].item() for k in order] + [-math.inf] * (N - len(order))
        assert at[b].tolist() == [
            scores[b, order[r]].item() if 0 <= r < len(order) else -math.inf for r in (0, 3, K, -1)
        ]
        want = scores[b][usable[b]].quantile(levels) if order else torch.full((4,), torch.nan)
        torch.testing.assert_close(quantiles[b], want.double(), equal_nan=True, rtol=1e-12, atol=1e-12)


SELECTS = [
    Select(0, 5),
    Select(2, 7),
    Select(0.1, 0.5),
    Select(0.0, 0.01),
    Select(0.5, 1.0),
    Select(30, 40),
    Select(3),
    Select(max_score=0.2, min_score=-0.4),
    Select(0, 0.5, absolute_margin=0.1),
    Select(1, 6, relative_margin=0.2),
    Select(0, 0.6, absolute_margin=-0.3, relative_margin=-0.1, max_score=0.6),
]


def kept_by_loop(scores, positive, usable, select):
    """Return the columns of one row that select keeps, according to its docstring."""
    pool = []
    for k in ranked(scores, usable):
        s = scores[k]
        if select.min_score is not None and s < select.min_score:
            continue
        if select.max_score is not None and s > select.max_score:
            continue
        if select.absolute_margin is not None and s > positive - select.absolute_margin:
            continue
        if select.relative_margin is not None and s > positive - abs(positive) * select.relative_margin:
            continue
        pool.append(k)
    M = len(pool)
    fraction = isinstance(select.range_min, float) or isinstance(select.range_max, float)
    first, end = (
        M if bound is None else math.floor(bound * M) if isinstance(bound, float) else bound
        for bound in (select.range_min, select.range_max)
    )
    if fraction:
        end = max(end, first + 1)
    return pool[first:end]


@pytest.mark.parametrize("select", SELECTS, ids=repr)
@pytest.mark.parametrize("decoupled", [False, True])
def test_info_nce_keeps_what_select_selects(select, decoupled):
    q, pos, keys, usable = vectors()
    usable[2] = False
    loss, stats = reference.info_nce(q, pos, keys, temperature=T, usable=usable, select=select, decoupled=decoupled)
    for b in range(B):
        scores, positive = (q[b] @ keys.T).tolist(), float(q[b] @ pos[b])
        kept = kept_by_loop(scores, positive, usable[b], select)
        total = sum(math.exp(scores[k] / T) for k in kept) + (0 if decoupled else math.exp(positive / T))
        want = math.log(total) - positive / T if kept else 0.0
        assert loss[b].item() == pytest.approx(want, rel=1e-12, abs=1e-12)
        assert stats["num_negatives"][b] == len(kept)
        assert stats["positive_rank"][b] == sum(scores[k] > positive for k in range(K) if usable[b, k])
        if total:
            assert stats["logsumexp"][b].item() == pytest.approx(math.log(total), rel=1e-12)
    assert stats["num_empty"] == sum(
        not kept_by_loop((q[b] @ keys.T).tolist(), float(q[b] @ pos[b]), usable[b], select) for b in range(B)
    )


@pytest.mark.parametrize("beta, tau_plus", [(0.0, 0.0), (1.5, 0.0), (0.0, 0.01), (1.0, 0.05), (0.5, 0.9)])
def test_weights_are_the_published_sums(beta, tau_plus):
    q, pos, keys, usable = vectors()
    weight = Weight(beta, tau_plus)
    loss, stats = reference.info_nce(q, pos, keys, temperature=T, usable=usable, weight=weight)
    for b in range(B):
        x = [float(q[b] @ keys[k]) / T for k in range(K) if usable[b, k]]
        positive, N = math.exp(float(q[b] @ pos[b]) / T), len(x)
        importance = [math.exp(beta * v) for v in x]
        R = sum(w * math.exp(v) for w, v in zip(importance, x, strict=True)) / (sum(importance) / N)
        raw, floor = (R - tau_plus * N * positive) / (1 - tau_plus), N * math.exp(-1 / T)
        Ng = max(raw, floor) if tau_plus else R
        assert loss[b].item() == pytest.approx(-math.log(positive / (positive + Ng)), rel=1e-10)
        assert bool(stats["clamped"][b]) == (tau_plus > 0 and raw < floor)


def test_the_misprints_of_hcl_differ():
    """The printed pseudo-code has weights beta * e^x / mean(e^x). The code, and ours, have e^(beta x) / mean(e^(beta x))."""
    q, pos, keys, _ = vectors()
    loss, _ = reference.info_nce(q, pos, keys, temperature=T, weight=Weight(0.5))
    e, positive = (q @ keys.T / T).exp(), ((q * pos).sum(1) / T).exp()
    misprint = (0.5 * e / e.mean(1, keepdim=True) * e).sum(1)
    assert not torch.allclose(loss, -(positive / (positive + misprint)).log())


def test_detached_weights_keep_the_value_and_change_the_gradient():
    q, pos, keys, _ = vectors()
    grads = []
    for detach in (False, True):
        leaf = q.clone().requires_grad_()
        loss, _ = reference.info_nce(leaf, pos, keys, temperature=T, weight=Weight(1.0, detach=detach))
        grads.append((loss.sum().item(), torch.autograd.grad(loss.sum(), leaf)[0]))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-12)
    x = q @ keys.T / T
    w = (x.exp() / x.exp().mean(1, keepdim=True)).detach()  # beta = 1, detached
    leaf = q.clone().requires_grad_()
    held = torch.log1p((w * (leaf @ keys.T / T).exp()).sum(1) / ((leaf * pos).sum(1) / T).exp())
    torch.testing.assert_close(grads[1][1], torch.autograd.grad(held.sum(), leaf)[0])
    assert not torch.allclose(grads[0][1], grads[1][1])


MIX = Mix(5, 7, 4, skip=1, pair_range=(0.2, 0.9), concentration=2.0)


@pytest.mark.parametrize("mix", [MIX, Mix(3, 4, 0, distinct=False), Mix(40, 0, 5, query_range=(0.1, 0.4))], ids=repr)
def test_mixing_by_hand(mix):
    q, _, keys, usable = vectors()
    usable[1], usable[2] = False, False
    usable[2, 4] = True  # at most one parent
    got, parents, share = reference.mix_negatives(q, keys, mix, usable, seed=11, step=3, row_offset=2**33 + 5)
    table = beta_quantiles(mix.concentration)
    for b in range(B):
        pool = ranked((q[b] @ keys.T).tolist(), usable[b])[mix.skip : mix.skip + mix.hard]
        n, row = len(pool), 2**33 + 5 + b
        for s in range(mix.total):
            counter = tuple(torch.tensor(c) for c in (row & 0xFFFFFFFF, row >> 32, s, 0))
            u = [int(w) for w in philox.philox(counter, 11, 3)]
            pair = s < mix.pairs
            if n == 0:
                assert parents[b, s].tolist() == [-1, -1] and share[b, s] == 0 and not got[b, s].any()
                continue
            i, j = u[0] * n >> 32, u[1] * n >> 32
            if pair and mix.distinct and n > 1:
                j = u[1] * (n - 1) >> 32
                j += j >= i
                assert i != j
            f = (u[2] >> 8) * 2.0**-24
            if table is not None:
                cell, rest = (u[2] >> 8) >> 12, ((u[2] >> 8) & 4095) / 4096
                f = float(table[cell] + rest * (table[cell + 1] - table[cell]))
            low, high = mix.pair_range if pair else mix.query_range
            c = low + (high - low) * f
            m = c * (keys[pool[i]] if pair else q[b]) + (1 - c) * keys[pool[j]]
            assert parents[b, s].tolist() == [pool[i] if pair else -1, pool[j]]
            assert share[b, s].item() == pytest.approx(c, abs=1e-6)
            torch.testing.assert_close(got[b, s], m / m.norm(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_mixed_negatives_join_the_denominator(detach):
    q, pos, keys, usable = vectors()
    mix = Mix(5, 7, 4, detach=detach)
    loss, stats = reference.info_nce(q, pos, keys, temperature=T, usable=usable, select=Select(0, 6), mix=mix, seed=1)
    h = reference.mix_negatives(q, keys, mix, usable, seed=1)[0]
    for b in range(B):
        kept = ranked((q[b] @ keys.T).tolist(), usable[b])[:6]
        logits = torch.cat([(q[b] @ pos[b])[None], keys[kept] @ q[b], h[b] @ q[b]]) / T
        assert loss[b].item() == pytest.approx(float(logits.logsumexp(0) - logits[0]), rel=1e-10)
    assert bool((stats["num_negatives"] == 6).all())


@pytest.mark.parametrize("mode", ["eliminate", "attract"])
@pytest.mark.parametrize("top_k, threshold, reduce", [(3, 0.2, "max"), (None, 0.3, "mean"), (4, None, "max")])
def test_false_negatives_by_hand(mode, top_k, threshold, reduce):
    q, pos, keys, usable = vectors()
    support = unit(B, 3, D, seed=5).double()
    options = FalseNegatives(top_k, threshold, mode=mode, reduce=reduce)
    loss, stats = reference.info_nce(
        q, pos, keys, temperature=T, usable=usable, false_negatives=options, support=support
    )
    some_found = 0
    for b in range(B):
        views = support[b] @ keys.T
        f = (views.amax(0) if reduce == "max" else views.mean(0)).tolist()
        found = [k for k in ranked(f, usable[b])[:top_k] if threshold is None or f[k] > threshold]
        some_found += len(found)
        x = (q[b] @ keys.T / T).tolist()
        positive = float(q[b] @ pos[b]) / T
        negatives = [k for k in range(K) if usable[b, k] and k not in found]
        attracted = found if mode == "attract" else []
        total = math.exp(positive) + sum(math.exp(x[k]) for k in negatives + attracted)
        pull = (positive + sum(x[k] for k in attracted)) / (1 + len(attracted))
        assert loss[b].item() == pytest.approx(math.log(total) - pull, rel=1e-10)
        assert stats["num_negatives"][b] == len(negatives)
    assert some_found


@pytest.mark.parametrize("replace", [False, True])
def test_samples_come_from_the_window_and_depend_on_the_key_alone(replace):
    q, pos, keys, usable = vectors()
    select = Select(2, 0.9, sample=6, replace=replace)
    scores = q @ keys.T

    def times(**key):
        return reference.multiplicity(scores, None, select, usable, **{"seed": 1, "step": 2, "row_offset": 0, **key})

    window = reference.multiplicity(scores, None, Select(2, 0.9), usable, 0, 0, 0)
    drawn = times()
    assert bool((drawn[window == 0] == 0).all())
    assert bool((drawn.sum(1) == (6 if replace else window.sum(1).clamp_max(6))).all())
    assert replace or int(drawn.max()) == 1
    assert torch.equal(times(), drawn) and not torch.equal(times(step=3), drawn)
    alone = reference.multiplicity(scores[2:3], None, select, usable[2:3], 1, 2, 2)
    assert torch.equal(alone[0], drawn[2])  # draws depend on the global row, not on the position in the batch
    loss, stats = reference.info_nce(q, pos, keys, temperature=T, usable=usable, select=select, seed=1, step=2)
    want = ((scores / T).exp() * drawn).sum(1) + ((q * pos).sum(1) / T).exp()
    torch.testing.assert_close(loss, want.log() - (q * pos).sum(1) / T)
    assert torch.equal(stats["num_negatives"], drawn.sum(1))


def test_samples_are_uniform_over_the_window():
    scores = torch.arange(40, 0, -1.0).expand(4000, 40)
    times = reference.multiplicity(scores, None, Select(10, 30, sample=5), None, 0, 0, 0).double()
    assert bool((times[:, :10] == 0).all()) and bool((times[:, 30:] == 0).all())
    assert float((times[:, 10:30].mean(0) - 0.25).abs().max()) < 5 * math.sqrt(0.25 * 0.75 / 4000)


def test_own_negatives_are_the_shared_ones_repeated():
    q, pos, keys, usable = vectors()
    own = keys.expand(B, K, D).contiguous()
    for options in ({}, {"select": Select(0.1, 0.6)}, {"mix": MIX, "seed": 4}, {"weight": Weight(1.0)}):
        shared_loss, _ = reference.info_nce(q, pos, keys, temperature=T, usable=usable, **options)
        own_loss, _ = reference.info_nce(q, pos, own, temperature=T, usable=usable, **options)
        torch.testing.assert_close(own_loss, shared_loss)


GRADIENT_CASES = [
    {},
    {"select": Select(0.1, 0.7)},
    {"select": Select(0, 5, absolute_margin=0.05)},
    {"mix": MIX},
    {"mix": Mix(5, 7, 4, detach=False)},
    {"weight": Weight(1.0, 0.01)},
    {"weight": Weight(0.0, 0.9)},
    {"decoupled": True, "select": Select(30, 40)},
    {"false_negatives": FalseNegatives(3, 0.1, mode="attract"), "support": unit(B, 2, D, seed=9).double()},
]


@pytest.mark.parametrize("options", GRADIENT_CASES, ids=lambda o: ",".join(o) or "plain")
def test_gradients_by_finite_differences(options):
    q, pos, keys, usable = vectors()
    usable[3] = False
    temperature = torch.tensor(T, dtype=torch.float64)
    if "mix" in options and options["mix"].detach:
        # Detached mixes depend on the inputs but must not be differentiated, so they are kept fixed for the finite differences.
        h = reference.mix_negatives(q, keys, options["mix"], usable)[0]

        def loss_of(q, pos, keys, temperature):
            x = torch.cat([q @ keys.T, torch.einsum("bd,bsd->bs", q, h)], 1) / temperature
            drop = torch.cat([~usable, ~usable.any(1, keepdim=True).expand(B, h.shape[1])], 1)
            x = torch.cat([((q * pos).sum(1) / temperature)[:, None], x.masked_fill(drop, -math.inf)], 1)
            return x.logsumexp(1) - x[:, 0]

        leaves = [t.clone().requires_grad_() for t in (q, pos, keys, temperature)]
        held = torch.autograd.grad(loss_of(*leaves).sum(), leaves)
        leaves = [t.clone().requires_grad_() for t in (q, pos, keys, temperature)]
        ours = reference.info_nce(*leaves[:3], temperature=leaves[3], usable=usable, **options)[0]
        for a, b in zip(torch.autograd.grad(ours.sum(), leaves), held, strict=True):
            torch.testing.assert_close(a, b)
        return
    leaves = [t.clone().requires_grad_() for t in (q, pos, keys, temperature)]

    def loss(q, pos, keys, temperature):
        return reference.info_nce(q, pos, keys, temperature=temperature, usable=usable, **options)[0]

    assert torch.autograd.gradcheck(loss, leaves)


def test_windows_partition_the_denominator():
    q, pos, keys, usable = vectors()
    parts = [Select(0.0, 0.3), Select(0.3, 1.0)]
    whole_lse, *lses = (
        reference.info_nce(q, pos, keys, temperature=T, usable=usable, select=s, decoupled=True)[1]["logsumexp"]
        for s in [None, *parts]
    )
    torch.testing.assert_close(torch.logaddexp(*lses), whole_lse)


@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("denominator", ["all", "own_positive", "negatives_only"])
def test_sup_con_by_loop(positives, denominator):
    q, _, keys, usable = vectors()
    query_labels, key_labels = torch.tensor([0, 1, 5, -1]), torch.arange(K) % 4 - 1
    got, _ = reference.sup_con(
        q, keys, query_labels, key_labels, temperature=T, positives=positives, denominator=denominator, usable=usable
    )
    for b in range(B):
        e = {k: math.exp(float(q[b] @ keys[k]) / T) for k in range(K) if usable[b, k]}
        same = [k for k in e if query_labels[b] >= 0 and key_labels[k] == query_labels[b]]
        others = sum(e[k] for k in e if k not in same)
        total = {
            "all": lambda k, e=e: sum(e.values()),
            "own_positive": lambda k, e=e, others=others: others + e[k],
            "negatives_only": lambda k, others=others: others,
        }
        ratios = [e[k] / total[denominator](k) for k in same]
        if not ratios:
            want = 0.0
        elif positives == "out":
            want = -sum(map(math.log, ratios)) / len(ratios)
        else:
            want = -math.log(sum(ratios) / len(ratios))
        assert got[b].item() == pytest.approx(want, rel=1e-10)
    leaf = q.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: reference.sup_con(
            v, keys, query_labels, key_labels, temperature=T, positives=positives, denominator=denominator
        )[0],
        leaf,
    )


def test_plain_loss_is_cross_entropy():
    q, pos, keys, _ = vectors()
    logits = torch.cat([(q * pos).sum(1, keepdim=True), q @ keys.T], 1) / T
    want = F.cross_entropy(logits, torch.zeros(B, dtype=torch.long), reduction="none")
    torch.testing.assert_close(reference.info_nce(q, pos, keys, temperature=T)[0], want)
