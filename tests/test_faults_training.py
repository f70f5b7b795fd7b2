"""Regression tests for faults of other packages in training jobs. The numbers in the names of the tests group these faults:

2a to 2d   state, graphs and recomputation     2h to 2l   dtypes, rounding, what a scalar may be
2m to 2o   empty pools, unknown tags, eval     2p to 2s   distances, transforms, views, temperatures
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import negmine
from negmine import (
    FalseNegatives,
    InfoNCELoss,
    Mix,
    MoCoQueue,
    MultiSimilarityLoss,
    Select,
    SigLIPLoss,
    SupConLoss,
    TripletLoss,
    Weight,
    losses,
    recipes,
)
from negmine.adapters import lightly, open_clip
from negmine.adapters import pytorch_metric_learning as pml
from negmine.losses import LogScale, methods
from negmine.ops import backends
from negmine.queues import ShardedMoCoQueue
from tests import compare
from tests.cases import unit
from tests.conftest import device_of
from tests.peak import peak_mib

B, K, D = 6, 40, 8
LABELS, KEY_LABELS = torch.arange(B) % 3, torch.arange(K) % 3
SHARE, PARTNER = torch.full((B,), 0.7), torch.arange(B).flip(0)

# name -> a module, and how it is called with query, positive and keys
QUEUE_LOSSES = {
    "moco_v1": recipes.moco_v1,
    "decoupled": recipes.decoupled,
    "decoupled_weighted": recipes.decoupled_weighted,
    "hardest": lambda: recipes.hardest(recipes.linear(0.8, 0.2, 9)),
    "easiest": recipes.easiest,
    "ring": lambda: recipes.ring(recipes.step(1.0, 0.2, 9, 3), sample=5),
    "margin_pos": lambda: recipes.margin_pos(-0.5, recipes.whole(recipes.linear(20, 4, 9))),
    "perc_pos": lambda: recipes.perc_pos(recipes.cosine(1.5, 0.5, 9)),
    "debiased": lambda: recipes.debiased(recipes.linear(0.0, 0.02, 9)),
    "hcl": lambda: recipes.hcl(recipes.linear(1.0, 0.0, 9)),
    "hardness_added": lambda: recipes.hardness_added(recipes.linear(0.0, 5.0, 9), temperature=0.1),
    "rince": recipes.rince,
    "ifm": lambda: recipes.ifm(recipes.linear(0.1, 0.0, 9)),
    "dual_temperature": recipes.dual_temperature,
    "mochi": lambda: recipes.mochi(6, 5, 4, warmup_steps=3),
    "synco": lambda: recipes.synco(6, 2, 2, 2, 2, 2, 2, warmup_steps=3),
    "siglip": recipes.siglip,
    "adco": lambda: recipes.adco(0.1, recipes.linear(0.1, 0.05, 9)),
    "mixgcf": lambda: recipes.mixgcf(9, 2, temperature=recipes.linear(1.0, 0.5, 9)),
    "simans": lambda: recipes.simans(4, candidates=9, a=recipes.linear(1.0, 2.0, 9)),
    "InfoNCELoss": lambda: InfoNCELoss(recipes.linear(0.5, 0.1, 9), mix=Mix(5, 4, 3)),
    "SigLIPLoss": SigLIPLoss,
}
LABEL_LOSSES = {
    "sup_con": lambda: recipes.sup_con(temperature=recipes.linear(0.5, 0.1, 9)),
    "SupConLoss": lambda: SupConLoss(positives="in", denominator="own_positive"),
    "batch_hard": recipes.batch_hard,
    "facenet": lambda: recipes.facenet(5, margin=recipes.linear(0.1, 0.3, 9)),
    "distance_weighted": lambda: recipes.distance_weighted(5),
    "ephn": lambda: recipes.ephn(recipes.linear(0.5, 0.1, 9)),
    "multi_similarity": lambda: recipes.multi_similarity(epsilon=recipes.linear(0.1, 0.3, 9)),
    "batch_hard, euclidean": lambda: recipes.batch_hard(distance="euclidean"),
    "multi_similarity, euclidean": lambda: recipes.multi_similarity(distance="euclidean"),
    "multi_similarity, squared_euclidean": lambda: recipes.multi_similarity(distance="squared_euclidean"),
    "TripletLoss": TripletLoss,
    "MultiSimilarityLoss": MultiSimilarityLoss,
}


def vectors(step=0):
    return [unit(n, D, seed=3 * step + i) for i, n in enumerate((B, B, K))]


def every_loss():
    """For each loss module and recipe: its name, the module, and a function (module, query, positive, keys, **step)."""
    for name, make in QUEUE_LOSSES.items():
        yield name, make, lambda loss, q, p, k, **given: loss(q, p, k, **given)
    for name, make in LABEL_LOSSES.items():
        yield name, make, lambda loss, q, p, k, **given: loss(q, k, LABELS[: len(q)], KEY_LABELS, **given)

    def mixed(q):
        return {"share": SHARE[: len(q)], "partner": PARTNER[: len(q)]}

    yield "i_mix", recipes.i_mix, lambda loss, q, p, k, **given: loss(q, p, k, **mixed(q), **given)
    yield "un_mix", recipes.un_mix, lambda loss, q, p, k, **given: loss(q, p, k, mixed_query=p, share=0.7, **given)
    yield "vse_plus_plus", recipes.vse_plus_plus, lambda loss, q, p, k, **given: loss(q, p, **given)


each_loss = pytest.mark.parametrize(
    ("make", "call"), [pytest.param(make, call, id=name) for name, make, call in every_loss()]
)


def graphs(function, steps=12):
    """Compile 12 steps of function(step number) without graph breaks, and return the number of graphs."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for step in range(steps):
        compiled(step)
    return counter.frame_count


