"""The Triton backend on a GPU or in the interpreter, in addition to tests/test_kernels.py: torch ops for torch.compile, identical
scores in all ops, the same random draws as the reference, the range of fp16, large grids."""

import importlib

import pytest
import torch

import negmine
from negmine import Mix, Select, reference
from negmine.ops import registry, sort_key, triton_ops
from negmine.ops.pool import Pool
from negmine.options import beta_quantiles
from tests import compare
from tests.cases import DTYPES, dense_mask, ids, masks, negatives, pool_of, tags, unit, whole
from tests.conftest import DEVICE, _reason_not_here, interpreted, skip_what_the_interpreter_repeats
from tests.queues import queue

pytestmark = pytest.mark.skipif(bool(_reason_not_here("triton")), reason=_reason_not_here("triton") or "-")
B, K, D = 5, 70, 8
NO_DRAWS = (0, 0, 0.0, 0.0, 0.0, 0.0, False, None, 0, None, None)


def launchers():
    return triton_ops.launchers((DEVICE,))


def number(x):
    """An integer tensor on the device, as for a step, a row offset or a number of rows."""
    return torch.tensor(x, device=DEVICE)


def draws(pairs=3, with_query=2, seed=7, step=None, row_offset=None, quantiles=None, ranges=(0.0, 1.0, 0.2, 0.5)):
    return (pairs, with_query, *ranges, True, quantiles, seed, step, row_offset)


def some_pool(K=K, **parts):
    """A pool with equal labels, ids, and a part of the queue."""
    tags = torch.arange(B, device=DEVICE), torch.arange(K, device=DEVICE)
    return Pool(*(None, *tags, tags[0] % 2, tags[1] % 2), num_rows=number(K - 7), same_label=True)._replace(**parts)


def arguments(K=K):
    """Arguments of one or two calls of every op."""
    q, positive, keys = (unit(n, D, device=DEVICE, seed=i) for i, n in enumerate((B, B, K)))
    scale, weight = torch.tensor(5.0, device=DEVICE), torch.linspace(0.1, 1.0, B, device=DEVICE)
    ranks = torch.tensor([[1, 4]] * B, device=DEVICE)
    index = (torch.arange(B * 6, device=DEVICE).reshape(B, 6) * 7) % K
    pool, drawn = some_pool(K), draws(step=number(3), row_offset=number(2**33))
    scales = torch.stack([scale, scale / 2])
    return {
        "info_nce": [
            (q, positive, keys, scale, weight, True, False, None, 4, 1, *drawn, *pool),
            (q, positive, keys, scale, None, False, True, ranks, 0, 0, *NO_DRAWS, *pool),
        ],
        "logsumexp": [
            (q, keys, scales, weight, True, 3, None, *pool),
            (q, keys, scales[:1], None, False, 0, ranks, *pool),
        ],
        "logsumexp_grad_keys": [(q, keys, scale, weight, weight, *pool)],
        "prefix_logsumexp": [
            (q, keys, [3, D], scale, True, *pool),
            (q, keys, [1, 2, 5], scale, False, *pool),
        ],
        "softplus_sum": [(q, keys, scale, -scale, True, *pool), (q, keys, scale, -scale, False, *pool)],
        "softplus_sum_grad_keys": [(q, keys, scale, -scale, weight, *pool)],
        "logsumexp_grad_bias": [(q, keys, scale, weight, weight, *pool._replace(bias=keys[:, 0].contiguous()))],
        "softplus_sum_grad_bias": [(q, keys, scale, -scale, weight, *pool)],
        "mine_hardest": [(q, keys, 3, True, *pool), (q, keys, 3, False, *Pool())],
        "rank_thresholds": [(q, keys, ranks, *pool)],
        "count_negatives": [(q, keys, *pool)],
        "mix_negatives": [(q, keys, index, *drawn)],
        "mix_logsumexp": [(q, keys, index, scale, True, *drawn)],
        "gathered_logsumexp": [(q, keys, index, scale, True)],
        "gathered_grad_keys": [(q, index, index * 0.1, K)],
        "maxsim": [(q[:, None], keys[:12].view(4, 3, D), None, None, False)],
    }  # fmt: skip


