"""Every declared op in every namespace that implements it: opcheck, shapes and dtypes of the fake, identities between ops.

Inputs are made from the declarations in negmine/ops, so an op that is added there is tested here.
"""

import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import negmine._ops_cpu  # noqa: F401
from negmine.ops import compiled
from negmine.ops.registry import OPS, Op, Value, declare, overload

ROOT = Path(__file__).parents[1]
SIZES = {"B": 3, "K": 20, "D": 8, "M": 6, "R": 3, "N": 5, "S": 2, "G": 4, "I": 3, "J": 6, "W": 3, "C": 8}
NUMBERS = {"pairs": 3, "with_query": 2, "pair_high": 1.0, "query_high": 0.5, "hard": 4, "skip": 1, "seed": 7}
NOT_ON_CUDA = ("bias", "guide_query", "guide_keys", "guide_limit")
DEVICES = {"negmine_cpu": "cpu"} | ({"negmine_cuda": "cuda"} if torch.cuda.is_available() else {})
HERE = [
    (namespace, name)
    for namespace, name in itertools.product(DEVICES, OPS)
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", DEVICES[namespace].upper())
    and (name != "mine_hardest_codes" or compiled.isa_for(torch.uint8, torch.uint8))
]
NEGMINE_CPU = torch.ops.negmine_cpu


def made(value: Value, sizes: dict[str, int], device: str, per_query: bool):
    """Make a tensor or a number for an argument. per_query: use the second of its two shapes."""
    B, K, N = sizes["B"], sizes["K"], sizes["N"]
    if value.dims is None:
        numbers = {"int": 0, "float": 0.0, "bool": value.name != "decoupled"}
        return sizes.get(value.name, NUMBERS.get(value.name, numbers[value.kind]))
    dims = value.dims.split("|")[-1 if per_query else 0]
    shape = [sizes[letter] if letter in sizes else int(letter) for letter in dims.replace(",", " ").split()]
    if value.name == "index" or value.name == "hard_index":  # in ascending order, with padding at the end
        columns = torch.full((B, shape[1]), -1)
        count = min(shape[1] - 1, K)
        columns[:, :count] = torch.arange(count)
        return columns.to(device)
    if value.name == "widths":
        return list(range(1, min(sizes["D"], 3) + 1))
    if value.name == "ranks":
        return (2 * torch.arange(shape[1])).expand(shape).contiguous().to(device)
    if value.name in ("lower", "upper"):
        return torch.full(shape, 2**62 if value.name == "upper" else -(2**62), device=device)
    if value.name == "num_rows":
        return torch.tensor(max(K - 2, 0), device=device)
    if value.kind == "int64":
        return torch.randint(0, N + 3, shape, device=device)
    if value.kind == "bool":
        return torch.rand(shape, device=device) < 0.8
    if value.kind == "uint8":
        return torch.randint(1, 256, shape, dtype=torch.uint8, device=device)
    vectors = torch.bfloat16 if device == "cuda" else torch.float32
    return torch.rand(shape, device=device).to(vectors if value.kind == "vectors" else torch.float32)


def arguments(op: Op, device: str, optional: bool = True, per_query: bool = False, **change):
    """Make all arguments by name. optional: whether optional ones are given; change: sizes, numbers and flags."""
    torch.manual_seed(1)
    sizes = SIZES | {key: size for key, size in change.items() if key in SIZES}
    given = {}
    for value in op.arguments:
        refused = device == "cuda" and value.name in NOT_ON_CUDA
        absent = value.optional and (not optional or refused or value.name == "ranks")
        absent |= op.name == "prefix_logsumexp" and value.name in ("lower", "upper")
        given[value.name] = None if absent else made(value, sizes, device, per_query)
    if not optional and "same_label" in given:
        given["same_label"] = False
    given.update({key: size for key, size in change.items() if key in given})
    return given


