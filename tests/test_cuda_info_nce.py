"""info_nce of the CUDA backend with and without a GPU: what it makes of the sums it is made of, and its launches.

kernels/cuda/info_nce.cu runs on the CPU under tests/emulator. The same cases run on a GPU, where there is one, and are small
enough for compute-sanitizer.
"""

import ctypes
import functools
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import negmine
from negmine import Mix, Select, Weight
from negmine.losses.info_nce import NO_DRAWS
from negmine.ops import backends, compiled
from negmine.ops.pool import Pool
from negmine.ops.windows import Draw, mixing_draws
from tests import emulate, emulated_loss, emulated_mining, emulated_ranking
from tests.aot import OnDevice
from tests.cases import MASKS, masks, negatives, tags, unit, whole
from tests.compare import exact, rounded
from tests.emulate import on_gpu, pointer, pool_of
from tests.test_cuda_logsumexp import as_declared, emulated_sum

NAMES = ("rows", "d_query", "d_scale", "weight", "lse", "total", "num_kept", "num_above", "num_mixed", "sort_keys")
SPLITS = 3


def emulated_ops(product, **how):
    """The ops of a loss with the arguments and results of their declarations, by the emulator."""
    mined, ranked = emulated_mining.emulated("emulated"), emulated_ranking.emulated("emulated")
    summed = functools.partial(emulated_sum(product, emulate.build("logsumexp", product)), splits=SPLITS)
    mixing = emulate.build("mixing", product)

    def logsumexp(query, negative_keys, scales, pivot, want_mean, N, ranks, *pool):
        pool, sort_keys = Pool(*pool), torch.empty(len(query), 0, dtype=torch.int64)
        if ranks is not None:
            pool, sort_keys = emulated_loss.narrowed(query, negative_keys, ranks, pool)
        return *as_declared(summed, mined)(query, negative_keys, scales, pivot, want_mean, N, None, *pool)[
            :-1
        ], sort_keys

    def mix_logsumexp(query, negative_keys, index, scale, want_mean, *draws):
        B, D = query.shape
        lse, mean = torch.full((B,), -9.0), torch.full((B if want_mean else 0, D), -9.0)
        given = ctypes.byref(emulate.mixing_of(query, negative_keys, index, draws))
        outputs = map(pointer, (lse, mean))
        assert mixing.emulated_mix_logsumexp(given, pointer(scale), want_mean, False, *outputs) == 0
        return lse, mean

    return {
        "info_nce": emulated_loss.emulated(product, SPLITS, **how),
        "logsumexp": logsumexp,
        "mine_hardest": lambda *args: (*mined(*args[:3], Pool(*args[4:])), None),
        "mix_logsumexp": mix_logsumexp,
        "rank_thresholds": lambda *args: ranked(*args[:3], Pool(*args[3:])),
    }


def gpu_ops():
    def by_gpu(op):
        def run(*args):
            return tuple(out.cpu() for out in op(*(on_gpu(x) if isinstance(x, torch.Tensor) else x for x in args)))

        return run

    names = ("info_nce", "logsumexp", "mine_hardest", "mix_logsumexp")
    return {name: by_gpu(getattr(torch.ops.negmine_cuda, name).default) for name in names}


@pytest.fixture(
    params=["emulated", "compiled_sm80", pytest.param("gpu", marks=(pytest.mark.gpu, pytest.mark.sanitized))]
)
def ops(request):
    """The ops on CPU tensors, by the emulator, as compiled or by the GPU."""
    if request.param == "gpu" and compiled.CUDA_REFUSAL:
        pytest.skip(compiled.CUDA_REFUSAL)
    return SimpleNamespace(**(gpu_ops() if request.param == "gpu" else emulated_ops(request.param)))


def finished(query, positive, scale, sums, mixed, some, decoupled, dtype):
    """The definition from the sums (lse, mean) of real and of synthetic negatives, in a dtype."""
    q, p, s, lse, mean, lse_mixed, mean_mixed = (x.to(dtype) for x in (query, positive, scale, *sums, *mixed))
    both = torch.logaddexp(lse, lse_mixed)
    parts = [(each - both).exp().nan_to_num(nan=0.0, posinf=0.0)[:, None] for each in (lse, lse_mixed)]
    score = (q * p).sum(1)
    x, gap = s * score, both - s * score
    share = torch.where(some, 1.0, 0.0).to(dtype) if decoupled else gap.sigmoid()
    rows = torch.where(some, gap, 0.0 * x) if decoupled else -torch.nn.functional.logsigmoid(-gap)
    total = both if decoupled else torch.logaddexp(x, both)
    mean = parts[0] * mean + parts[1] * mean_mixed if len(mean) else mean
    d_query = s * share[:, None] * (mean - p) if len(mean) else mean
    d_scale = share * ((q * mean).sum(1) - score) if len(mean) else mean.sum(1)
    return rows, d_query, d_scale, s * share, both, total