def test_2a_state_in_buffers():
    """All state is in buffers, so copying them copies it: DDP's broadcast, an EMA model, and setting a buffer to zero."""
    queue = MoCoQueue(4, 12, random_init=False)
    queue.enqueue(torch.randn(7, 4))
    twin = MoCoQueue(4, 12, random_init=False)
    for a, b in zip(twin.buffers(), queue.buffers(), strict=True):
        a.copy_(b)
    assert (len(twin), int(twin.queue_len)) == (7, 7)
    queue.queue_len.zero_()
    assert len(queue) == 0 and negmine.info_nce(unit(2, 4), unit(2, 4), queue) == 0


@each_loss
def test_2a_steps_in_buffers(make, call):
    first, second = make().train(), make().train()
    for step in range(3):
        call(first, *vectors(step))
    for a, b in zip(second.buffers(), first.buffers(), strict=True):
        a.copy_(b)
    assert first.step == second.step == 3
    assert torch.equal(call(first, *vectors(3)), call(second, *vectors(3)))
    assert torch.equal(call(copy.deepcopy(first).eval(), *vectors(4)), call(first, *vectors(4), step=4))


def test_2a_memory_of_the_adapters_in_buffers():
    first, second = (pml.CrossBatchMemory(TripletLoss(), D, 20) for _ in range(2))
    for step in range(2):
        first(vectors(step)[0], LABELS)
    for a, b in zip(second.buffers(), first.buffers(), strict=True):
        a.copy_(b)
    assert torch.equal(first(vectors(3)[0], LABELS), second(vectors(3)[0], LABELS))


@each_loss
def test_2b_one_graph(make, call):
    """12 steps need one graph: with gradients, where the module counts the steps; and without (2d), where they are tensors."""
    loss = make().train()
    tensors = [vectors(step) for step in range(12)]

    def counted(q, p, k):
        return call(loss, q, p, k)

    def given(q, p, k, step):
        return call(loss, q, p, k, step=step)

    for function, more in ((counted, ()), (given, (1,))):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(function, backend=counter, fullgraph=True)
        for step in range(12):
            q, p, k = tensors[step]
            named = torch.tensor(step)
            got = compiled(q.clone().requires_grad_(not more), p, k, *([named] if more else []))
            if step % 3 == 0:
                with torch.no_grad():
                    torch.testing.assert_close(got.detach(), call(loss, q, p, k, step=named))
        assert counter.frame_count == 1
    assert loss.step == 12


def test_2d_without_a_gradient():
    """Select.sample with replacement, false negatives that attract, and Weight are compiled if nothing requires grad."""
    q, p, k = vectors()
    support = {"false_negatives": FalseNegatives(5, 0.1, mode="attract"), "support": p[:, None]}
    for options in (
        {"select": Select(sample=5)},
        {"select": Select(sample=9, replace=True)},
        support,
        {"weight": Weight(1.0)},
    ):
        call = torch.compile(
            lambda step, o=options: negmine.info_nce(q, p, k, step=step, **o), fullgraph=True, backend="eager"
        )
        for step in map(torch.tensor, range(2)):
            torch.testing.assert_close(call(step), negmine.info_nce(q, p, k, step=step, **options))


def test_2b_at_most_two_graphs_for_an_integer_step():
    q, p, k = vectors()
    calls = [
        lambda step: negmine.info_nce(q, p, k, mix=Mix(5, 4, 3), step=step),
        lambda step: negmine.triplet_loss(q, k, LABELS, KEY_LABELS, negative="distance_weighted", step=step),
        lambda step: negmine.mine_hardest(q, k, 4, select=Select(sample=4), step=step).index,
    ]
    loss = recipes.ring(recipes.step(1.0, 0.2, 9, 3))
    for call in (*calls, lambda step: loss(q, p, k, step=step)):
        assert graphs(call) <= 2


