"""Masked keys may hold any values, NaN included: values and gradients equal those with zeros instead."""

from functools import partial

import pytest
import torch

import negmine
from negmine import Mix, Negatives, Select, Weight
from negmine.losses import multi_similarity
from tests import compare
from tests.cases import DTYPES, unit
from tests.conftest import device_of, interpreted

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where Triton is interpreted
B, K, D = 18, 70, 16  # more than a tile of 16 queries; several tiles of keys


def pools(device):
    """For each kind of mask, the arguments that hide columns 20 .. 34 from all queries, and 35 .. 54 from even queries."""
    query, column = torch.arange(B, device=device), torch.arange(K, device=device)
    for_all, for_even = (column >= 20) & (column < 35), (column >= 35) & (column < 55)
    hidden = for_all | (for_even & (query % 2 == 0)[:, None])  # (B, K)
    twos = {"query_labels": query % 2}, {"labels": torch.where(for_even, 0, column + 2)}
    return {
        "mask": ({}, {"mask": ~hidden}),
        "ids": ({"query_ids": query % 2}, {"ids": torch.where(for_even, 0, column + 2), "mask": ~for_all}),
        "labels": (twos[0], twos[1] | {"mask": (~for_all).expand(B, K)}),
    }


def info_nce(q, keys, own, given, scale, backend, **options):
    """Positives are keys 0 .. B - 1, frozen."""
    call = {"temperature": 1 / scale, "reduction": "none", "backend": backend}
    return negmine.info_nce(q, keys[:B].detach(), Negatives(keys, **own), **given, **call, **options)


def siglip(q, keys, own, given, scale, backend):
    call = {"scale": scale, "reduction": "none", "backend": backend}
    return negmine.siglip(q, keys[:B].detach(), Negatives(keys, **own), **given, **call)


def logsumexp(q, keys, own, given, scale, backend, **options):
    return negmine.logsumexp(q, Negatives(keys, **own), temperature=1 / scale, **given, **options, backend=backend)


CALLS = {
    "info_nce": info_nce,
    "decoupled": partial(info_nce, decoupled=True),
    "window": partial(info_nce, select=Select(0.02, 0.5)),
    "weight": partial(info_nce, weight=Weight(1.0, 0.001)),
    "mix": partial(info_nce, mix=Mix(8, 6, 4)),
    "siglip": siglip,
    "logsumexp": logsumexp,
    "logsumexp of a window": partial(logsumexp, select=Select(0.0, 0.9)),
}


KINDS = ("mask", "ids", "labels")


def run(call, q, keys, kind, backend):
    """Losses (B,), and the gradients of q, keys and scale."""
    leaves = [
        q.detach().requires_grad_(),
        keys.detach().requires_grad_(),
        torch.tensor(5.0, device=q.device).requires_grad_(),
    ]
    given, own = pools(q.device)[kind]
    rows = call(leaves[0], leaves[1], own, given, leaves[2], backend)
    weight = torch.linspace(0.5, 1, B, device=q.device)
    return rows.detach(), *torch.autograd.grad((rows * weight).sum(), leaves)


def skip_most_of(backend, name, kind, dtype):
    """In Triton's interpreter, run each call with one kind of mask, and only one call in fp32."""
    if not interpreted(backend):
        return
    if kind != KINDS[list(CALLS).index(name) % 3] or dtype != (
        torch.float32 if name == "logsumexp" else torch.bfloat16
    ):
        pytest.skip("triton: interpreted, where another case says it")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_2j_hidden_columns_may_hold_anything(any_backend, name, kind, dtype):
    skip_most_of(any_backend, name, kind, dtype)
    device = device_of(any_backend)
    q, keys = unit(B, D, dtype=dtype, device=device), unit(K, D, dtype=dtype, device=device, seed=1)
    keys[20:35] = 0
    spoiled = keys.clone()
    spoiled[20:25], spoiled[25:30, 3], spoiled[30:35, ::2] = torch.nan, torch.inf, -torch.inf
    got, want = (run(CALLS[name], q, each, kind, any_backend) for each in (spoiled, keys))
    for what, a, b in zip(("rows", "d query", "d keys", "d scale"), got, want, strict=True):
        compare.rounded(what, a, b, b)  # chunks with rows that are not finite may use other products


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in CALLS if "window" not in name and name != "mix"])
def test_2j_a_key_that_one_query_sees_reaches_no_query_that_does_not(any_backend, name, kind):
    skip_most_of(any_backend, name, kind, torch.float32 if name == "logsumexp" else torch.bfloat16)
    device = device_of(any_backend)
    q, keys = unit(B, D, dtype=torch.bfloat16, device=device), unit(K, D, dtype=torch.bfloat16, device=device, seed=1)
    spoiled = keys.clone()
    spoiled[36], spoiled[50] = torch.nan, torch.nan
    got, want = (run(CALLS[name], q, each, kind, any_backend) for each in (spoiled, keys))
    even, odd = slice(0, B, 2), slice(1, B, 2)  # even queries do not see the column
    for what, a, b in zip(("rows", "d query"), got[:2], want[:2], strict=True):
        compare.rounded(what, a[even], b[even], b[even])
        assert bool(a[odd].isnan().all())


def test_2j_a_query_that_sees_no_column_may_hold_anything(backend):
    device = device_of(backend)
    q, keys = unit(B, D, device=device), unit(K, D, device=device, seed=1).requires_grad_()
    mask = (torch.arange(B, device=device) != 3)[:, None].expand(B, K)
    spoiled = q.clone()
    spoiled[3] = torch.nan
    grads = []
    for query in (spoiled, q):
        lse = negmine.logsumexp(query, Negatives(keys, mask=mask), temperature=0.2, backend=backend)
        assert lse[3] == -torch.inf
        grads.append(torch.autograd.grad(lse[torch.arange(B, device=device) != 3].sum(), keys)[0])
    assert torch.equal(*grads)


LABELLED = {
    "multi_similarity": multi_similarity,
    "triplet_loss": negmine.triplet_loss,
    **{f"sup_con, {d}": partial(negmine.sup_con, denominator=d) for d in ("all", "own_positive", "negatives_only")},
}


@pytest.mark.parametrize("name", LABELLED)
def test_2j_hidden_keys_of_losses_with_labels(any_backend, name):
    if interpreted(any_backend) and name not in ("multi_similarity", "sup_con, own_positive"):
        pytest.skip("triton: interpreted, where another case says it")
    device = device_of(any_backend)
    q, keys, labels = unit(B, D, device=device), unit(K, D, device=device, seed=1), torch.arange(K, device=device) % 5
    hidden = torch.arange(K, device=device) % 7 == 3
    spoiled, clean = (torch.where(hidden[:, None], value, keys) for value in (torch.nan, 0.0))
    made = []
    for each in (spoiled, clean):
        leaves = [q.clone().requires_grad_(), each.clone().requires_grad_()]
        mask = (~hidden).expand(B, K)
        loss = LABELLED[name](*leaves, labels[:B], labels, key_mask=mask, backend=any_backend)
        made.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for what, a, b in zip(("loss", "d query", "d keys"), *made, strict=True):
        compare.rounded(what, a, b, b)
