"""Every call in the table of docs/methods.md runs on every backend and agrees with the reference in float64.

Calls are evaluated as they are printed. The test adds the backend, and the tensors that a training loop passes.
"""

import ast
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from negmine import Negatives, recipes
from negmine.ops import backends
from tests import compare
from tests.cases import feed, unit
from tests.conftest import device_of
from tests.test_fuzz import nudged

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
TABLE = PAGE.read_text().split("| method | call | paper |")[1].split("\n\n")[0]
ROWS = [line.split(" | ") for line in TABLE.splitlines()[2:]]
CALLS = [call for row in ROWS for call in re.findall(r"`([^`]+\))`", row[1])]
METHODS = [call for call in CALLS if not call.startswith("mixed_inputs")]
B, K, D, STEP = 4, 1024, 16, 6000  # K: so that 0.001 is one rank; STEP: after all warm-ups of the table
GIVEN = {"steps": 2 * STEP, "max_positives": 4, "images": torch.linspace(0, 1, B * 12).view(B, 3, 2, 2)}
TOOLS = ("linear", "cosine", "exponential", "step", "whole", "Kinds")


def name_of(call):
    return ast.parse(call, mode="eval").body.func.id


def made(call, backend):
    """Return the module that a call in the table creates."""
    names = {n: partial(getattr(recipes, n), backend=backend) for n in recipes.__all__ if n not in TOOLS}
    return eval(call, {**names, **{n: getattr(recipes, n) for n in TOOLS}, **GIVEN})


def inputs(device):
    q, noise, keys = (unit(n, D, seed=i) for i, n in enumerate((B, B, K)))
    return [v.to(device) for v in (q, F.normalize(q + 1.5 * noise, dim=1), keys)]


def called(call, backend, vectors):
    """The loss and its gradients to the query, the positive and, where they have one, the keys."""
    tensors, given = feed(name_of(call), *(v.detach().requires_grad_() for v in vectors))
    loss = made(call, backend)(*tensors, **given, step=STEP)
    vectors = [t.keys if isinstance(t, Negatives) else t for t in tensors]
    leaves = [t for t in vectors if t.is_floating_point()]
    return loss, *torch.autograd.grad(loss, leaves, allow_unused=True)


def agree(call, backend):
    vectors = inputs(device_of(backend))
    got = called(call, backend, vectors)
    truth = called(call, "reference", [v.double() for v in vectors])
    plain = called(call, "reference", vectors)
    for part, k, t, p in zip(("loss", "d_first", "d_second", "d_third"), got, truth, plain, strict=False):
        assert (k is None) == (t is None), f"{call} {part}"
        if t is not None:
            assert t.dtype == torch.float64 and bool(t.any()), f"{call} {part}: nothing to compare"
            compare.rounded(f"{call} {part}", k, t, p, condition=16.0)  # the largest logit is 1 / T = 50


@pytest.mark.parametrize("call", METHODS)
def test_a_row_of_the_table_is_its_reference(any_backend, call):
    agree(call, any_backend)


def test_the_table_holds_every_method():
    assert all(len(row) == 4 for row in ROWS)
    assert {name_of(call) for call in CALLS} == set(recipes.__all__) - set(TOOLS)
    inputs_of = [call for call in CALLS if call not in METHODS]
    assert inputs_of == ["mixed_inputs(images)"] and len(eval(inputs_of[0], vars(recipes) | GIVEN)) == 3
    for row in ROWS:
        assert re.search(r"`\w+\(.*\)`", row[1]), row
        cited = recipes.__doc__ + "".join(getattr(recipes, name_of(c)).__doc__ for c in CALLS if f"`{c}`" in row[1])
        for number in re.findall(r"\d{4}\.\d{4,5}", row[2]):
            assert number in cited, f"{row[0]}: {number} is in no docstring"


@pytest.mark.parametrize("op", ["info_nce", "logsumexp", "mine_hardest", "mix_logsumexp", "softplus_sum"])
def test_a_wrong_kernel_is_detected(monkeypatch, op):
    """An error of 1 % in a result, or the column next to the right one, makes at least one row fail."""
    cpu = next(row for row in backends.BACKENDS if row.name == "cpu")
    if cpu.refusal:
        pytest.skip(cpu.refusal)
    monkeypatch.setitem(cpu.functions, op, nudged(cpu.functions[op], 1 if op == "mine_hardest" else 0))
    rows = {"info_nce": "moco_v2()", "logsumexp": "hcl()", "mine_hardest": "ephn()", "softplus_sum": "siglip()"}
    with pytest.raises((AssertionError, IndexError)):
        agree(rows.get(op) or next(c for c in METHODS if c.startswith("synco")), "cpu")
