"""Faults that training jobs met with other packages, each tried here: the tests are named after the rows of that list.

2a to 2d   state, graphs and recomputation     2h to 2l   dtypes, rounding, what a scalar may be
2m to 2o   empty pools, unknown tags, eval     2p to 2s   distances, transforms, views, temperatures
"""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import negmine
from negmine import (
    InfoNCELoss,
    Mix,
    MoCoQueue,
    MultiSimilarityLoss,
    Select,
    SigLIPLoss,
    SupConLoss,
    TripletLoss,
    recipes,
)
from negmine.adapters import lightly, open_clip
from negmine.adapters import pytorch_metric_learning as pml
from negmine.losses import LogScale
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
    "ring": lambda: recipes.ring(recipes.step(1.0, 0.2, 9, 3)),
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
    "TripletLoss": TripletLoss,
    "MultiSimilarityLoss": MultiSimilarityLoss,
}


def vectors(step=0):
    return [unit(n, D, seed=3 * step + i) for i, n in enumerate((B, B, K))]


def every_loss():
    """name -> module and a function (module, query, positive, keys, **step) of each loss module and recipe."""
    for name, make in QUEUE_LOSSES.items():
        yield name, make, lambda loss, q, p, k, **given: loss(q, p, k, **given)
    for name, make in LABEL_LOSSES.items():
        yield name, make, lambda loss, q, p, k, **given: loss(q, k, LABELS, KEY_LABELS, **given)
    mixed = {"share": SHARE, "partner": PARTNER}
    yield "i_mix", recipes.i_mix, lambda loss, q, p, k, **given: loss(q, p, k, **mixed, **given)
    yield "vse_plus_plus", recipes.vse_plus_plus, lambda loss, q, p, k, **given: loss(q, p, **given)


each_loss = pytest.mark.parametrize(
    ("make", "call"), [pytest.param(make, call, id=name) for name, make, call in every_loss()]
)


def graphs(function, steps=12):
    """How many graphs 12 steps of function(step number) need, without a break."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for step in range(steps):
        compiled(step)
    return counter.frame_count


def test_2a_state_in_buffers():
    """A copy of the buffers is a copy of the state: DDP's broadcast, an EMA model, and a buffer that is zeroed by hand."""
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
    """12 steps are one graph: with a gradient, counted by the module; and without one (2d), given as tensors."""
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
    """A queue that grows, fills and turns is one graph, and so are the adapters that return a number."""
    queue = MoCoQueue(D, 20, with_ids=True, random_init=False)
    q, p, _ = vectors()
    assert graphs(lambda step: queue.enqueue(q, ids=LABELS)) == 1 and len(queue) == 20
    bank, clip = lightly.NTXentLoss(0.5, (20, D)), open_clip.ClipLoss()
    leaf = q.clone().requires_grad_()
    for call in (
        lambda step: bank(leaf, p),
        lambda step: clip(leaf, p, torch.tensor(14.0)),
        lambda step: open_clip.SigLipLoss()(leaf, p, torch.tensor(10.0), torch.tensor(-10.0)),
    ):
        assert graphs(call, 6) == 1
    memory = pml.CrossBatchMemory(TripletLoss(), D, 20)
    assert graphs(lambda step: memory(leaf, LABELS)) == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["mochi", "ring", "simans", "synco", "distance_weighted"])
def test_2c_activation_checkpointing(name, reentrant):
    """The backward pass runs the module again: with the draws of the forward pass, and without counting."""
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
    """A refused row takes no slot, whatever else enters; ids and labels stay beside their keys."""
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


BUILD = """
import sys, torch
from negmine import MoCoQueue
from tests.peak import print_peak
made = []
print_peak(lambda K: made.append(MoCoQueue(256, K, dtype=getattr(torch, sys.argv[1]))), 100, 200_000)
"""


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_building_a_queue_holds_one_copy_of_it(dtype, size):
    assert peak_mib(BUILD, dtype) <= 1.1 * 200_000 * 256 * size / 2**20


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
    for sign in (-1, 1):  # above the bound, only what lowers the scale passes
        (gradient,) = torch.autograd.grad(sign * scale.scale(), scale.log_scale)
        assert float(gradient) == pytest.approx(3.0 if sign > 0 else 0.0)
    with pytest.raises(ValueError, match=r"LogScale: init must be at most max=1\.0, got 2\.0"):
        LogScale(2.0, 1.0)