def variants(op: Op) -> list[dict]:
    """Return changes that cover flags, missing arguments and empty dimensions."""
    names = {value.name for value in op.arguments}
    all_changes = [{}, {"optional": False}, {"per_query": True}, {"B": 0}, {"K": 0}, {"D": 1}]
    all_changes += [{flag: False} for flag in sorted(names) if flag.startswith("want_")]
    if "N" in names and op.name != "mine_gathered":
        all_changes.append({"N": 0})
    if "decoupled" in names:
        all_changes.append({"decoupled": True})
    if op.name == "logsumexp":
        all_changes += [{"S": 1}, {"S": 5, "N": 0}]
    for first, last in ((0, 1), (2, 15), (5, 4)) if op.name in ("logsumexp", "info_nce") else ():
        ranks = torch.tensor([[first, last]] * SIZES["B"])
        for change in {"N": 0, "hard": 0}, {"N": 0, "hard": 0, "S": 1, "optional": False}:
            all_changes.append({**change, "ranks": ranks})
    return all_changes


def called(namespace: str, name: str, given: dict):
    results = overload(namespace, name)(*given.values())
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize(("namespace", "name"), HERE)
def test_eager_results_match_the_fake(namespace, name):
    op = OPS[name]
    for change in variants(op):
        change = {key: c.to(DEVICES[namespace]) if isinstance(c, torch.Tensor) else c for key, c in change.items()}
        given = arguments(op, DEVICES[namespace], **change)
        fake = op.fake(*given.values())
        fake = fake if isinstance(fake, tuple) else (fake,)
        results = called(namespace, name, given)
        assert len(results) == len(op.results)
        for value, want, got in zip(op.results, fake, results, strict=True):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride()), (change, value.name)
            assert not got.is_floating_point() or not got.isnan().any(), (change, value.name)
            assert got.dtype != torch.int64 or (got != 2**63 - 1).all(), (change, value.name, "unwritten")


@pytest.mark.parametrize(("namespace", "name"), HERE)
def test_opcheck(namespace, name):
    op = OPS[name]
    window = torch.tensor([[1, 4]] * SIZES["B"], device=DEVICES[namespace])
    windows = [{"ranks": window, "N": 0, "hard": 0}] if name in ("logsumexp", "info_nce") else []
    for change in {}, {"optional": False}, *windows:
        given = arguments(op, DEVICES[namespace], **change)
        torch.library.opcheck(overload(namespace, name), tuple(given.values()))


def test_declarations_and_implementations_load_in_either_order():
    """Each order in a process of its own, forked from one that has imported torch only."""
    program = textwrap.dedent(f"""
        import importlib, os, sys, types
        import torch
        modules = ["negmine._ops_cpu", "negmine.ops.count_negatives"]
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
            modules.reverse()
        package = types.ModuleType("negmine")
        package.__path__ = [{str(ROOT / "negmine")!r}]
        sys.modules["negmine"] = package
        for module in modules:
            importlib.import_module(module)
        count = torch.ops.negmine_cpu.count_negatives(torch.ones(2, 3), torch.ones(5, 3), *[None] * 12, False)
        assert count.tolist() == [5, 5]
    """)
    subprocess.run([sys.executable, "-c", program], check=True)


IMPORTED_AGAIN = """
import importlib, sys
import torch

failed = []
for module in "negmine.ops.maxsim", "negmine.mining", "negmine.report":
    for forgets in False, True:
        sys.modules[module] = None
        try:
            import negmine
        except ImportError:
            failed.append(sys.modules.pop(module))
        for name in [name for name in sys.modules if name.split(".")[0] == "negmine" and forgets]:
            del sys.modules[name]
import negmine
for name in [name for name in sys.modules if name.startswith("negmine.ops.")]:
    importlib.reload(sys.modules[name])

q, keys = torch.eye(2, 3, requires_grad=True), torch.eye(3).roll(1, 0)
grads = [
    torch.autograd.grad(negmine.info_nce(q, q.detach(), keys, temperature=1.0, backend=backend), q)[0]
    for backend in ("reference", "cpu", "triton")
]
torch.testing.assert_close(grads[1:], [grads[0]] * 2)
vectors = torch.empty(2, 3, 4, device="meta")
assert torch.ops.negmine_cpu.maxsim(vectors, vectors, None, None, True)[1].shape == (2, 3, 2)
print("done", len(failed))
"""