def test_2b_enqueue_and_adapters():
    """A queue that grows, becomes full and wraps around needs one graph; so do the adapters that return a number."""
    queue = MoCoQueue(D, 20, with_ids=True, random_init=False)
    q, p, _ = vectors()
    assert graphs(lambda step: queue.enqueue(q, ids=LABELS)) == 1 and len(queue) == 20
    bank, clip = lightly.NTXentLoss(0.5, (20, D)), open_clip.ClipLoss()
    leaf = q.clone().requires_grad_()
    for call in (
        lambda step: bank(leaf, p),
        lambda step: lightly.NTXentLoss(0.5)(leaf, p),
        lambda step: lightly.DCLWLoss()(leaf, p),
        lambda step: negmine.info_nce(leaf, leaf, p),
        lambda step: negmine.info_nce(leaf, p, p),
        lambda step: negmine.sup_con(leaf, leaf, LABELS, LABELS),
        lambda step: negmine.logsumexp(leaf, leaf).sum(),
        lambda step: negmine.siglip(leaf, leaf),
        lambda step: clip(leaf, p, torch.tensor(14.0)),
        lambda step: open_clip.SigLipLoss()(leaf, p, torch.tensor(10.0), torch.tensor(-10.0)),
    ):
        assert graphs(call, 6) == 1
    memory = pml.CrossBatchMemory(TripletLoss(), D, 20)
    assert graphs(lambda step: memory(leaf, LABELS)) == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["mochi", "ring", "simans", "synco", "mixgcf", "distance_weighted"])
def test_2c_activation_checkpointing(name, reentrant):
    """The backward pass runs the module again, with the random draws of the forward pass and without counting a step."""
    make, call = {name: (make, call) for name, make, call in every_loss()}[name]
    plain, checked = make(), make()
    q, p, k = vectors()
    for step in range(5):
        grads = []
        for function in (call, lambda *args: checkpoint(call, *args, use_reentrant=reentrant)):
            leaf = q.clone().requires_grad_()
            loss = plain if function is call else checked
            function(loss, leaf, p, k).backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)
        assert plain.step == checked.step == step + 1


def test_2c_two_calls_under_one_checkpoint_ask_for_the_step():
    loss, (q, p, k) = recipes.mochi(6, 5, 4), vectors()
    leaf = q.clone().requires_grad_()

    def both(q):
        return loss(q, p, k) + loss(q, k[:B], k)

    with pytest.raises(ValueError, match="InfoNCELoss: step must be given under activation checkpointing"):
        checkpoint(both, leaf, use_reentrant=False).backward()


def test_2k_a_queue_takes_finite_rows_only(any_backend):
    """A row that is not finite is not stored, and ids and labels stay with their keys."""
    queue = MoCoQueue(2, 5, dtype=torch.float16, with_ids=True, random_init=False).to(device_of(any_backend))
    kept, refused, number = [], 0, 0
    for batch in (3, 2, 7, 0, 1, 12):
        keys, ids = torch.ones(batch, 2), torch.arange(number, number + batch)
        keys[ids % 3 == 1, 0] = (torch.nan, torch.inf, 1e6)[batch % 3]  # 1e6 is inf in fp16
        queue.enqueue(keys.to(queue.queue.device), ids=ids.to(queue.queue.device))
        kept += [i for i in ids.tolist() if i % 3 != 1]
        refused += int((ids % 3 == 1).sum())
        number += batch
        want = dict(enumerate(kept[-5:], max(0, len(kept) - 5)))
        assert sorted(queue.ids.tolist()) == sorted(want.values())
        assert all(int(queue.queue_ids[place % 5]) == i for place, i in want.items())
        assert (int(queue.queue_ptr), int(queue.num_refused)) == (len(kept) % 5, refused)
    assert bool(queue.keys.isfinite().all())


def test_reset_forgets_all_rows():
    queue = MoCoQueue(2, 4, with_ids=True, with_labels=True)
    queue.enqueue(torch.tensor([[torch.nan, 1.0], [1.0, 0.0]]), ids=torch.tensor([7, 8]), labels=torch.tensor([1, 2]))
    queue.reset()
    assert (len(queue), int(queue.queue_ptr), int(queue.num_refused)) == (0, 0, 0)
    assert queue.queue_ids.unique().tolist() == queue.queue_labels.unique().tolist() == [-1]
    assert negmine.info_nce(unit(3, 2), unit(3, 2), queue) == 0
    queue.enqueue(unit(3, 2))
    assert len(queue) == 3


@pytest.mark.parametrize("kind", [MoCoQueue, ShardedMoCoQueue])
def test_a_queue_built_on_the_meta_device_is_loaded(kind):
    """With assign=True, as for large models, and after to_empty, which leaves counters uninitialized."""
    saved = kind(D, 9, with_ids=True, random_init=False)
    saved.enqueue(vectors()[0], ids=torch.arange(B))
    for assign in (True, False):
        with torch.device("meta"):
            queue = kind(D, 9, with_ids=True)
        if not assign:
            queue.to_empty(device="cpu").num_refused.fill_(99)
        queue.load_state_dict(copy.deepcopy(saved.state_dict()), assign=assign)
        queue.enqueue(torch.full((2, D), torch.nan), ids=torch.arange(2))
        assert (len(queue), int(queue.num_refused)) == (B, 2)
        assert torch.equal(queue.keys, saved.keys) and torch.equal(queue.ids, saved.ids)


def building(kind, dtype):
    """A function that builds a queue of K rows and keeps it, and two numbers of rows."""
    made = []
    return lambda K: made.append(kind(256, K, dtype=dtype)), 100, 200_000


@pytest.mark.parametrize(
    ("kind", "dtype", "size"),
    [(MoCoQueue, torch.float32, 4), (MoCoQueue, torch.bfloat16, 2), (ShardedMoCoQueue, torch.bfloat16, 2)],
)
def test_building_a_queue_holds_one_copy_of_it(kind, dtype, size):
    assert peak_mib(building, kind, dtype) <= 1.1 * 200_000 * 256 * size / 2**20


