"""Features of PyTorch with every public op and module: dynamic shapes, autocast, GradScaler, copies, second derivatives.

tests/test_torch.py tests them with the options of the losses.

Under autocast, our ops cast nothing: bf16 or fp16 vectors from an autocast layer are scored as they are, with fp32 sums.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

import negmine
from negmine import InfoNCELoss, Mix, MoCoQueue, Select, SupConLoss, TripletLoss, Weight, recipes
from negmine.losses.methods import MethodLoss
from negmine.losses.synco import synco
from negmine.ops import backends
from negmine.queues import ShardedMoCoQueue
from negmine.recipes import Kinds
from negmine.recipes.triplets import SimANSLoss, VSEPlusPlusLoss
from tests.cases import unit

cpu = next(row for row in backends.BACKENDS if row.name == "cpu")
pytestmark = pytest.mark.skipif(bool(cpu.refusal), reason=cpu.refusal)
D = 8


def labels(n):
    return torch.arange(n) % 4


# Every public op as a function of query (B, D) and keys (K, D). The first half is differentiable.
LOSSES = {
    "info_nce": lambda q, k: negmine.info_nce(q, k[: len(q)], k),
    "sup_con": lambda q, k: negmine.sup_con(q, k, labels(len(q)), labels(len(k)), temperature=0.2),
    "own_positive": lambda q, k: negmine.sup_con(
        q, k, labels(len(q)), labels(len(k)), temperature=0.2, denominator="own_positive"
    ),
    "triplet_loss": lambda q, k: negmine.triplet_loss(q, k, labels(len(q)), labels(len(k))),
    "multi_similarity": lambda q, k: negmine.losses.multi_similarity(q, k, labels(len(q)), labels(len(k))),
    "logsumexp": lambda q, k: negmine.logsumexp(q, k, temperature=0.2, select=Select(0, 0.5)).sum(),
    "softplus_sum": lambda q, k: negmine.losses.softplus_sum(q, k, bias=-1.0, select=Select(0, 30, sample=5)).sum(),
    "siglip": lambda q, k: negmine.siglip(q, k[: len(q)], k, bias=-1.0),
    "synco": lambda q, k: synco(q, k[: len(q)], k, kinds=Kinds(9, 4, 4, 4, 2, 2, 2)),
    "own_negatives": lambda q, k: negmine.info_nce(q, k[: len(q)], k.expand(len(q), *k.shape), temperature=0.2),
}
MINING = {
    "mine_hardest": lambda q, k: negmine.mine_hardest(q, k, 4, select=Select(2, 30)).index,
    "rank_thresholds": lambda q, k: negmine.rank_thresholds(q, k, [0, 5]),
    "quantile": lambda q, k: negmine.quantile(q, k, [0.5, 0.95]),
    "mix_negatives": lambda q, k: negmine.mix_negatives(q, k, Mix(8, 5, 3)).vectors,
    "mine_triplets": lambda q, k: negmine.losses.mine_triplets(q, k, labels(len(q)), labels(len(k))).negative,
}
OPS = LOSSES | MINING
IN_PIECES = ("own_positive", "softplus_sum")  # the latter with a sample


def value_and_grads(op, function, q, k):
    leaves = [q.clone().requires_grad_(op in LOSSES), k.clone().requires_grad_(op in LOSSES)]
    made = function(*leaves)
    return [made.detach(), *(torch.autograd.grad(made, leaves) if op in LOSSES else ())]


@pytest.mark.parametrize("op", [op for op in OPS if op != "mine_triplets"])  # tested as a part of triplet_loss
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_one_graph_for_every_shape(op):
    """Compiled once with dynamic shapes: other numbers of queries and keys use the same graph.

    Ops that process rows in pieces may need another complete graph if the number of pieces changes.
    """
    torch._dynamo.reset()
    compiled = torch.compile(OPS[op], fullgraph=True, dynamic=True, backend="aot_eager")
    value_and_grads(op, compiled, unit(5, D), unit(40, D, seed=1))
    with torch.compiler.set_stance("default" if op in IN_PIECES else "fail_on_recompile"):
        for B, K in ((7, 61), (12, 90)):
            q, k = unit(B, D, seed=B), unit(K, D, seed=K)
            for got, want in zip(value_and_grads(op, compiled, q, k), value_and_grads(op, OPS[op], q, k), strict=True):
                torch.testing.assert_close(got, want)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_no_bit(op, half):
    x, k = unit(6, D), unit(50, D, seed=1)
    layer = nn.Linear(D, D)
    with torch.autocast("cpu", dtype=half):
        q = layer(x).detach()
        inside = value_and_grads(op, OPS[op], q, k)
    assert q.dtype == half
    outside = value_and_grads(op, OPS[op], q, k)
    for got, want in zip(inside, outside, strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype
    if op in LOSSES:
        assert inside[0].dtype == torch.float32 and inside[1].dtype == half and inside[2].dtype == torch.float32


def test_a_grad_scaler_trains_as_without_one():
    """Scales are powers of two and gradients are fp32, so weights are bit-identical. A step with an overflow is skipped."""
    trained = []
    for scaled in (False, True):
        torch.manual_seed(3)
        layer, queue = nn.Linear(D, D), MoCoQueue(D, 64)
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2, enabled=scaled)
        for step in range(5):
            q, key = layer(unit(6, D, seed=step)), unit(6, D, seed=50 + step)
            loss = negmine.info_nce(q, key, queue, temperature=0.2, select=Select(0, 0.5))
            queue.enqueue(key)
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
        trained.append(layer.weight.detach().clone())
    assert torch.equal(*trained)
    before, scale = layer.weight.detach().clone(), scaler.get_scale()
    optimiser.zero_grad()
    scaler.scale(negmine.info_nce(layer(unit(6, D)) * torch.inf, unit(6, D), queue)).backward()
    scaler.step(optimiser)
    scaler.update()
    assert torch.equal(layer.weight, before) and scaler.get_scale() < scale


SECOND = {
    **{name: LOSSES[name] for name in LOSSES if name != "triplet_loss"},  # its second derivatives are tested below
    "weight": lambda q, k: negmine.info_nce(q, k[: len(q)], k, weight=Weight(1.0)),
    "mix": lambda q, k: negmine.info_nce(q, k[: len(q)], k, mix=Mix(8, 6, 4)),
}


@pytest.mark.parametrize("op", SECOND)
def test_a_second_derivative_raises_an_error(op):
    """For every way to ask for a second derivative. A first gradient with create_graph=True is right."""
    q, k = unit(6, D).requires_grad_(), unit(50, D, seed=1).requires_grad_()
    grads = torch.autograd.grad(SECOND[op](q, k), (q, k), create_graph=True)
    for grad, want in zip(grads, torch.autograd.grad(SECOND[op](q, k), (q, k)), strict=True):
        assert torch.equal(grad, want)
    for grad in grads:
        for leaf in (q, k):
            with pytest.raises(RuntimeError, match="first derivatives only; use backend='reference'"):
                torch.autograd.grad(grad.square().sum(), leaf, retain_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            grad.square().sum().backward(retain_graph=True)


def test_triplets_have_second_derivatives():
    """Because their scores are computed from the mined rows by PyTorch."""
    k, second = unit(50, D, seed=1), []
    for backend in ("cpu", "reference"):
        q = unit(6, D).requires_grad_()
        made = negmine.triplet_loss(q, k, labels(6), labels(50), backend=backend)
        grad = torch.autograd.grad(made, q, create_graph=True)[0]
        second.append(torch.autograd.grad(grad.square().sum(), q)[0])
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("op", SECOND)
def test_functorch_transforms_raise_an_error(op):
    q, k = unit(6, D), unit(50, D, seed=1)
    with pytest.raises(RuntimeError, match="do not support the transforms"):
        torch.func.grad(lambda q: SECOND[op](q, k))(q)


MODULES = {
    "InfoNCELoss": lambda: InfoNCELoss(nn.Parameter(torch.tensor(0.3)), mix=Mix(8, 6, 4)),
    "SupConLoss": lambda: SupConLoss(nn.Parameter(torch.tensor(0.3)), denominator="negatives_only"),
    "TripletLoss": lambda: TripletLoss(0.3, negative="hardest"),
    "MultiSimilarityLoss": lambda: negmine.MultiSimilarityLoss(recipes.linear(2.0, 1.0, 4)),
    "SigLIPLoss": lambda: negmine.SigLIPLoss(3.0, -1.0, select=Select(0, 30, sample=9)),
    "synco": lambda: recipes.synco(9, 4, 4, 4, 2, 2, 2, temperature=nn.Parameter(torch.tensor(0.3))),
    "mixgcf": lambda: recipes.mixgcf(9, 2, temperature=nn.Parameter(torch.tensor(0.3))),
    "simans": lambda: recipes.simans(3, candidates=9, a=30.0, temperature=0.1),
    "vse_plus_plus": lambda: recipes.vse_plus_plus(recipes.linear(0.2, 0.4, 4)),
}


def call(module, q, k):
    if isinstance(module, (InfoNCELoss, negmine.SigLIPLoss, MethodLoss, SimANSLoss)):
        return module(q, k[: len(q)], k)
    if isinstance(module, VSEPlusPlusLoss):
        return module(q, k[: len(q)])
    return module(q, k, labels(len(q)), labels(len(k)))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "double and back"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_can_be_pickled_copied_and_moved(name, way):
    module, q, k = MODULES[name](), unit(9, D), unit(60, D, seed=1)
    call(module, q, k)
    twin = MODULES[name]()
    if way == "state_dict":
        twin.load_state_dict(module.state_dict())
    elif way == "double and back":  # a temperature of 0.3 is a float again
        twin = copy.deepcopy(module).double().float()
    else:
        twin = copy.deepcopy(module) if way == "deepcopy" else pickle.loads(pickle.dumps(module))
    for _ in range(2):
        assert torch.equal(call(module, q, k), call(twin, q, k))


@pytest.mark.parametrize("make", [MoCoQueue, ShardedMoCoQueue])
def test_a_queue_travels_over_devices_and_dtypes(make):
    """Parameters may be on the meta device first, and the state of an fp16 queue can be loaded into an fp32 queue."""
    queue = make(D, 20, with_ids=True)
    queue.enqueue(unit(7, D), ids=torch.arange(7))
    half = copy.deepcopy(queue).half()
    other = make(D, 20, with_ids=True)
    other.load_state_dict(half.state_dict())
    assert torch.equal(other.keys, queue.keys.half().float()) and torch.equal(other.ids, queue.ids)
    ghost = make(D, 20, with_ids=True).to("meta")
    ghost = ghost.to_empty(device="cpu")
    ghost.load_state_dict(queue.state_dict())
    ghost.enqueue(unit(3, D, seed=2))
    queue.enqueue(unit(3, D, seed=2))
    assert torch.equal(ghost.keys, queue.keys) and torch.equal(ghost.queue_ptr, queue.queue_ptr)
