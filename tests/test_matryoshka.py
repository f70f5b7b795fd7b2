"""matryoshka is the weighted sum of info_nce on prefixes, with the negatives that the widest prefix selects."""

import re

import pytest
import torch
import torch.nn.functional as F

import negmine
from negmine import MoCoQueue, Negatives, Select, Weight
from negmine.losses import matryoshka
from negmine.ops.pool import Pool
from tests import compare
from tests.cases import unit, whole
from tests.conftest import device_of

B, K, M, D, WIDTHS, WEIGHTS = 5, 41, 6, 16, (3, 8, 16), (0.5, 2.0, 1.0)


def kept_by_hand(scores, allowed, first, end):
    """(B, K) bool: ranks [first, end) of each row's usable columns; among equal scores, the lower index comes first."""
    mask = torch.zeros_like(allowed)
    for b in range(len(scores)):
        order = sorted((k for k in range(scores.shape[1]) if allowed[b, k]), key=lambda k: (-float(scores[b, k]), k))
        mask[b, order[first:end]] = True
    return mask


def usable(device):
    """(B, K) bool"""
    return torch.arange(B, device=device)[:, None] % 3 != torch.arange(K, device=device) % 3


def separate_calls(query, positive, keys, own, bias, normalize, one_pass, **options):
    """The definition: a call of info_nce at each width, with ranks [1, 9) of the shared keys that the full width selects."""

    def prefix(vectors, width):
        return F.normalize(vectors[..., :width], dim=-1) if normalize else vectors[..., :width]

    widest = [prefix(vectors, WIDTHS[-1]) for vectors in (query, keys)]
    mask = kept_by_hand((widest[0].double() @ widest[1].double().T).detach(), usable(keys.device), 1, 9)
    total = 0.0
    for width, weight in zip(WIDTHS, WEIGHTS, strict=True):
        pools = [Negatives(prefix(keys, width), mask=mask, bias=bias), Negatives(prefix(own, width)), None]
        pools = pools[::2] if one_pass else pools
        vectors = prefix(query, width), prefix(positive, width)
        total = total + weight * negmine.info_nce(*vectors, pools, backend="reference", **options)
    return total