def test_2o_a_module_that_owns_a_queue_enqueues_in_train_mode_only():
    q, p, _ = vectors()
    for mode, grad, grows in ((True, True, True), (False, True, False), (False, False, False)):
        bank = lightly.NTXentLoss(0.5, (20, D)).train(mode)
        before, leaf = bank.memory_bank.queue.clone(), q.clone().requires_grad_(grad)
        bank(leaf, p)
        assert torch.equal(bank.memory_bank.queue, before) != grows
        memory = pml.CrossBatchMemory(TripletLoss(), D, 20).train(mode)
        memory(leaf, LABELS)
        assert (len(memory.memory) == B) == grows
    queue = MoCoQueue(D, 20, random_init=False).eval()
    queue.enqueue(q)
    assert len(queue) == B


def test_2c_a_module_that_owns_a_queue_is_refused_under_checkpointing():
    q, p, _ = vectors()
    for call in (
        lambda q: lightly.NTXentLoss(0.5, (20, D))(q, p),
        lambda q: pml.CrossBatchMemory(TripletLoss(), D, 20)(q, LABELS),
    ):
        with pytest.raises(
            RuntimeError, match="a module that owns a queue must be called outside of activation checkpoint"
        ):
            checkpoint(call, q.clone().requires_grad_(), use_reentrant=False).backward()


def test_log_scale_learns_and_is_bounded():
    q, p, k = vectors()
    for make, at_two in (
        (lambda s: InfoNCELoss(s), lambda: negmine.info_nce(q, p, k, temperature=0.5)),
        (lambda s: SupConLoss(s), lambda: negmine.sup_con(q, k, LABELS, KEY_LABELS, temperature=0.5)),
        (lambda s: recipes.rince(temperature=s), lambda: recipes.rince(temperature=0.5)(q, p, k)),
        (lambda s: SigLIPLoss(s), lambda: negmine.siglip(q, p, k, scale=2.0)),
    ):
        scale = LogScale(2.0, 3.0)
        loss = make(scale)
        labels = (LABELS, KEY_LABELS) if isinstance(loss, SupConLoss) else ()
        value = loss(q, k, *labels) if labels else loss(q, p, k)
        value.backward()
        torch.testing.assert_close(value.detach(), at_two())
        assert scale.log_scale.grad != 0 and any(each is scale.log_scale for each in loss.parameters())
        assert any(name.endswith("log_scale") for name in loss.state_dict())
    with torch.no_grad():
        scale.log_scale.fill_(9.0)
    assert scale.scale().item() == pytest.approx(3.0) and scale().item() == pytest.approx(1 / 3)
    for sign in (-1, 1):  # at the bound, only gradients that lower the scale have an effect
        (gradient,) = torch.autograd.grad(sign * scale.scale(), scale.log_scale)
        assert float(gradient) == pytest.approx(3.0 if sign > 0 else 0.0)
    with pytest.raises(ValueError, match=r"LogScale: init must be at most max=1\.0, got 2\.0"):
        LogScale(2.0, 1.0)


def sharded(q, p, k, backend):
    """A ShardedMoCoQueue in one process, compared with the reference on the whole queue."""
    if backend == "reference":
        return negmine.info_nce(q, p, k.detach(), backend=backend)
    queue = ShardedMoCoQueue(D, K, dtype=k.dtype, random_init=False)
    queue.enqueue(k.detach())
    return queue.info_nce(q, p, backend=backend)