def test_a_failed_import_can_be_repeated():
    """Importing works after Python's own clean-up, which keeps complete modules, after removing all modules, and as a reload."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", IMPORTED_AGAIN], capture_output=True, text=True, env=env)
    assert (run.stdout, run.stderr) == ("done 6\n", "")


def test_another_version_of_an_op_raises_an_error():
    message = r"^declare: this process imported another version of negmine in which negmine_cpu::count_negatives has"
    with pytest.raises(RuntimeError, match=message):
        declare("count_negatives(query: vectors[B, D]) -> count: int64[B]", "")
    assert len(OPS["count_negatives"].arguments) > 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("logsumexp", {"scales": torch.ones(0)}, "logsumexp: scales must be .S,. with S of 1 or more, got .0,.."),
        ("logsumexp", {"ranks": torch.zeros(3, 2).long()}, "logsumexp: N > 0 and ranks do not go together, got N = 5"),
        ("logsumexp", {"ranks": torch.zeros(3, 3).long(), "N": 0}, "logsumexp: ranks must be .B, 2., the first and"),
        ("logsumexp", {"N": -1}, "logsumexp: N must not be negative, got -1"),
        ("logsumexp", {"num_rows": torch.tensor(1.0)}, "logsumexp: num_rows must be int64, got float32"),
        ("logsumexp", {"num_rows": torch.tensor([1, 2])}, "logsumexp: num_rows must be one number, a tensor of shape"),
        ("prefix_logsumexp", {"lower": torch.zeros(3).long()}, "prefix_logsumexp: lower and upper are not supported"),
        ("prefix_logsumexp", {"widths": [2, 2]}, "widths must ascend from 1 to D = 8, got 2 after 2"),
        ("prefix_logsumexp", {"widths": list(range(1, 18))}, "widths must be 1 to 16 numbers, got 17"),
        ("info_nce", {"ranks": torch.zeros(3, 2).long()}, "info_nce: ranks and synthetic negatives do not go together"),
        ("info_nce", {"positive_key": torch.zeros(2, 8)}, "info_nce: positive_key must have the shape of query"),
        ("info_nce", {"skip": -1}, "info_nce: hard and skip must not be negative, got 4 and -1"),
        ("mix_negatives", {"step": torch.tensor(1.0)}, "mix_negatives: step must be int64, got float32"),
        ("mix_negatives", {"pairs": -1}, "mix_negatives: pairs and with_query must not be negative, got -1 and 2"),
        ("mix_logsumexp", {"hard_index": torch.full((3, 2), 20)}, "mix_logsumexp: hard_index must hold rows of"),
        ("mine_gathered", {"N": 0}, "mine_gathered: N must be at least 1, got 0"),
        ("round_to_codes", {"vectors": torch.zeros(3)}, "round_to_codes: vectors must be .M, D., got the shape .3,."),
        ("mine_gathered", {"max_score": torch.zeros(4)}, "mine_gathered: max_score must have the shape .3,., got .4,."),
        ("softplus_sum", {"offset": torch.zeros(2)}, "softplus_sum: offset must be one number, a tensor of shape"),
        (
            "count_negatives",
            {"guide_limit": None},
            "count_negatives: guide_query, guide_keys and guide_limit go together",
        ),
        ("count_negatives", {"guide_keys": torch.zeros(19, 4)}, "with B = 3 and K = 20, got .3, 4. and .19, 4."),
        ("count_negatives", {"guide_query": torch.zeros(3, 5)}, "must be .B, G. and .K, G. with B = 3 and K = 20, got"),
        ("count_negatives", {"guide_query": torch.zeros(3, 4).double()}, "guide_query must be float32, bfloat16 or"),
    ],
)
def test_arguments_that_would_corrupt_memory_raise_errors(name, change, message):
    with pytest.raises(RuntimeError, match=message):
        called("negmine_cpu", name, arguments(OPS[name], "cpu") | change)


def queue(B=70, K=5000, D=24):
    torch.manual_seed(3)
    return torch.randn(B, D), torch.randn(K, D), torch.rand(K) < 0.8


def pool(mask=None, num_rows=None, lower=None, upper=None):
    return (mask, None, None, None, None, lower, upper, num_rows, None, None, None, None, False)


def test_logsumexp_at_several_scales_is_each_of_them():
    query, keys, mask = queue()
    scales, pivot = torch.tensor([0.5, 3.0, 0.0, 1.0]), torch.zeros(len(query))
    lse, mean, *counts = NEGMINE_CPU.logsumexp(query, keys, scales, pivot, True, 0, None, *pool(mask))
    for s in range(len(scales)):
        one = NEGMINE_CPU.logsumexp(query, keys, scales[s : s + 1], pivot, True, 0, None, *pool(mask))
        assert torch.equal(one[0][0], lse[s])
        assert torch.equal(one[1][0], mean[s])
        assert torch.equal(one[2], counts[0])
        assert torch.equal(one[3], counts[1])


def test_logsumexp_mines_what_mine_hardest_finds():
    query, keys, mask = queue()
    scales = torch.tensor([3.0, 1.0])
    plain = NEGMINE_CPU.logsumexp(query, keys, scales, None, True, 0, None, *pool(mask))
    mined = NEGMINE_CPU.logsumexp(query, keys, scales, None, True, 9, None, *pool(mask))
    scores, index, num_kept = NEGMINE_CPU.mine_hardest(query, keys, 9, True, *pool(mask))
    for result in range(4):
        assert torch.equal(plain[result], mined[result])
    assert torch.equal(mined[4], scores)
    assert torch.equal(mined[5], index)
    assert torch.equal(mined[2], num_kept)
    assert torch.equal(NEGMINE_CPU.mine_hardest(query, keys, 0, True, *pool(mask))[2], num_kept)


# Windows that are summed by the pass that finds them, by another pass, and up to the last rank.
@pytest.mark.parametrize("width", [40, 3000, 6000])
@pytest.mark.parametrize("scales", [[2.0], [2.0, 1.0, 0.5]])
def test_logsumexp_between_ranks_is_bounded_by_their_sort_keys(width, scales):
    query, keys, mask = queue()
    first = torch.arange(len(query)) - 1  # the first row's is negative: an empty window
    ranks = torch.stack([first, first + width], 1)
    ranks[5, 1] = ranks[5, 0] - 1
    ranks[6] = torch.tensor([4900, 4999])  # past the end of the pool
    lse, mean, num_kept, _, _, _, found = NEGMINE_CPU.logsumexp(
        query, keys, torch.tensor(scales), None, True, 0, ranks, *pool(mask)
    )
    nowhere = -(2**63)
    empty = torch.zeros(len(query), dtype=torch.bool)
    empty[[0, 5, 6]] = True
    want = NEGMINE_CPU.rank_thresholds(query, keys, ranks, *pool(mask)).masked_fill(empty[:, None], nowhere)
    assert torch.equal(found, want)
    bounds = pool(mask, lower=want[:, 1].clamp_min(-0x7F800001 << 32), upper=want[:, 0].contiguous())
    bounded = NEGMINE_CPU.logsumexp(query, keys, torch.tensor(scales), None, True, 0, None, *bounds)
    assert torch.equal(num_kept, bounded[2])
    assert torch.equal(num_kept == 0, empty)
    torch.testing.assert_close(lse, bounded[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean, bounded[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("namespace", "name"), [(space, name) for space, name in HERE if OPS[name].takes_pool])
@pytest.mark.parametrize("num_rows", [0, 13, 20, 31])
def test_rows_past_num_rows_are_never_read(namespace, name, num_rows):
    device = DEVICES[namespace]
    given = arguments(OPS[name], device, per_query=True, hard=3)
    keys, rows = given["negative_keys"], min(num_rows, SIZES["K"])
    cut = dict(given)
    for value in OPS[name].arguments:
        if value.dims and "K" in value.dims and given[value.name] is not None:
            cut[value.name] = (
                given[value.name][..., :rows] if value.name == "negative_mask" else given[value.name][:rows]
            )
    keys = keys.clone()
    keys[rows:] = torch.nan if keys.is_floating_point() else 255
    given |= {"negative_keys": keys, "num_rows": torch.tensor(num_rows, device=device)}
    for want, got in zip(
        called(namespace, name, cut | {"num_rows": None}), called(namespace, name, given), strict=True
    ):
        if want.shape != got.shape:  # (K, D)
            assert not got[rows:].any()
            got = got[:rows]
        assert torch.equal(want, got)
    assert torch.equal(called(namespace, name, given | {"num_rows": torch.tensor(-4, device=device)})[0],
                       called(namespace, name, given | {"num_rows": torch.tensor(0, device=device)})[0])  # fmt: skip


@pytest.mark.parametrize(("namespace", "name"), [(space, name) for space, name in HERE if OPS[name].takes_draws])
def test_step_and_row_offset_are_zero_where_they_are_none(namespace, name):
    zero, device = torch.tensor(0), DEVICES[namespace]
    given = arguments(OPS[name], device) | {"step": None, "row_offset": None}
    zeros = given | {"step": zero.to(device), "row_offset": zero.to(device)}
    for want, got in zip(called(namespace, name, given), called(namespace, name, zeros), strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("case", ["plain", "mixed", "window"])
@pytest.mark.parametrize("shape", [(2, 64, 16), (70, 5000, 24)])
def test_info_nce_is_the_loss_and_its_gradient(shape, case, decoupled):
    query, keys, mask = (torch.nn.functional.normalize(t, dim=-1) if t.dim() == 2 else t for t in queue(*shape))
    positive, scale = torch.nn.functional.normalize(torch.randn_like(query), dim=-1), torch.tensor(20.0)
    rows_mask = mask.expand(len(query), -1).clone()
    rows_mask[1] = False  # a query without negatives
    draws = (4, 3, 0.0, 1.0, 0.0, 0.5, True, None, 7, torch.tensor(2), torch.tensor(11))
    ranks = torch.tensor([[2, 40]] * len(query)) if case == "window" else None
    hard = 10 if case == "mixed" else 0
    result = NEGMINE_CPU.info_nce(
        query, positive, keys, scale, None, True, decoupled, ranks, hard, 3, *draws, *pool(rows_mask)
    )
    rows, d_query, d_scale, weight, lse, total, num_kept, _, num_mixed, _ = result

    q, s = query.double().requires_grad_(), scale.double().requires_grad_()
    scores, visible = q @ keys.double().T, rows_mask  # (B, K)
    if ranks is not None:
        rank = scores.masked_fill(~visible, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
        visible = visible & (rank >= 2) & (rank <= 40)
    if hard:
        index = NEGMINE_CPU.mine_hardest(query, keys, 13, False, *pool(rows_mask))[1][:, 3:].contiguous()
        vectors = NEGMINE_CPU.mix_negatives(query, keys, index, *draws)[0]
        scores = torch.cat([scores, torch.einsum("bd,bsd->bs", q, vectors.double())], 1)
        visible = torch.cat([visible, (index[:, :1] >= 0).expand(-1, vectors.shape[1])], 1)
    some = visible.any(1)
    x = s * (q * positive).sum(1)
    sums = torch.logsumexp((s * scores).masked_fill(~visible & some[:, None], -torch.inf), 1)
    want = torch.where(some, sums - x if decoupled else torch.nn.functional.softplus(sums - x, threshold=1e9), 0 * x)
    want_d_query, want_d_scale = torch.autograd.grad(want.sum(), (q, s))

    close = dict(rtol=2e-6, atol=2e-6, check_dtype=False)
    torch.testing.assert_close(rows, want.detach(), **close)
    of_gradients = close | {"atol": 1e-5}  # numbers up to scale
    torch.testing.assert_close(d_query, want_d_query, **of_gradients)
    torch.testing.assert_close(d_scale.sum(), want_d_scale, **of_gradients)
    torch.testing.assert_close(lse, sums.detach().masked_fill(~some, -torch.inf), **close)
    both = sums if decoupled else torch.logaddexp(x, sums)
    torch.testing.assert_close(total, torch.where(some, both, -torch.inf if decoupled else x).detach(), **close)
    share = some if decoupled else torch.sigmoid(sums - x).detach() * some
    torch.testing.assert_close(weight, scale * share, **close)
    assert (rows[1], num_kept[1], num_mixed[1]) == (0, 0, 0)
    assert not d_query[1].any()
    assert num_mixed[0] == (7 if hard else 0)
    again = NEGMINE_CPU.info_nce(
        query, positive, keys, scale, None, False, decoupled, ranks, hard, 3, *draws, *pool(rows_mask)
    )
    assert torch.equal(again[0], rows)


def test_a_nan_stays_in_its_row_of_info_nce():
    query, keys, _ = queue(4, 30, 8)
    positive = torch.randn(4, 8)
    draws = (3, 2, 0.0, 1.0, 0.0, 0.5, True, None, 7, None, None)

    def run(q):
        return NEGMINE_CPU.info_nce(
            q, positive, keys, torch.tensor(2.0), None, True, False, None, 5, 0, *draws, *pool()
        )

    want, broken = run(query), query.clone()
    broken[2, 3] = torch.nan
    for clean, got in zip(want, run(broken), strict=True):
        assert torch.equal(clean[[0, 1, 3]], got[[0, 1, 3]])
    assert run(broken)[0][2].isnan()