@pytest.mark.parametrize("case", ["as given", "normalized", "one pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_a_call_at_each_width(any_backend, dtype, case):
    """Several pools, one with a window, with gradients of all of them. 16-bit gradients are rounded once."""
    device = device_of(any_backend)
    vectors = [unit(*n, D, dtype=dtype, device=device, seed=i) for i, n in enumerate([(B,), (B,), (K,), (B, M)])]
    normalize, one_pass = case == "normalized", case == "one pass"
    weight = None if one_pass else Weight(0.0 if normalize else 0.5)

    def graded(loss, dtype):
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [v.to(dtype).requires_grad_() for v in vectors]
        leaves += [torch.linspace(-1, 1, K, dtype=wide, device=device).requires_grad_()]
        leaves += [torch.tensor(0.3, dtype=wide, requires_grad=True)]
        value = loss(*leaves[:-1], temperature=leaves[-1], decoupled=normalize, weight=weight)
        grads = torch.autograd.grad(value, leaves, allow_unused=one_pass)
        return value, *(grad for grad in grads if grad is not None)

    def fused(query, positive, keys, own, bias, **options):
        shared = Negatives(keys, mask=usable(device), bias=bias, select=Select(1, 9))
        pools = [shared, None] if one_pass else [shared, Negatives(own), None]
        given = {"widths": WIDTHS, "weights": WEIGHTS, "normalize": normalize, "backend": any_backend}
        return matryoshka(query, positive, pools, **given, **options)

    def dense(*leaves, **options):
        return separate_calls(*leaves, normalize, one_pass, **options)

    got, truth, plain = graded(fused, dtype), graded(dense, torch.float64), graded(dense, dtype)
    names = ["loss", "query", "positive", "keys", *([] if one_pass else ["own"]), "bias", "temperature"]
    for name, g, t, p in zip(names, got, truth, plain, strict=True):
        compare.rounded(name, g, t, p, condition=4.0)


def test_selection_is_by_the_widest_and_exact_on_integers(any_backend):
    """A queue with ids: equal scores at the full width are ranked by index, not by scores at other widths."""
    device = device_of(any_backend)
    q, positive, keys = (whole(n, D, device=device, seed=i) for i, n in enumerate((B, B, K)))
    queue = MoCoQueue(D, K, with_ids=True, random_init=False).to(device)
    queue.enqueue(keys, ids=torch.arange(K, device=device))
    ids = torch.arange(B, device=device)
    mask = kept_by_hand(q @ keys.T, ids[:, None] != torch.arange(K, device=device), 0, 7)
    loss, stats = matryoshka(
        q, positive, queue, widths=WIDTHS, select=Select(0, 7), temperature=64.0, query_ids=ids, reduction="none",
        backend=any_backend, return_stats=True,
    )  # fmt: skip
    for width, rows in zip(WIDTHS, stats.losses, strict=True):
        x, x_positive = q[:, :width] @ keys[:, :width].T / 64, (q * positive)[:, :width].sum(1, keepdim=True) / 64
        columns = torch.cat([x_positive, x.masked_fill(~mask, -torch.inf)], 1)
        torch.testing.assert_close(rows, columns.logsumexp(1) - x_positive[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, stats.losses.sum(0))


@pytest.mark.parametrize("column", [0, 5, 15])  # in the first, second and third segment of D
def test_values_hidden_from_a_query_may_be_anything(any_backend, column):
    device = device_of(any_backend)
    q, positive, keys = (unit(n, D, device=device, seed=i) for i, n in enumerate((B, B, K)))
    mask = torch.ones(B, K, dtype=torch.bool, device=device)
    mask[:3, 7] = False

    def graded(keys):
        leaf = q.clone().requires_grad_()
        rows = matryoshka(
            leaf, positive, Negatives(keys, mask=mask), widths=WIDTHS, reduction="none", backend=any_backend
        )
        rows.sum().backward()
        return rows.detach(), leaf.grad

    want = graded(keys)
    for value in torch.nan, torch.inf:
        broken = keys.clone()
        broken[7, column] = value
        rows, grad = graded(broken)
        torch.testing.assert_close((rows[:3], grad[:3]), (want[0][:3], want[1][:3]))
        assert rows[3:].isnan().all() or value == torch.inf


@pytest.mark.parametrize(
    "select", [Select(sample=4), Select(0.1, 1.0, max_score=0.2), Select(0, 0.5, absolute_margin=0)]
)
def test_any_select_keeps_what_it_keeps_at_the_widest(select):
    q, positive, keys = (unit(n, D, seed=i).double() for i, n in enumerate((B, B, K)))
    index = negmine.mine_hardest(q[:, :8], keys[:, :8], K, positive_key=positive[:, :8], select=select, step=3).index
    mask = torch.zeros(B, K + 1, dtype=torch.bool).scatter(1, index.masked_fill(index < 0, K), True)[:, :K]
    assert 0 < int(mask.sum()) < B * K
    want = sum(negmine.info_nce(q[:, :w], positive[:, :w], Negatives(keys[:, :w], mask=mask)) for w in (3, 8))
    got = matryoshka(q, positive, keys, widths=(3, 8), select=select, step=3)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_queries_of_a_long_batch_are_the_queries_alone():
    """With more blocks of queries than threads, each block adds up its parts of the queue one after the other."""
    q, keys = unit(1100, D), unit(K, D, seed=1)

    def sums(query):
        scale = torch.tensor(5.0)
        return torch.ops.negmine_cpu.prefix_logsumexp(query, keys, list(WIDTHS), scale, True, *Pool())[:2]

    for got, want in zip(sums(q), sums(q[1000:1064]), strict=True):
        compare.exact("rows", got[:, 1000:1064], want)


def test_one_width_is_info_nce_and_a_frozen_queue_may_move_on():
    q, positive, keys = (unit(n, D, seed=i) for i, n in enumerate((B, B, K)))
    want = negmine.info_nce(q.requires_grad_(), positive, keys, query_ids=None)
    moved, leaf = keys.clone(), q.detach().clone().requires_grad_()
    got = matryoshka(leaf, positive, moved, widths=[D])
    moved.fill_(torch.nan)
    got.backward(), want.backward()
    torch.testing.assert_close((got, leaf.grad), (want, q.grad))


q, keys = torch.ones(3, 4), torch.ones(5, 4)
REFUSALS = [
    ({"widths": (2, 5)}, ValueError, "matryoshka: widths must be a list of ascending ints from 1 to query's D = 4"),
    ({"widths": (4, 2)}, ValueError, "matryoshka: widths must be a list of ascending"),
    ({"widths": ()}, ValueError, "matryoshka: widths must be a list of ascending"),
    (
        {"widths": (2, 4), "weights": (1.0,)},
        ValueError,
        "weights must be a list with a finite number for each of the 2 widths",
    ),
    ({"widths": (2,), "select": Select(sample=2, replace=True)}, ValueError, "select must be without replace"),
    ({"widths": (2,), "normalize": 1}, TypeError, "normalize must be True or False"),
]


@pytest.mark.parametrize("options, error, words", REFUSALS, ids=[words[:40] for *_, words in REFUSALS])
def test_refusal(options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        matryoshka(q, q, keys, **options)