def test_opcheck():
    """For every op: pools of equal labels, sums at two scales, windows of ranks, mixes.

    test_ops.py tests the dispatch under torch.compile, which only depends on the declarations.
    """
    torch.use_deterministic_algorithms(False)  # opcheck runs ops twice and compares the results
    calls = arguments(K=20)
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    assert set(calls) == set(launchers())
    for op, each in calls.items():
        for args in each:
            torch.library.opcheck(registry.overload(triton_ops.NAMESPACE, op), args, test_utils=checks)


def test_options_that_cannot_be_combined_raise_errors():
    calls = arguments()
    step, pooled = list(calls["info_nce"][0]), list(calls["logsumexp"][0])
    step[7] = pooled[6] = torch.zeros(B, 2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"^info_nce: ranks and synthetic negatives"):
        launchers()["info_nce"](*step)
    with pytest.raises(ValueError, match=r"^logsumexp: N above 0 and ranks"):
        launchers()["logsumexp"](*pooled)


@pytest.mark.parametrize("rows", [0, 33, K])
def test_rows_past_num_rows_are_not_there(rows):
    """Results are those of a shorter queue. Rows after num_rows are NaN, and so is a query, which gives them no gradients."""
    for op, calls in arguments().items():
        if not registry.OPS[op].takes_pool:
            continue
        for args in calls:
            args[0][2, 3] = torch.nan
            names = [value.name for value in registry.OPS[op].arguments]
            at = names.index("negative_keys")
            keys = args[at].clone()
            keys[rows:] = torch.nan
            head, pool = args[: -len(Pool._fields)], Pool(*args[-len(Pool._fields) :])
            got = launchers()[op](*head[:at], keys, *head[at + 1 :], *pool._replace(num_rows=number(rows)))
            tags = (None if x is None else x[:rows] for x in (pool.negative_ids, pool.negative_labels))
            cut = pool._replace(**dict(zip(("negative_ids", "negative_labels"), tags, strict=True)), num_rows=None)
            want = launchers()[op](*head[:at], keys[:rows].contiguous(), *head[at + 1 :], *cut)
            for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
                if other.shape != one.shape:  # gradients of keys
                    assert bool((one[rows:] == 0).all())
                    one = one[:rows]
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True, msg=op)


def test_a_step_of_info_nce_is_its_parts():
    """With two ranks of the pool and synthetic negatives, bit-identical to the other ops one after the other."""
    ops = launchers()
    q, positive, keys, scale, pivot, *_ = arguments()["info_nce"][0]
    pool = some_pool(lower=sort_key.pack(torch.full((B,), -0.5, device=DEVICE), sort_key.LAST_INDEX))
    ranks = torch.tensor([[0, 3], [2, 2], [3, 1], [1, 900], [900, 901]], device=DEVICE)
    step = ops["info_nce"](q, positive, keys, scale, pivot, True, False, ranks, 0, 0, *NO_DRAWS, *pool)
    lse, _, num_kept, num_above, _, _, sort_keys = ops["logsumexp"](q, keys, scale[None], pivot, True, 0, ranks, *pool)
    compare.exact("lse", step[4], lse[0])
    compare.exact("num_kept", step[6], num_kept)
    compare.exact("num_above", step[7], num_above)
    compare.exact("sort_keys", step[9], sort_keys)
    found = ops["rank_thresholds"](q, keys, ranks, *pool)
    empty = torch.tensor([False, False, True, False, True], device=DEVICE)
    compare.exact("keys at the ranks", sort_keys, found.masked_fill(empty[:, None], sort_key.NOWHERE))
    size = ops["count_negatives"](q, keys, *pool)
    compare.exact("window", num_kept, torch.where(empty, 0, torch.minimum(ranks[:, 1] + 1, size) - ranks[:, 0]))

    drawn = draws(step=number(3))
    step = ops["info_nce"](q, positive, keys, scale, None, True, False, None, 4, 1, *drawn, *pool)
    mined = ops["mine_hardest"](q, keys, 5, False, *pool)[1][:, 1:]
    mixed = ops["mix_logsumexp"](q, keys, mined, scale, True, *drawn)[0]
    alone = ops["logsumexp"](q, keys, scale[None], None, False, 0, None, *pool)[0][0]
    torch.testing.assert_close(step[4], torch.logaddexp(alone, mixed), rtol=1e-5, atol=1e-5)
    compare.exact("num_mixed", step[8], torch.where(mined[:, 0] >= 0, 5, 0))