def check(
    ops, q, positive, keys, scale=5.0, pivot=None, want_gradient=True, decoupled=False, ranks=None, mix=None, **given
):
    """The op against the ops that it is made of: counts, bounds and the lse of real negatives to the bit."""
    pool, scale = pool_of(q, keys, **given), torch.tensor(scale)
    ranks = None if ranks is None else torch.tensor([ranks] * len(q)).reshape(len(q), 2)
    draws = NO_DRAWS if mix is None else mixing_draws(mix, q, Draw(3, torch.tensor(4), torch.tensor(5)))
    hard, skip = (0, 0) if mix is None else (mix.hard, mix.skip)
    got = ops.info_nce(q, positive, keys, scale, pivot, want_gradient, decoupled, ranks, hard, skip, *draws, *pool)
    lse, mean, num_kept, num_above, _, _, sort_keys = ops.logsumexp(
        q, keys, scale[None], pivot, want_gradient, 0, ranks, *pool
    )
    mixed, num_mixed = (torch.full_like(lse[0], -torch.inf), torch.zeros_like(mean[0])), torch.zeros_like(num_kept)
    if mix is not None:
        index = ops.mine_hardest(q, keys, min(skip + hard, max(len(keys), skip + 1)), False, *pool)[1][:, skip:]
        mixed = ops.mix_logsumexp(q, keys, index.contiguous(), scale, want_gradient, *draws)
        num_mixed = (index[:, 0] >= 0).long() * mix.total
    some = num_kept + num_mixed > 0
    truth, plain = (
        finished(q, positive, scale, (lse[0], mean[0]), mixed, some, decoupled, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    results = dict(zip(NAMES, got, strict=True))
    for name, want in (
        ("num_kept", num_kept),
        ("num_above", num_above),
        ("num_mixed", num_mixed),
        ("sort_keys", sort_keys),
    ):
        exact(name, results[name], want)
    if mix is None:
        exact("lse", results["lse"], lse[0])
    largest = (
        float((scale.abs() * q.double().abs() @ keys.double().nan_to_num().abs().T).max())
        if keys.numel() and q.numel()
        else 1.0
    )
    terms = {
        "d_query": scale * torch.cat([mean[0], mixed[1], positive.float()]),
        "d_scale": q.float() * positive.float(),
    }
    for name, one, other in zip(NAMES[:6], truth, plain, strict=True):
        assert results[name].dtype == torch.float32
        rounded(name, results[name], one, other, largest, terms.get(name))
    return results


SHAPES = [(1, 1, 1), (0, 9, 7), (2, 0, 7), (3, 5, 7), (17, 130, 70), (2, 70, 200), (5, 100, 128)]  # B, K, D
KINDS = {
    "plain": {},
    "decoupled": {"decoupled": True, "pivot": True},
    "window": {"ranks": (1, 30)},
    "mixed": {"mix": Mix(12, 9, 5, skip=1), "pivot": True},
    "mixed and decoupled": {"mix": Mix(12, 0, 5), "decoupled": True},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(ops, shape, kind):
    B, K, D = shape
    dtype = torch.float16 if D == 70 else torch.bfloat16
    q, positive, keys = (unit(n, D, dtype=dtype, seed=i) for i, n in enumerate((B, B, K)))
    kind = kind | ({"pivot": torch.full((B,), 0.1)} if "pivot" in kind else {})
    with_gradient = check(ops, q, positive, keys, 14.0, **kind)
    without = check(ops, q, positive, keys, 14.0, want_gradient=False, **kind)
    for name in ("rows", "weight", "lse", "total"):
        exact(name, without[name], with_gradient[name])


@pytest.mark.parametrize("kind", MASKS)
def test_masks(ops, kind):
    """Of small integers: counts are exact, ties with the pivot and at the ends of the window too; hidden keys are NaN."""
    B, K, D = 9, 100, 20
    q, positive, keys = (whole(n, D, dtype=torch.bfloat16, seed=i) for i, n in enumerate((B, B, K)))
    given = masks(kind, B, K)
    if kind == "columns":
        keys[~given["negative_mask"]] = torch.nan
    for more in ({"pivot": torch.arange(B).float() - 5}, {"ranks": (3, 40)}, {"mix": Mix(20, 4, 4)}):
        check(ops, q, positive, keys, 0.05, **more, **given)


@pytest.mark.parametrize("mix", [None, Mix(8, 4, 4)], ids=["real", "mixed"])
@pytest.mark.parametrize("decoupled", [False, True], ids=["", "decoupled"])
def test_a_row_without_negatives_has_no_loss_and_no_gradient(ops, decoupled, mix):
    q, positive, keys = (unit(n, 24, dtype=torch.bfloat16, seed=i) for i, n in enumerate((5, 5, 90)))
    visible = torch.ones(5, 90, dtype=torch.bool)
    visible[2] = False
    got = check(ops, q, positive, keys, 7.0, decoupled=decoupled, mix=mix, negative_mask=visible)
    for name in ("rows", "d_query", "d_scale", "weight", "num_kept", "num_mixed"):
        assert not got[name][2].any(), name
    assert got["lse"][2] == -torch.inf
    x = 7.0 * (q[2].float() * positive[2].float()).sum()
    torch.testing.assert_close(got["total"][2], torch.tensor(-torch.inf) if decoupled else x)


@pytest.mark.parametrize("mix", [None, Mix(8, 4, 4)], ids=["real", "mixed"])
@pytest.mark.parametrize("place", ["query", "positive", "key"])
def test_nan_stays_in_its_row(ops, place, mix):
    """A NaN key reaches the rows that see it, and no others."""
    q, positive, keys = (unit(n, 24, dtype=torch.bfloat16, seed=i) for i, n in enumerate((5, 5, 90)))
    visible = torch.ones(5, 90, dtype=torch.bool)
    visible[:, 40] = torch.arange(5) == 2
    draws = NO_DRAWS if mix is None else mixing_draws(mix, q, Draw())
    rest = None, True, False, None, 8 if mix else 0, 0, *draws, *pool_of(q, keys, negative_mask=visible)
    want = ops.info_nce(q, positive, keys, torch.tensor(5.0), *rest)
    broken = {"query": q, "positive": positive, "key": keys}[place]
    broken[40 if place == "key" else 2] = torch.nan
    got = ops.info_nce(q, positive, keys, torch.tensor(5.0), *rest)
    others = torch.tensor([0, 1, 3, 4])
    for name, one, other in zip(NAMES, got, want, strict=True):
        exact(name, one[others], other[others])
        if name in ("rows", "d_query", "d_scale", "weight", "total"):
            assert one[2].isnan().all(), name


@pytest.mark.parametrize("scale", [1e-30, -3.0, 1e4])
def test_scales(ops, scale):
    """Losses near 0 keep their digits, and large ones are finite."""
    q, positive, keys = (unit(n, 70, dtype=torch.bfloat16, seed=i) for i, n in enumerate((3, 3, 90)))
    for near in (positive, q, -q):
        check(ops, q, near, keys, scale)
        check(ops, q, near, keys, scale, mix=Mix(20, 9, 9))


def test_infinite_scores(ops):
    """As logsumexp: -inf weighs nothing, +inf has all the weight."""
    q, positive, keys = (whole(n, 12, dtype=torch.bfloat16, seed=i).abs() + 1 for i, n in enumerate((4, 4, 60)))
    rest = torch.tensor(0.1), None, True
    for value, lse in ((-torch.inf, -torch.inf), (torch.inf, torch.inf)):
        for decoupled in (False, True):
            got = ops.info_nce(
                q, positive, torch.full_like(keys, value), *rest, decoupled, None, 0, 0, *NO_DRAWS, *pool_of(q, keys)
            )
            assert (got[4] == lse).all()
            assert (got[0] == (lse if decoupled or lse > 0 else 0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_positive_has_its_own_storage_and_layout(ops, dtype):
    q, keys = (unit(n, 20, dtype=torch.bfloat16, seed=n) for n in (6, 70))
    wide = torch.full((6, 33), torch.nan, dtype=dtype)
    positive = wide[:, 5:25].copy_(unit(6, 20, seed=3))
    check(ops, q, positive, keys)
    for x, width in ((q, 29), (keys, 31)):  # rows that chunks of four elements do not divide
        view = torch.full((len(x), width), torch.nan, dtype=torch.bfloat16)[:, 3:23].copy_(x)
        check(ops, view if x is q else q, positive, view if x is keys else keys, mix=Mix(9, 9, 9))


def test_the_order_of_blocks_changes_no_bit():
    q, positive, keys = (unit(n, 48, dtype=torch.bfloat16, seed=i) for i, n in enumerate((40, 40, 200)))
    draws = mixing_draws(Mix(20, 12, 9), q, Draw())
    rest = torch.tensor(9.0), torch.zeros(40), True, False, None, 20, 0, *draws, *Pool()
    results = [emulated_ops("emulated", backwards=back)["info_nce"](q, positive, keys, *rest) for back in (False, True)]
    for name, one, other in zip(NAMES, *results, strict=True):
        exact(name, one, other)


OPTIONS = {
    "plain": {},
    "decoupled": {"decoupled": True},
    "window": {"select": Select(2, 30)},
    "fractions": {"select": Select(0.01, 0.5)},
    "margin": {"select": Select(1, 60, absolute_margin=0.1)},
    "mix": {"mix": Mix(20, 12, 9)},
    "weight": {"weight": Weight(0.0, 0.01)},
    "weight and mix": {"weight": Weight(0.0, 0.01), "mix": Mix(20, 12, 9)},
}


@pytest.fixture
def ran(monkeypatch):
    """Makes emulated ops the backend "cuda" of CPU tensors. The names of those that ran."""
    names = []

    def noted(name, op):
        def run(*args):
            names.append(name)
            with _disable_current_modes():  # what the emulator does beside launching is none of the op's work
                return op(*args)

        return run

    cpu = next(row for row in backends.BACKENDS if row.name == "cpu").functions
    functions = emulated_ops("emulated", least_sample=16) | {"count_negatives": cpu["count_negatives"]}
    functions = {name: noted(name, op) for name, op in functions.items()}
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "BACKENDS", (backends.Backend("cuda", "cpu", functions), *backends.BACKENDS[1:]))
    return names


def step(given, dtype, backend, B=9, K=90, **options):
    """The loss, its statistics, and the gradients of query, positive_key and temperature."""
    q, pos, keys = (unit(n, 24, dtype=torch.bfloat16, seed=seed).to(dtype) for seed, n in enumerate((B, B, K)))
    temperature = torch.tensor(0.1, dtype=dtype if dtype == torch.float64 else torch.float32, requires_grad=True)
    q.requires_grad_(), pos.requires_grad_()
    loss, stats = negmine.info_nce(
        q, pos, negatives(keys, given), temperature=temperature, seed=3, step=4, row_offset=5, **options, **tags(given),
        backend=backend, return_stats=True,
    )  # fmt: skip
    loss.backward()
    return (loss.detach(), stats.logsumexp, q.grad, pos.grad, temperature.grad), stats


@pytest.mark.parametrize("kind", ["none", "ids"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_training_step(ran, options, kind):
    """Against the reference in float64: in one op where it can be, else composed of others."""
    given = masks(kind, 9, 90)
    runs = [(torch.bfloat16, "cuda"), (torch.float64, "reference"), (torch.bfloat16, "reference")]
    (got, stats), (truth, want), (plain, _) = (step(given, *run, **options) for run in runs)
    names = ("loss", "logsumexp", "query", "positive_key", "temperature")
    for name, one, other, third in zip(names, got, truth, plain, strict=True):
        rounded(name, one, other, third, 10.0 if name == "temperature" else 1.0)
    for name in ("positive_rank", "num_negatives", "num_empty"):
        exact(name, getattr(stats, name), getattr(want, name))
    assert ("info_nce" in ran) == ("weight" not in options)


@pytest.mark.parametrize(
    ("options", "kernels", "torch_ops"),
    [({}, 2, 4), ({"select": Select(2, 30)}, 8, 6), ({"mix": Mix(8, 4, 4)}, 7, 4)],
    ids=["info_nce", "window", "MoCHi"],
)
def test_a_training_step_launches_no_more_than_this(ran, options, kernels, torch_ops):
    """The numbers are what was counted, as in test_launches.py; each scan here has a sample."""
    q, pos, keys = (unit(n, 24, dtype=torch.bfloat16, seed=i) for i, n in enumerate((9, 9, 90)))
    launches = emulated_loss.emulated("emulated").launches

    def train():
        leaf = q.detach().requires_grad_()
        negmine.info_nce(leaf, pos, keys, **options, backend="cuda").backward()

    train()
    before = launches()
    with OnDevice() as counted:
        train()
    assert launches() - before == kernels
    assert counted.count <= torch_ops
    assert set(ran) == {"info_nce"}