ROUNDING = {
    "sharded": sharded,
    "info_nce": lambda q, p, k, **o: negmine.info_nce(q, p, k, **o),
    "in batch": lambda q, p, k, **o: negmine.info_nce(q, p, **o),
    "same tensor": lambda q, p, k, **o: negmine.info_nce(q, q, **o),
    "weight": lambda q, p, k, **o: negmine.info_nce(q, p, k, weight=Weight(1.0, 0.01), **o),
    "window": lambda q, p, k, **o: negmine.info_nce(q, p, k, select=Select(0.1, 0.8, sample=30), **o),
    "sup_con": lambda q, p, k, **o: negmine.sup_con(q, k, LABELS, KEY_LABELS, **o),
    "sup_con, in": lambda q, p, k, **o: negmine.sup_con(q, k, LABELS, KEY_LABELS, positives="in", **o),
    "sup_con, own": lambda q, p, k, **o: negmine.sup_con(q, k, LABELS, KEY_LABELS, denominator="own_positive", **o),
    "sup_con, itself": lambda q, p, k, **o: negmine.sup_con(q, q, LABELS, LABELS, **o),
    "views": lambda q, p, k, **o: negmine.sup_con(torch.stack([q, p], 1), None, **o),
    "siglip": lambda q, p, k, **o: negmine.siglip(q, p, k, bias=-3.0, **o),
    "siglip in batch": lambda q, p, k, **o: negmine.siglip(q, p, bias=-3.0, **o),
    "triplet": lambda q, p, k, **o: negmine.triplet_loss(
        q, k, LABELS, KEY_LABELS, distance="euclidean", margin=1.0, **o
    ),
    "triplet, itself": lambda q, p, k, **o: negmine.triplet_loss(q, q, LABELS, LABELS, margin=1.0, **o),
    "multi_similarity": lambda q, p, k, **o: losses.multi_similarity(q, k, LABELS, KEY_LABELS, epsilon=9.0, **o),
    "rince": lambda q, p, k, **o: recipes.rince(**o)(q, p, k),
    "hardness_added": lambda q, p, k, **o: recipes.hardness_added(temperature=0.1, **o)(q, p, k),
    "hardness_added in batch": lambda q, p, k, **o: recipes.hardness_added(temperature=0.1, **o)(q, p),
    "i_mix": lambda q, p, k, **o: recipes.i_mix(**o)(q, p, k, share=SHARE, partner=PARTNER),
    "un_mix": lambda q, p, k, **o: recipes.un_mix(**o)(q, p, k, mixed_query=k.detach()[:B], share=0.7),
    "un_mix, itself": lambda q, p, k, **o: recipes.un_mix(**o)(q.detach(), p, p, mixed_query=q, share=0.7),
    "adco": lambda q, p, k, **o: recipes.adco(**o)(q, p, k),
    "mixgcf": lambda q, p, k, **o: recipes.mixgcf(9, 2, **o)(q, p, k),
    "ClipLoss": lambda q, p, k, **o: open_clip.ClipLoss(**o)(q, p, torch.tensor(10.0)),
    "SigLipLoss": lambda q, p, k, **o: open_clip.SigLipLoss(**o)(q, p, torch.tensor(10.0), torch.tensor(-5.0)),
    "NTXentLoss": lambda q, p, k, **o: lightly.NTXentLoss(**o)(q, p),
    "DCLWLoss": lambda q, p, k, **o: lightly.DCLWLoss(**o)(q, p),
}


@pytest.fixture
def fp32_weights():
    """Use CPU kernels without products of 16-bit numbers."""
    from negmine import _ops_cpu

    before = _ops_cpu.isa()
    _ops_cpu.set_isa("avx2") or _ops_cpu.set_isa("portable")
    yield
    _ops_cpu.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", ROUNDING)
@pytest.mark.parametrize("any_backend", ["cpu", "reference"])
def test_2i_gradients_are_rounded_once(any_backend, call, dtype, fp32_weights):
    """The gradient of a query close to its positive is a small difference of two parts, which must not be rounded separately.

    Matrix units use 16-bit softmax weights, so this is tested only for kernels that keep the weights in fp32.
    """
    device = "cpu"
    q, p, k = (unit(n, D, seed=i) for i, n in enumerate((B, B, K)))
    p, k[:B] = F.normalize(q + 0.05 * p, dim=1), F.normalize(q + 0.1 * k[:B], dim=1)
    stored = [t.to(dtype).to(device).requires_grad_() for t in (q, p, k)]
    exact = [t.detach().double().requires_grad_() for t in stored]
    ROUNDING[call](*stored, backend=any_backend).backward()
    ROUNDING[call](*exact, backend="reference").backward()
    for got, want in zip(stored, exact, strict=True):
        if want.grad is not None:
            error = (got.grad.double() - want.grad).abs()
            # One rounding, and the error of fp32 in terms of size 1 / T.
            allowed = 0.502 * torch.finfo(dtype).eps * want.grad.abs() + 1e-5
            assert bool((error <= allowed).all()), float((error / allowed).max())


PAIRED = {  # adapters that are called with a query and a positive
    "NTXentLoss": lambda: lightly.NTXentLoss(0.5, (20, D)),
    "DCLLoss": lightly.DCLLoss,
    "DCLWLoss": lightly.DCLWLoss,
    "ClipLoss": lambda: lambda q, p: open_clip.ClipLoss()(q, p, torch.tensor(10.0)),
    "SigLipLoss": lambda: lambda q, p: open_clip.SigLipLoss()(q, p, torch.tensor(10.0), torch.tensor(-5.0)),
}
MIXES = [  # each of three arguments is once the only float64, and each pair of dtypes occurs
    (torch.float64, torch.float32, torch.bfloat16),
    (torch.float16, torch.float64, torch.float32),
    (torch.bfloat16, torch.float16, torch.float64),
    (torch.float32, torch.bfloat16, torch.float16),
]


@pytest.mark.parametrize("name", [*QUEUE_LOSSES, *LABEL_LOSSES, *PAIRED])
def test_2h_recipes_and_adapters_take_any_pair_of_dtypes(name):
    """Computed in float64 if any argument is float64; each gradient has the dtype of its argument."""
    for dtypes in MIXES:
        leaves = [t.to(dtype).requires_grad_() for t, dtype in zip(vectors(), dtypes, strict=True)]
        q, p, k = leaves
        if name in QUEUE_LOSSES:
            value = QUEUE_LOSSES[name]()(q, p, k)
        else:
            leaves = [q, p] if name in PAIRED else [q, k]
            value = PAIRED[name]()(q, p) if name in PAIRED else LABEL_LOSSES[name]()(q, k, LABELS, KEY_LABELS)
        value.backward()
        wide = any(leaf.dtype == torch.float64 for leaf in leaves)
        assert value.dtype == (torch.float64 if wide else torch.float32) and bool(value.isfinite()), dtypes
        assert all(leaf.grad is None or leaf.grad.dtype == leaf.dtype for leaf in leaves)