def test_two_scales_equal_one_call_for_each():
    q, _, keys, *_ = arguments()["info_nce"][0]
    scales = torch.tensor([3.0, 11.0], device=DEVICE)
    both = launchers()["logsumexp"](q, keys, scales, q[:, 0], True, 0, None, *some_pool())
    for i in range(2):
        one = launchers()["logsumexp"](q, keys, scales[i : i + 1], q[:, 0], True, 0, None, *some_pool())
        for name, x, y in (("lse", both[0][i], one[0][0]), ("mean", both[1][i], one[1][0]), ("num_kept", both[2], one[2]),
                           ("num_above", both[3], one[3])):  # fmt: skip
            compare.exact(name, x, y)


def test_the_step_of_a_draw_is_read_on_the_device():
    """A captured graph draws other samples after the number in the tensor of the step changes."""
    q, keys, index = arguments()["mix_negatives"][0][:3]
    step, row_offset = number(0), number(0)
    drawn = draws(step=step, row_offset=row_offset)
    first = launchers()["mix_negatives"](q, keys, index, *drawn)[2]
    compare.exact("none is 0", launchers()["mix_negatives"](q, keys, index, *draws())[2], first)
    step += 1
    assert not torch.equal(launchers()["mix_negatives"](q, keys, index, *drawn)[2], first)
    step -= 1
    row_offset += 2
    shifted = launchers()["mix_negatives"](q, keys, index, *drawn)[2]
    compare.exact("rows", shifted[:-2], first[2:])