def test_2n_minus_one_is_unknown_and_equal_to_nothing(any_backend):
    """An unlabelled query, and keys of which some are unlabelled, for example in a queue that was filled without labels."""
    device = device_of(any_backend)
    queue = MoCoQueue(D, K, with_labels=True, with_ids=True).to(device)  # random rows of unknown label and id
    queue.enqueue(vectors()[2][:5].to(device), ids=torch.arange(5).to(device), labels=torch.arange(5).to(device))
    q, p, _ = (t.to(device) for t in vectors())
    unknown = torch.full((B,), -1, device=device)
    call = {"backend": any_backend, "reduction": "none"}
    everything = negmine.info_nce(q, p, queue, **call)
    for tags in ("query_labels", "query_ids"):
        torch.testing.assert_close(negmine.info_nce(q, p, queue, **{tags: unknown}, **call), everything)
        torch.testing.assert_close(negmine.info_nce(q, p, **{tags: unknown}, **call), negmine.info_nce(q, p, **call))
        torch.testing.assert_close(
            negmine.siglip(q, p, queue, **{tags: unknown}, **call), negmine.siglip(q, p, queue, **call)
        )
        found = negmine.mine_hardest(q, queue, 4, **{tags: unknown}, backend=any_backend)
        assert torch.equal(found.index, negmine.mine_hardest(q, queue, 4, backend=any_backend).index)
    assert not negmine.sup_con(q, queue.queue, unknown, queue.queue_labels, **call).any()  # no positives
    found = losses.mine_triplets(q, queue.queue, unknown, queue.queue_labels, backend=any_backend)
    assert int(found.num_triplets) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean"])
def test_2p_mining_by_the_distance_of_the_loss(any_backend, distance, dtype):
    """Features of any norm, compared with the dense definition: batch hard, and multi-similarity with a fully masked row."""
    device = device_of(any_backend)
    labels, key_labels = LABELS.to(device), KEY_LABELS.to(device)
    q, _, k = vectors()
    q, k = ((4 * t * torch.rand(len(t), 1).add(0.1)).to(dtype).to(device) for t in (q, k))
    seen = torch.arange(K, device=device) != 7
    same = labels[:, None] == key_labels
    exact = [t.double().detach().requires_grad_() for t in (q, k)]
    d = torch.cdist(*exact) ** (1 if distance == "euclidean" else 2)
    far, near = d.masked_fill(~(same & seen), -9).amax(1), d.masked_fill(same | ~seen, 99).amin(1)
    pulled, pushed = same & seen & (d > near[:, None] - 0.3), ~same & seen & (d < far[:, None] + 0.3)
    pull = torch.cat([(2 * (d - 0.5)).masked_fill(~pulled, -torch.inf), 0 * d[:, :1]], 1).logsumexp(1) / 2
    push = torch.cat([(5 * (0.5 - d)).masked_fill(~pushed, -torch.inf), 0 * d[:, :1]], 1).logsumexp(1) / 5
    call = {"key_mask": seen, "distance": distance, "backend": any_backend}
    many = {"alpha": 2.0, "beta": 5.0, "base": 0.5, "epsilon": 0.3}
    for loss, want in (
        (lambda q, k: recipes.batch_hard(distance=distance, backend=any_backend)(q, k, labels, key_labels, key_mask=seen),
         (far - near + 0.2).relu().mean()),
        (lambda q, k: losses.multi_similarity(q, k, labels, key_labels, **many, **call), (pull + push).mean()),
    ):  # fmt: skip
        hidden = torch.where(seen[:, None], k, torch.nan)
        leaves = [t.clone().requires_grad_() for t in (q, hidden)]
        got = loss(*leaves)
        got.backward()
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        for leaf, grad in zip(leaves, torch.autograd.grad(want, exact, retain_graph=True), strict=True):
            compare.rounded("gradient", leaf.grad, grad, grad.to(dtype), 4.0)


@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean"])
def test_2p_rows_that_are_not_finite_are_never_mined(any_backend, distance):
    q, k = torch.ones(2, 3), torch.arange(15.0).reshape(5, 3)
    k[1, 0], k[2, 1], k[3, 2], q[1, 1] = torch.inf, -torch.inf, torch.nan, torch.inf
    device = device_of(any_backend)
    labels = torch.zeros(2, dtype=torch.int64, device=device), torch.tensor([0, 1, 1, 1, 1], device=device)
    call = {"positive": "easy", "negative": "hardest", "num_negatives": 4, "distance": distance, "backend": any_backend}
    found = losses.mine_triplets(q.to(device), k.to(device), *labels, **call)
    assert found.negative.tolist() == [[[4, -1, -1, -1]], [[-1, -1, -1, -1]]]


CLOSE = {
    "info_nce": lambda q, p, k, **o: negmine.info_nce(q, p, k, **o),
    "in batch": lambda q, p, k, **o: negmine.info_nce(q, p, **o),
    "decoupled": lambda q, p, k, **o: negmine.info_nce(q, p, k, decoupled=True, **o),
    "weight": lambda q, p, k, **o: negmine.info_nce(q, p, k, weight=Weight(1.0), **o),
    "mix": lambda q, p, k, **o: negmine.info_nce(q, p, k, mix=Mix(9, 5, 4), **o),
    "pools": lambda q, p, k, **o: negmine.info_nce(q, p, [k, None], **o),
    "sup_con": lambda q, p, k, **o: negmine.sup_con(q, k, LABELS, KEY_LABELS, **o),
    "sup_con, in": lambda q, p, k, **o: negmine.sup_con(q, k, LABELS, KEY_LABELS, positives="in", **o),
    "synco": lambda q, p, k, temperature, backend: recipes.synco(
        6, 2, 2, 2, 2, 2, 2, temperature=temperature, backend=backend
    )(q, p, k),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("call", CLOSE)
def test_2s_the_temperatures_gradient_where_all_logits_are_close(call, backend):
    """A mean of differences of scores s near 100. Its error is a few eps of |s| / T^2, not that of their log-sum-exp."""
    centre = 10 * unit(1, D, seed=5)
    q, p, k = (centre + 0.01 * t for t in vectors())
    grads = []
    for dtype, on in ((torch.float32, backend), (torch.float64, "reference")):
        temperature = torch.tensor(0.07, dtype=dtype, requires_grad=True)
        CLOSE[call](*(t.to(dtype) for t in (q, p, k)), temperature=temperature, backend=on).backward()
        grads.append(float(temperature.grad))
    assert abs(grads[0] - grads[1]) <= 6 * torch.finfo(torch.float32).eps * 100 / 0.07**2, grads


def test_2q_torch_func_is_refused_in_a_sentence():
    q, p, k = vectors()
    for call in (
        lambda q: negmine.info_nce(q, p, k),
        lambda q: negmine.sup_con(q, k, LABELS, KEY_LABELS),
        lambda q: negmine.siglip(q, p, k),
        lambda q: negmine.logsumexp(q, k).sum(),
        lambda q: losses.multi_similarity(q, k, LABELS, KEY_LABELS),
        lambda q: negmine.info_nce(q, p, k, mix=Mix(4, 3, 2, detach=False)),
    ):
        with pytest.raises(
            RuntimeError, match=r"negmine: the fused kernels do not support the transforms .* backend='reference'"
        ):
            torch.func.grad(call)(q)
    dense = torch.func.grad(lambda q: negmine.info_nce(q, p, k, backend="reference"))(q)
    assert bool(dense.isfinite().all())


def test_2k_a_zero_row_in_half_precision():
    q, p, _ = (t.half() for t in vectors())
    q[2] = 0
    for loss in (lightly.NTXentLoss(0.5, (20, D)), lightly.NTXentLoss(0.5), lightly.DCLLoss(), lightly.DCLWLoss()):
        leaf = q.clone().requires_grad_()
        loss(leaf, p).backward()
        assert bool(leaf.grad.isfinite().all())
    assert bool(pml.NegmineMiner()(q, LABELS)[0].numel())


@pytest.mark.parametrize(
    "make",
    [np.float32, np.float64, lambda v: torch.tensor([v]), lambda v: torch.tensor(v)],
    ids=["numpy float32", "numpy float64", "one element", "0-d"],
)
def test_2l_a_scalar_may_be_of_numpy_or_a_tensor_of_one_element(make):
    q, p, k = vectors()
    half, margin = make(0.5), make(0.25)
    calls = [
        (lambda v: negmine.info_nce(q, p, k, temperature=v), 0.5),
        (lambda v: negmine.info_nce(q, p, k, weight=Weight(v)), 0.5),
        (lambda v: negmine.info_nce(q, p, k, select=Select(0.0, v, absolute_margin=v)), 0.5),
        (lambda v: negmine.info_nce(q, p, k, false_negatives=FalseNegatives(3, v), support=p[:, None]), 0.5),
        (lambda v: negmine.sup_con(q, k, LABELS, KEY_LABELS, temperature=v), 0.5),
        (lambda v: negmine.siglip(q, p, k, scale=v, bias=v), 0.5),
        (lambda v: negmine.logsumexp(q, k, temperature=v), 0.5),
        (lambda v: losses.softplus_sum(q, k, scale=v, bias=v), 0.5),
        (lambda v: negmine.triplet_loss(q, k, LABELS, KEY_LABELS, margin=v, temperature=v), 0.25),
        (lambda v: losses.mine_triplets(q, k, LABELS, KEY_LABELS, negative="violating", margin=v).negative_score, 0.25),
        (lambda v: losses.multi_similarity(q, k, LABELS, KEY_LABELS, alpha=v, beta=v, base=v, epsilon=v), 0.5),
        (lambda v: InfoNCELoss(v)(q, p, k), 0.5),
        (lambda v: TripletLoss(v, temperature=v)(q, k, LABELS, KEY_LABELS), 0.25),
        (lambda v: recipes.rince(v, v, temperature=v)(q, p, k), 0.5),
        (lambda v: recipes.ifm(v, v, temperature=v)(q, p, k), 0.5),
        (lambda v: recipes.hardness_added(v, temperature=v)(q, p, k), 0.5),
        (lambda v: recipes.dual_temperature(v, v)(q, p, k), 0.5),
        (lambda v: recipes.decoupled_weighted(v, temperature=v)(q, p, k), 0.5),
        (lambda v: recipes.hcl(v, v, temperature=v)(q, p, k), 0.5),
        (lambda v: recipes.simans(3, candidates=9, a=v, b=v, temperature=v)(q, p, k), 0.5),
        (lambda v: recipes.synco(5, 2, 2, 2, 2, 2, 2, sigma=v, delta=v, eta=v, temperature=v)(q, p, k), 0.5),
        (lambda v: open_clip.ClipLoss()(q, p, v, v), 0.5),
        (lambda v: open_clip.SigLipLoss()(q, p, v, v), 0.5),
        (lambda v: lightly.NTXentLoss(v)(q, p), 0.5),
    ]
    for call, value in calls:
        torch.testing.assert_close(call(half if value == 0.5 else margin), call(value))


def test_2l_a_count_or_a_step_may_be_of_numpy():
    q, p, k = vectors()
    three = np.int64(3)
    want = negmine.info_nce(q, p, k, mix=Mix(3, 3, 3), seed=3, step=3, row_offset=3)
    got = negmine.info_nce(q, p, k, mix=Mix(three, three, three), seed=three, step=three, row_offset=three)
    assert torch.equal(got, want)
    assert torch.equal(negmine.mine_hardest(q, k, three).index, negmine.mine_hardest(q, k, 3).index)
    assert torch.equal(negmine.rank_thresholds(q, k, three), negmine.rank_thresholds(q, k, 3))
    assert torch.equal(negmine.quantile(q, k, np.float32(0.5)), negmine.quantile(q, k, 0.5))


def test_2l_an_adapter_names_its_own_arguments():
    q, p, _ = vectors()
    with pytest.raises(ValueError, match="ClipLoss: logit_scale must be a number above 0, got -1"):
        open_clip.ClipLoss()(q, p, -1.0)
    with pytest.raises(ValueError, match="SigLipLoss: logit_bias must be a finite number"):
        open_clip.SigLipLoss()(q, p, 1.0, "x")
    with pytest.raises(ValueError, match="CrossBatchMemory: labels must be"):
        pml.CrossBatchMemory(TripletLoss(), D, 20)(q, LABELS[:2])
    with pytest.raises(TypeError, match="NegmineMiner: labels must be"):
        pml.NegmineMiner()(q, None)


@pytest.mark.parametrize("forced", [None, "reference"])
@each_loss
def test_2m_an_empty_pool(make, call, forced, monkeypatch):
    """Without keys, all results are finite, and the loss is 0 if all its terms come from the pool."""
    monkeypatch.setattr(backends, "FORCED", forced)
    monkeypatch.setitem(globals(), "KEY_LABELS", KEY_LABELS[:0])
    q, p, k = vectors()
    leaf = q.clone().requires_grad_()
    loss = make()
    value = call(loss, leaf, p, k[:0])
    value.backward()
    assert bool(leaf.grad.isfinite().all())
    keeps_a_term = (
        isinstance(loss, SigLIPLoss | recipes.triplets.VSEPlusPlusLoss)
        or getattr(loss, "method", None) is methods.i_mix
    )
    assert bool(value.isfinite()) if keeps_a_term else value == 0


@each_loss
def test_anomaly_detection_and_an_empty_batch(make, call):
    """No NaN occurs in backward, not even one that is masked later; the loss of an empty batch is 0."""
    with torch.autograd.set_detect_anomaly(True):
        for rows in (B, 0):
            q, p, k = vectors()
            leaves = q[:rows].clone().requires_grad_(), k.requires_grad_()
            loss = make().train()
            value = call(loss, leaves[0], p[:rows], leaves[1])
            value.backward()
            assert bool(leaves[0].grad.isfinite().all()) and (rows or value == 0)


@each_loss
def test_a_default_dtype_of_16_bits_changes_no_number(make, call):
    q, p, k = vectors()
    want = call(make(), q, p, k)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = call(make(), q, p, k)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", [*QUEUE_LOSSES, *LABEL_LOSSES])
def test_2r_rows_of_the_queue_may_be_overwritten_before_backward(name, backend, monkeypatch):
    """The positive may also be a view of the queue: the gradient belongs to the values that the loss was called with."""
    monkeypatch.setattr(backends, "FORCED", backend)
    found = []
    for overwritten in (False, True):
        queue = MoCoQueue(D, K, random_init=False)
        queue.enqueue(unit(K, D, seed=2))
        leaf = unit(B, D).requires_grad_()
        rows = queue.queue if overwritten else queue.queue.clone()
        torch.manual_seed(0)
        if name in LABEL_LOSSES:
            loss = LABEL_LOSSES[name]()(leaf, rows, LABELS, KEY_LABELS)
        else:
            loss = QUEUE_LOSSES[name]()(leaf, rows[:B], rows)
        if overwritten:
            queue.enqueue(unit(K, D, seed=3))
        loss.backward()
        found.append(leaf.grad)
    assert torch.equal(*found)