@pytest.mark.parametrize(
    "options",
    [{}, {"select": Select(0.01, 0.5)}, {"mix": Mix(6, 5, 4, concentration=2.0)}],
    ids=lambda o: ",".join(o) or "plain",
)
def test_a_loss_step_compiles_into_one_graph(options):
    torch._dynamo.reset()
    given = ids(B, K, DEVICE)
    inputs = [unit(n, D, device=DEVICE, seed=i) for i, n in enumerate((B, B, K))]

    def step(q, pos, keys):
        columns = negatives(keys, given)
        return negmine.info_nce(q, pos, columns, **options, **tags(given), backend="triton")

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
    """With real vectors, a threshold that one pass finds separates the same columns in all other passes."""
    skip_what_the_interpreter_repeats("triton", dtype)
    if interpreted("triton") and width > 16:
        pytest.skip("triton: interpreted, where every width adds up in one order")
    rows, keys_count = (3, 150) if interpreted("triton") else (130, 20_001)
    q, keys = (unit(n, width, dtype=dtype, device=DEVICE, seed=i) for i, n in enumerate((rows, keys_count)))
    ranks = torch.tensor([[0, keys_count // 30, keys_count // 2]], device=DEVICE).repeat(rows, 1)
    ops = launchers()
    sort_keys = ops["rank_thresholds"](q, keys, ranks, *Pool())  # (B, R)
    mined = sort_key.pack(*ops["mine_hardest"](q, keys, keys_count // 30 + 1, False, *Pool())[:2])  # (B, N)
    compare.exact("rank against mined", sort_keys[:, :2], mined[:, [0, -1]])
    scale = torch.tensor(5.0, device=DEVICE)
    top = sort_key.pack(torch.full((rows,), torch.inf, device=DEVICE), 0)
    for column, rank in enumerate(ranks[0].tolist()):
        pool = Pool(lower=sort_keys[:, column].contiguous(), upper=top)
        compare.exact("count", ops["count_negatives"](q, keys, *pool), ranks[:, column] + 1)
        lse, _, num_kept, *_ = ops["logsumexp"](q, keys, scale[None], None, True, 0, None, *pool)
        compare.exact("num_kept", num_kept, ranks[:, column] + 1)
        # In a pool that ends at a rank, the key at that rank has a gradient and the next one has none.
        if rank + 1 < keys_count and column < 2:
            first = Pool(lower=pool.lower[:1], upper=pool.upper[:1])
            one = ops["logsumexp_grad_keys"](q[:1], keys, scale, lse[0, :1], lse.new_ones(1), *first)
            touched = (one != 0).any(1)  # (K,)
            assert int(touched.sum()) == rank + 1


def test_no_rank_of_smooth_scores_needs_an_exact_search(monkeypatch):
    """Regression: quantile(0) was slow, because the bracket of the last rank was empty: no key of the sample is beyond it."""
    # The attribute of the package is the launcher, not the module.
    module = importlib.import_module("negmine.kernels.triton.rank_thresholds")
    failed = []
    monkeypatch.setattr(
        module, "find_missing", lambda q, keys, missing, *rest: failed.append(int((missing >= 0).sum()))
    )
    q, keys = unit(16, 16, device=DEVICE), unit(700 if interpreted("triton") else 20_001, 16, device=DEVICE, seed=1)
    last = len(keys) - 1
    ranks = torch.tensor([[0, 1, last // 9, last // 2, last - 20, last - 1, last]] * 16, device=DEVICE)
    got = sort_key.unpack(launchers()["rank_thresholds"](q, keys, ranks, *Pool()))[0]
    ends = torch.stack((q @ keys.T).aminmax(dim=1)[::-1], 1)  # (B, 2)
    torch.testing.assert_close(got[:, [0, -1]], ends, rtol=0, atol=1e-6)
    assert failed and sum(failed) == 0


@pytest.mark.parametrize(("kind", "room"), [("easy between samples", 1000), ("hard between samples", 6)])
def test_what_a_sample_misjudges_is_found_exactly(kind, room, monkeypatch):
    """Mining and ranks with cuts that keep too few columns and with buffers that overflow. A row has one buffer."""
    from negmine.kernels.triton import exact_search, tiles
    from negmine.kernels.triton.launch import capability

    failed, plan = [], tiles.scan_plan

    def find(q, keys, missing, *rest):
        failed.append(int((missing >= 0).sum()))
        exact_search.find_missing(q, keys, missing, *rest)

    def smaller(*shape):
        return plan(*shape)._replace(capacity=min(room, plan(*shape).capacity))

    for name in "mine_hardest", "rank_thresholds":
        monkeypatch.setattr(importlib.import_module(f"negmine.kernels.triton.{name}"), "find_missing", find)
    monkeypatch.setattr(tiles, "scan_plan", smaller)
    rows, columns, N = (14, 150, 20) if interpreted("triton") else (130, 20_000, 40)
    sample = tiles.sample_size(columns, 16, capability(torch.device(DEVICE)))
    q = whole(rows, 8, device=DEVICE).abs() + 1
    keys = queue(kind, columns, 8, sample).to(DEVICE)
    given = masks("pairs", rows, columns, DEVICE)
    given["negative_mask"][3] = torch.tensor([k % 8 < 2 and k in (*range(32), *range(64, 96)) for k in range(columns)])
    scores, index = reference.mine_hardest(q, keys, columns, dense_mask(q, keys, given))
    got = launchers()["mine_hardest"](q, keys, N, False, *pool_of(q, keys, given))
    compare.exact("scores", got[0], scores[:, :N])
    compare.exact("index", got[1], index[:, :N])
    ranks = torch.tensor([[N, columns // 2]] * rows, device=DEVICE)
    want = sort_key.pack(scores, index).masked_fill(index < 0, sort_key.NOWHERE).gather(1, ranks)
    compare.exact("ranks", launchers()["rank_thresholds"](q, keys, ranks, *pool_of(q, keys, given)), want)
    assert all(failed)


def test_a_certificate_needs_N_found_and_no_full_buffer():
    """Rows with 40 buffers of size 5: N found; one fewer; one too many in the first or the last buffer; no cut; both."""
    from negmine.kernels.triton.certificate import certificate
    from negmine.kernels.triton.scan import Survivors
    from negmine.kernels.triton.sort_key import EVERYTHING

    N, found = 40, torch.ones(6, 40, dtype=torch.int32, device=DEVICE)
    found[0, 0], found[0, 1:5], found[1, 7] = 5, 0, 0
    found[2, 0], found[3, 39], found[4], found[5, 0] = 6, 6, 0, 6
    cut = torch.tensor([0, 0, 0, 0, EVERYTHING.value, EVERYTHING.value], device=DEVICE)[:, None]
    missing = certificate(Survivors(found, found, None, 5), cut, N)
    assert missing.tolist() == [[-1], [N - 1], [N - 1], [N - 1], [-1], [N - 1]]


def test_a_refilled_buffer_holds_the_columns_of_its_cut_and_nothing_else():
    """For rows that failed. A stale sort key in any other slot would become a hardest negative."""
    from negmine.kernels.triton.exact_search import collect_from
    from negmine.kernels.triton.launch import score_tile
    from negmine.kernels.triton.pool import kernel_pool

    N, width, stale = 7, 40, 2**62  # above the sort key of every score here
    q, keys, pool = whole(3, 8, device=DEVICE), whole(90, 8, device=DEVICE, seed=1), kernel_pool(Pool())
    ranked = sort_key.pack(*reference.mine_hardest(q, keys, 90))  # (3, 90) int64, hardest first
    missing = torch.tensor([[N - 1], [-1], [N - 1]], device=DEVICE)
    survivors = torch.full((3, width), stale, device=DEVICE)
    collect_from(q, keys, ranked[:, [N - 1]], missing, survivors, score_tile(q, keys, pool), pool)
    want = torch.full((3, width), sort_key.NOWHERE, device=DEVICE)
    want[:, :N], want[1] = ranked[:, :N], stale
    compare.exact("survivors", survivors.sort(1, descending=True).values, want)


@pytest.mark.parametrize("count", [2, 3, 70], ids=lambda R: f"{R} ranks")
def test_rows_in_chunks_are_the_rows_at_once(count, monkeypatch):
    """One row at a time, if scratch memory is not enough for more: each way of finding ranks, and mining."""
    q, keys, pool = unit(B, D, device=DEVICE), unit(K, D, device=DEVICE, seed=1), some_pool(same_label=False)
    ranks = torch.arange(count, device=DEVICE).repeat(B, 1)

    def found():
        return launchers()["rank_thresholds"](q, keys, ranks, *pool), *launchers()["mine_hardest"](
            q, keys, 6, True, *pool
        )

    want = found()
    monkeypatch.setattr("negmine.kernels.triton.tiles.SCRATCH_BYTES", 1)
    for got, at_once in zip(found(), want, strict=True):
        compare.exact("rows", got, at_once)


@pytest.mark.parametrize("concentration", [1.0, 0.5])
def test_coefficients_are_the_references_bits(concentration):
    mix = Mix(6, 40, 40, pair_range=(0.1, 0.93), query_range=(0.07, 0.5), concentration=concentration)
    q, keys = unit(B, D, device=DEVICE), unit(K, D, device=DEVICE, seed=1)
    index = launchers()["mine_hardest"](q, keys, 6, False, *Pool())[1]
    table = mix.quantiles if mix.quantiles is None else mix.quantiles.to(DEVICE)
    ranges = (*mix.pair_range, *mix.query_range)
    drawn = draws(40, 40, 3, number(4), quantiles=table, ranges=ranges)
    got = launchers()["mix_negatives"](q, keys, index, *drawn)
    want = reference.mix_negatives(q.cpu(), keys.cpu(), mix, seed=3, step=4)
    compare.exact("coefficients", got[2].cpu(), want[2])
    assert (beta_quantiles(concentration) is None) == (concentration == 1.0)


def test_nan_stays_in_its_mixes():
    q, keys = unit(2, 6, device=DEVICE), unit(9, 6, device=DEVICE, seed=1)
    index = launchers()["mine_hardest"](q, keys, 4, False, *Pool())[1]
    q[1, 2] = torch.nan
    vectors, _, _ = launchers()["mix_negatives"](q, keys, index, *draws(2, 3))
    assert bool(vectors[0].isfinite().all()) and bool(vectors[1, :2].isfinite().all())
    assert bool(vectors[1, 2:].isnan().all())  # all elements of a vector, because its norm is NaN


@pytest.mark.parametrize("size", [2.0**22, 2.0**-30])
def test_fp16_key_gradients_have_the_range_of_fp32(size):
    """Regression: probabilities times weights overflow fp16 with a gradient scaler, and underflow for one key of many."""
    q, keys = unit(16, 16, dtype=torch.float16, device=DEVICE), unit(K, 16, dtype=torch.float16, device=DEVICE, seed=1)
    scale, weight = torch.tensor(14.0, device=DEVICE), torch.full((16,), size, device=DEVICE)
    lse = launchers()["logsumexp"](q, keys, scale[None], None, False, 0, None, *Pool())[0][0]
    got = launchers()["logsumexp_grad_keys"](q, keys, scale, lse, weight, *Pool())
    p = torch.softmax(q.double() @ keys.double().T * 14.0, 1)  # (B, K)
    want = p.T @ (q.double() * size)  # (K, D)
    assert float((got - want).abs().max()) <= 4 * torch.finfo(torch.float16).eps * float(want.abs().max())


def test_more_mixes_than_a_grid_axis_takes():
    """The second axis of a grid has at most 65,535 blocks."""
    slots = 70_000 if not interpreted("triton") else 90
    q, keys = unit(2, 5000, device=DEVICE), unit(3, 5000, device=DEVICE, seed=1)
    index = torch.tensor([[2, 0], [1, -1]], device=DEVICE)
    parents = launchers()["mix_negatives"](q, keys, index, *draws(0, slots))[1]
    assert bool((parents[1, :, 1] == 1).all()) and sorted(parents[0, :, 1].unique().tolist()) == [0, 2]


def test_a_rank_takes_few_passes_over_the_kept_columns(monkeypatch):
    """Each pass reads the kept columns of a row from cache; bisection needed twelve passes. For random and for equal scores."""
    if not interpreted("triton"):
        pytest.skip("passes are counted where kernels are interpreted")
    module = importlib.import_module("negmine.kernels.triton.select_by_rank")
    passes = []

    def counting(original):
        def counted(*args):
            passes.append(1)
            return original(*args)

        return counted

    for name in ("ends_of", "count_from"):
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    # One row per program, as on a GPU.
    monkeypatch.setattr(module.tiles, "row_block", lambda width, capability: (1, 4096, 4))
    rows, width = 24, 3000
    generator = torch.Generator().manual_seed(4)
    used = torch.rand(rows, width, generator=generator) < 0.4
    index = torch.arange(width).expand(rows, width)
    ranks = torch.randint(0, 1000, (rows, 1), generator=generator)
    for name, most, scores in [
        ("even", 5.0, torch.rand(rows, width, generator=generator) * 0.02 - 0.01),  # around a median
        ("normal", 8.0, torch.randn(rows, width, generator=generator)),
        ("equal", 4.5, torch.full((rows, width), 0.25)),
    ]:
        keys = torch.where(used, sort_key.pack(scores, index), sort_key.NOWHERE)
        passes.clear()
        got = module.select_by_rank(keys, ranks)
        compare.exact(name, got, keys.sort(1, descending=True).values.gather(1, ranks))
        print(f"{name}: {len(passes) / rows:.1f} passes a rank")
        assert len(passes) <= most * rows
