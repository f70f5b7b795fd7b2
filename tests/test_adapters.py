"""The adapters give the same values and gradients as the packages that they replace, except for known bugs of these packages."""

import itertools
import re

import pytest
import torch

import negmine
from negmine.adapters import lightly, open_clip
from negmine.adapters.pytorch_metric_learning import CrossBatchMemory, DistributedLossWrapper, NegmineMiner
from tests import compare
from tests.cases import unit
from tests.conftest import device_of
from tests.peers import peer, peer_file
from tests.ranks import run_ranks

B, K, D = 6, 40, 8


def same_values_and_gradients(ours, theirs, inputs, condition, stored=torch.float32):
    """Compare ours(*stored) with theirs in float64. The error may be twice that of theirs(*stored)."""
    results, inputs = [], [t.detach().to(stored) if t.dim() else t for t in inputs]
    for function, dtype in ((ours, stored), (theirs, torch.float64), (theirs, stored)):
        leaves = [
            t.detach().to(dtype if t.dim() or dtype == torch.float64 else t.dtype).requires_grad_() for t in inputs
        ]
        loss = function(*leaves)
        results.append([loss.reshape(1), *torch.autograd.grad(loss, leaves, allow_unused=True)])
    for i, (got, truth, plain) in enumerate(zip(*results, strict=True)):
        assert (got is None) == (truth is None), i
        if got is not None:
            compare.rounded(f"loss or gradient {i}", got, truth, plain, condition)


def views(n=B, device="cpu", scale=3.0):
    """Two sets of vectors that are not normalized."""
    return [scale * unit(n, D, seed=i, device=device) + 0.1 for i in (0, 1)]


# lightly ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 0.07])
@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss", "DCLWLoss"])
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_lightly_in_batch(any_backend, name, temperature):
    theirs = getattr(peer("lightly.loss." + ("ntx_ent_loss" if name == "NTXentLoss" else "dcl_loss")), name)(
        temperature
    )
    ours = getattr(lightly, name)(temperature, backend=any_backend)
    same_values_and_gradients(ours, theirs, views(device=device_of(any_backend)), 1 / temperature)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_lightly_weights_and_their_own_function():
    module = peer("lightly.loss.dcl_loss")
    out = views()
    torch.testing.assert_close(
        lightly.negative_mises_fisher_weights(*out, 0.3), module.negative_mises_fisher_weights(*out, 0.3)
    )

    def weight(a, b):
        return ((a - b) ** 2).sum(1)

    same_values_and_gradients(lightly.DCLLoss(0.1, weight), module.DCLLoss(0.1, weight), out, 10)


def banks(rows, temperature=0.1, backend=None):
    """lightly's loss and ours, with memory banks that start with the same rows."""
    theirs = peer("lightly.loss.ntx_ent_loss").NTXentLoss(temperature, (rows, D))
    ours = lightly.NTXentLoss(temperature, (rows, D), backend=backend)
    ours.memory_bank.queue.copy_(theirs.memory_bank.bank)
    return ours, theirs


def test_lightly_memory_bank_step_by_step(any_backend):
    device = device_of(any_backend)
    ours, theirs = (module.to(device) for module in banks(12, backend=any_backend))
    for step in range(4):
        out = [t + 0.01 * step for t in views(device=device)]
        got, want = ([t.clone().requires_grad_() for t in out] for _ in range(2))
        losses = ours(*got), theirs(*want)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        for mine, other in zip(torch.autograd.grad(losses[0], got), torch.autograd.grad(losses[1], want), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.memory_bank.queue, theirs.memory_bank.bank)
    before = ours.memory_bank.queue.clone()
    ours(*(t.detach() for t in out))  # evaluation does not change the bank, as in lightly
    assert torch.equal(before, ours.memory_bank.queue)


def test_lightly_drops_what_passes_the_end_of_its_bank_and_we_wrap():
    ours, theirs = banks(10)
    first, second = views(), [t.flip(0) for t in views()]
    for out in (first, second):
        for loss in (ours, theirs):
            loss(out[0].requires_grad_(), out[1])
    newest = torch.nn.functional.normalize(second[1], dim=1)
    assert torch.equal(ours.memory_bank.queue[:2], newest[4:]) and int(ours.memory_bank.queue_ptr) == 2
    assert not torch.equal(theirs.memory_bank.bank[:2], newest[4:]) and int(theirs.memory_bank.bank_ptr) == 0
    assert "memory_bank.queue" in ours.state_dict() and not theirs.state_dict()


def test_lightly_of_one_image_and_of_none():
    theirs = peer("lightly.loss.dcl_loss").DCLLoss()
    one = [t.requires_grad_() for t in views(1)]
    assert float(theirs(*one).detach()) == -torch.inf
    loss = lightly.DCLWLoss()(*one)
    loss.backward()
    assert float(loss.detach()) == 0 and not bool(one[0].grad.any())
    assert lightly.DCLLoss()(*views(0)) == lightly.NTXentLoss()(*views(0)) == 0  # the loss of an empty batch is 0


# open_clip --------------------------------------------------------------------------------------------------------


def test_clip_loss_of_bfloat16(any_backend):
    """Our error is not greater than theirs, and our loss is fp32."""
    device = device_of(any_backend)
    pair = [unit(B, D, seed=i, device=device) for i in (0, 1)]
    scale = torch.tensor(10.0, device=device)
    theirs = peer_file("open_clip", "loss.py").ClipLoss()
    ours = open_clip.ClipLoss(backend=any_backend)
    same_values_and_gradients(ours, theirs, [*pair, scale], 10, torch.bfloat16)
    assert ours(*(t.bfloat16() for t in pair), scale).dtype == torch.float32


@pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
def test_clip_loss(any_backend, scale):
    theirs = peer_file("open_clip", "loss.py").ClipLoss()
    ours = open_clip.ClipLoss(cache_labels=True, backend=any_backend)
    inputs = [*(unit(B, D, seed=i, device=device_of(any_backend)) for i in (0, 1)), torch.tensor(scale)]
    inputs[2] = inputs[2].to(inputs[0].device)
    same_values_and_gradients(ours, theirs, inputs, scale)
    assert set(ours(*inputs, output_dict=True)) == set(theirs(*inputs, output_dict=True)) == {"contrastive_loss"}
    bias = torch.tensor(-10.0, device=inputs[0].device, requires_grad=True)
    loss = ours(*inputs, logit_bias=bias)
    torch.testing.assert_close(loss, theirs(*inputs, logit_bias=bias), rtol=1e-5, atol=1e-5)
    assert float(torch.autograd.grad(loss, bias)[0]) == 0
    torch.testing.assert_close(ours(*inputs[:2], scale), ours(*inputs))


@pytest.mark.parametrize("bias", [None, -10.0])
def test_sig_lip_loss(any_backend, bias):
    theirs = peer_file("open_clip", "loss.py").SigLipLoss()
    ours = open_clip.SigLipLoss(dist_impl="gather", backend=any_backend)
    device = device_of(any_backend)
    inputs = [*(unit(B, D, seed=i, device=device) for i in (0, 1)), torch.tensor(10.0, device=device)]
    if bias is None:
        same_values_and_gradients(lambda *x: ours(*x, None), lambda *x: theirs(*x, None), inputs, 10)
    else:
        same_values_and_gradients(ours, theirs, [*inputs, torch.tensor(bias, device=device)], 10)
    assert set(ours(*inputs, bias, output_dict=True)) == {"contrastive_loss"}


CLIP = [{"local_loss": local, "gather_with_grad": grad} for local in (False, True) for grad in (False, True)]


def clip_rank(rank, world):
    """On one rank: our loss and theirs for every combination of flags."""
    module, place = peer_file("open_clip", "loss.py"), {"rank": rank, "world_size": world}
    cases = [(kind.ClipLoss(**place, **flags), ()) for flags in CLIP for kind in (open_clip, module)]
    for way in ("bidir", "shift", "reduce", "gather"):
        cases += [(kind.SigLipLoss(**place, dist_impl=way), (torch.tensor(-5.0),)) for kind in (open_clip, module)]
    pairs = list(zip(cases[::2], cases[1::2], strict=True))
    for dtype, ((ours, more), (theirs, _)) in itertools.product((torch.float32, torch.float64), pairs):
        outcome = []
        for loss in (ours, theirs):
            leaves = [unit(4, D, seed=10 * rank + i, dtype=dtype).requires_grad_() for i in (0, 1)]
            leaves += [t.to(dtype, copy=True).requires_grad_() for t in (torch.tensor(8.0), *more)]
            value = loss(*leaves)
            outcome.append([value.detach(), *torch.autograd.grad(value, leaves)])
        for i, (got, want) in enumerate(zip(*outcome, strict=True)):
            where = f"rank {rank}: {type(ours).__name__}, part {i}"
            exact = dtype == torch.float64
            near = {"rtol": 1e-9, "atol": 1e-12} if exact else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(got, want, **near, msg=lambda m, where=where: f"{where}: {m}")


@pytest.mark.parametrize("world", [2, 3])
def test_losses_over_ranks_equal_those_of_open_clip(world, tmp_path):
    peer_file("open_clip", "loss.py")
    run_ranks(clip_rank, world, tmp_path)


# pytorch-metric-learning ------------------------------------------------------------------------------------------


def batch(device="cpu", n=24, classes=4):
    """Vectors that are not normalized and all different. The last class has one member, which has no positive."""
    labels = torch.arange(n, device=device) % classes
    labels[-1] = classes
    return 2.0 * unit(n, D, device=device, seed=3), labels


def queue_of(device="cpu", n=24, classes=4):
    return 0.5 * unit(n, D, device=device, seed=4), torch.arange(n, device=device) % classes


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize(
    "positive, negative",
    [pair for pair in itertools.product(("easy", "hard", "semihard"), repeat=2) if pair != ("semihard", "semihard")],
)
def test_batch_easy_hard_miner(any_backend, positive, negative, with_reference):
    theirs = peer("pytorch_metric_learning.miners").BatchEasyHardMiner(positive, negative)
    name = {"hard": "hardest", "easy": "easiest"}.get(negative, negative)
    device = device_of(any_backend)
    call = (*batch(device), *(queue_of(device) if with_reference else ()))
    got, want = NegmineMiner(positive, name, backend=any_backend)(*call), theirs(*call)
    assert len(want[0]) > 3
    for mine, other in zip(got, want, strict=True):
        assert torch.equal(mine, other)


def test_a_vector_of_norm_0_is_mined_without_nan():
    embeddings, labels = batch()
    embeddings[3] = 0.0
    a1, p, a2, n = NegmineMiner("hard", "hardest")(embeddings, labels)
    assert 3 in a1 and bool((labels[a1] == labels[p]).all()) and bool((labels[a2] != labels[n]).all())


def as_set(*indices):
    return set(zip(*(t.tolist() for t in indices), strict=True))


@pytest.mark.parametrize("with_reference", [False, True])
def test_multi_similarity_and_margin_miners(any_backend, with_reference):
    miners = peer("pytorch_metric_learning.miners")
    device = device_of(any_backend)
    call = (*batch(device), *(queue_of(device) if with_reference else ()))
    wide = {"max_positives": 8, "num_negatives": 20, "backend": any_backend}  # all of them
    got = NegmineMiner("multi_similarity", "multi_similarity", margin=0.1, **wide)(*call)
    want = miners.MultiSimilarityMiner(0.1)(*(t.clone() for t in call) if with_reference else call)
    assert as_set(*got[:2]) == as_set(*want[:2]) and as_set(*got[2:]) == as_set(*want[2:]) and len(got[0])
    for kind, name, margin in (
        ("semihard", "semihard_band", 0.2),
        ("all", "violating", 0.2),
        ("hard", "violating", 0.0),
    ):
        ours = NegmineMiner("all", name, margin=margin, distance="euclidean", triplets=True, **wide)
        want = miners.TripletMarginMiner(margin, kind)(*call)
        assert as_set(*ours(*call)) == as_set(*want) and len(want[0]), kind


@pytest.mark.parametrize("power", [1, 2])
def test_2p_distances_of_unnormalised_embeddings(any_backend, power):
    """Their miners and their multi-similarity loss with LpDistance(normalize_embeddings=False)."""
    device = device_of(any_backend)
    own = torch.arange(24, device=device)
    distance = peer("pytorch_metric_learning.distances").LpDistance(normalize_embeddings=False, power=power)
    miners, losses = peer("pytorch_metric_learning.miners"), peer("pytorch_metric_learning.losses")
    embeddings, labels = batch(device)
    embeddings = embeddings * torch.linspace(0.3, 2, 24, device=device)[:, None] + 1
    kind = {"distance": "euclidean" if power == 1 else "squared_euclidean", "backend": any_backend}
    wide = {"max_positives": 8, "num_negatives": 20, "triplets": True, "normalize_embeddings": False, **kind}
    for name in ("semihard", "all"):
        rule = {"semihard": "semihard_band", "all": "violating"}[name]
        want = miners.TripletMarginMiner(0.5, name, distance=distance)(embeddings, labels)
        assert as_set(*NegmineMiner("all", rule, margin=0.5, **wide)(embeddings, labels)) == as_set(*want), name
    pairs = miners.MultiSimilarityMiner(0.5, distance=distance)(embeddings, labels)
    theirs, ours = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    losses.MultiSimilarityLoss(2.0, 5.0, 0.5, distance=distance)(theirs, labels, pairs).backward()
    call = {"alpha": 2.0, "beta": 5.0, "epsilon": 0.5, "query_ids": own, "key_ids": own, **kind}
    negmine.losses.multi_similarity(ours, ours, labels, labels, **call).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_mined_tuples_go_into_their_losses():
    losses = peer("pytorch_metric_learning.losses")
    embeddings, labels = batch()
    embeddings.requires_grad_()
    found = negmine.losses.mine_triplets(
        *(torch.nn.functional.normalize(embeddings.detach()),) * 2,
        *(labels,) * 2,
        **dict.fromkeys(("query_ids", "key_ids"), torch.arange(24)),
    )
    distances = torch.cdist(*(torch.nn.functional.normalize(embeddings),) * 2)
    a, p, n = found.compact()
    violation = (distances[a, p] - distances[a, n] + 0.05).clamp_min(0)
    want = violation.sum() / (violation > 0).sum()  # their mean is over the triplets with a loss above 0
    for triplets in (False, True):
        got = losses.TripletMarginLoss()(embeddings, labels, NegmineMiner(triplets=triplets)(embeddings, labels))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert bool(torch.autograd.grad(got, embeddings)[0].isfinite().all())


@pytest.mark.parametrize("rows", [7, 16, 18])
@pytest.mark.parametrize("loss", ["ContrastiveLoss", "MultiSimilarityLoss", "TripletMarginLoss"])
def test_cross_batch_memory_with_their_losses(loss, rows):
    """The loss of every step is the same with and without a miner, and also when a batch wraps around the end of the memory."""
    module, miners = peer("pytorch_metric_learning.losses"), peer("pytorch_metric_learning.miners")
    for miner in (None, miners.MultiSimilarityMiner()):
        ours = CrossBatchMemory(getattr(module, loss)(), D, 18, miner)
        theirs = module.CrossBatchMemory(getattr(module, loss)(), D, 18, miner)
        for step in range(4):
            embeddings, labels = unit(rows, D, seed=step), (torch.arange(rows) + step) % 3
            got, want = ours(embeddings, labels), theirs(embeddings, labels)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            assert torch.equal(ours.memory.keys, theirs.embedding_memory[: len(ours.memory.keys)])


def test_cross_batch_memory_with_a_mask_of_what_enters():
    module = peer("pytorch_metric_learning.losses")
    ours, theirs = (kind(module.ContrastiveLoss(), D, 18) for kind in (CrossBatchMemory, module.CrossBatchMemory))
    mask = torch.arange(10) % 2 == 0
    for step in range(5):
        call = unit(10, D, seed=step), torch.arange(10) % 3
        torch.testing.assert_close(ours(*call, enqueue_mask=mask), theirs(*call, enqueue_mask=mask))


class Recorder(torch.nn.Module):
    """A loss that stores the index tuple that it is called with."""

    def forward(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        self.seen = as_set(*indices_tuple[:2])
        return embeddings.sum()


def test_a_batch_of_one_is_not_its_own_positive(monkeypatch):
    """pytorch-metric-learning treats a batch of one as if it filled the memory, and keeps the pair of the row with itself."""
    module = peer("pytorch_metric_learning.losses")
    monkeypatch.setattr(module.CrossBatchMemory, "supported_losses", staticmethod(lambda: ["Recorder"]))
    ours, theirs = (kind(Recorder(), D, 8) for kind in (CrossBatchMemory, module.CrossBatchMemory))
    for step, pairs in enumerate([set(), {(0, 0)}]):
        for memory in (ours, theirs):
            memory(unit(1, D, seed=step), torch.zeros(1, dtype=torch.long))
        assert ours.loss.seen == pairs
        assert theirs.loss.seen == pairs | {(0, step)}


def test_a_loaded_memory_continues_at_its_position():
    """In pytorch-metric-learning, the pointer and the flag are plain attributes, so the memory starts again after loading."""
    module = peer("pytorch_metric_learning.losses")
    steps = [(unit(5, D, seed=step), torch.arange(5) % 3) for step in range(3)]
    kinds = {"ours": CrossBatchMemory, "theirs": module.CrossBatchMemory}
    resumed, straight = {}, {}
    for name, kind in kinds.items():
        memory = kind(module.ContrastiveLoss(), D, 18)
        for step in steps[:2]:
            memory(*step)
        again = kind(module.ContrastiveLoss(), D, 18)
        again.load_state_dict(memory.state_dict())
        resumed[name], straight[name] = again(*steps[2]), memory(*steps[2])
    assert torch.equal(resumed["ours"], straight["ours"])
    assert not torch.equal(resumed["theirs"], straight["theirs"])


def test_cross_batch_memory_with_a_negmine_loss(any_backend):
    """The loss over the memory does not include the row itself, wherever it is in the memory."""
    device = device_of(any_backend)
    memory = CrossBatchMemory(negmine.MultiSimilarityLoss(backend=any_backend), D, 16).to(device)
    for step in range(3):
        embeddings = unit(6, D, seed=step, device=device).requires_grad_()
        labels = torch.arange(6, device=device) % 3
        loss = memory(embeddings, labels)
        stored = memory.memory.keys
        own = (embeddings.detach()[:, None] == stored[None]).all(2)  # (B, K)
        assert bool((own.sum(1) == 1).all())
        want = negmine.losses.multi_similarity(
            embeddings.detach().double(), stored.double(), labels, memory.memory.labels, key_mask=~own
        )
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
        (grad,) = torch.autograd.grad(loss, embeddings)
        assert bool(grad.isfinite().all())


# Refusals ---------------------------------------------------------------------------------------------------------


def test_3g_a_label_of_minus_one_is_a_class(any_backend):
    """As in pytorch-metric-learning; in negmine's own functions, -1 means unknown."""
    theirs = peer("pytorch_metric_learning.miners").BatchHardMiner()
    device = device_of(any_backend)
    embeddings, labels = unit(6, D, device=device), torch.tensor([-1, -1, -1, 2, 2, 2], device=device)
    got = NegmineMiner("hard", "hardest", triplets=True, backend=any_backend)(embeddings, labels)
    assert len(got[0]) == 6 and as_set(*got) == as_set(*theirs(embeddings, labels))
    values = []
    for classes in (labels, labels + 7):
        memory = CrossBatchMemory(negmine.MultiSimilarityLoss(backend=any_backend), D, 16).to(device)
        values += [memory(embeddings, classes) + memory(embeddings, classes)]
    assert torch.equal(*values)


def test_3h_reset_queue_forgets_what_is_stored():
    memory, fresh = (CrossBatchMemory(negmine.SupConLoss(), D, 16) for _ in range(2))
    memory(unit(6, D), torch.arange(6) % 3)
    memory.reset_queue()
    call = unit(6, D, seed=1), torch.arange(6) % 3
    assert len(memory.memory) == 0 and torch.equal(memory(*call), fresh(*call))


e0, l0 = torch.randn(4, D), torch.arange(4)
memory = CrossBatchMemory(negmine.SupConLoss(), D, 8)
REFUSALS = [
    (lightly.NTXentLoss, (0.0,), {}, ValueError, "NTXentLoss: temperature must be a number above 0"),
    (lightly.NTXentLoss, (), {"memory_bank_size": 64}, ValueError, "memory_bank_size must be 0 or (rows, dim), got 64"),
    (lightly.NTXentLoss, (), {"memory_bank_size": (64, 0)}, ValueError, "memory_bank_size must be 0 or (rows, dim)"),
    (lightly.NTXentLoss, (), {"gather_distributed": 1}, TypeError, "NTXentLoss: gather_distributed must be True or"),
    (lightly.NTXentLoss(), (e0, e0[:2]), {}, ValueError, "NTXentLoss: out1 must be of out0's shape (4, 8)"),
    (lightly.DCLLoss(), (e0.long(), e0), {}, TypeError, "DCLLoss: out0 must be a floating tensor"),
    (lightly.DCLWLoss, (), {"gather_distributed": 1}, TypeError, "DCLWLoss: gather_distributed must be True or False"),
    (lightly.DCLLoss, (-1.0,), {}, ValueError, "DCLLoss: temperature must be a number above 0"),
    (open_clip.ClipLoss, (), {"use_horovod": True}, ValueError, "ClipLoss: use_horovod must be False"),
    (open_clip.ClipLoss, (), {"world_size": 0}, ValueError, "ClipLoss: world_size must be an int of 1 or more"),
    (open_clip.ClipLoss, (), {"rank": -1}, ValueError, "ClipLoss: rank must be an int of 0 or more"),
    (open_clip.ClipLoss(), (e0, e0[:2], 1.0), {}, ValueError, "text_features must be of image_features' shape (4, 8)"),
    (open_clip.SigLipLoss, (), {"world_size": 0}, ValueError, "SigLipLoss: world_size must be an int of 1 or more"),
    (open_clip.SigLipLoss, (), {"rank": -1}, ValueError, "SigLipLoss: rank must be an int of 0 or more"),
    (open_clip.SigLipLoss, (), {"dist_impl": "ring"}, ValueError, "dist_impl must be 'bidir' or 'shift'"),
    (open_clip.SigLipLoss(), (e0, l0, 1.0, 0.0), {}, TypeError, "text_features must be a floating tensor"),
    (NegmineMiner, ("hardest",), {}, ValueError, "NegmineMiner: positive must be 'easy' or 'hard'"),
    (NegmineMiner, (), {"triplets": 1}, TypeError, "NegmineMiner: triplets must be True or False"),
    (NegmineMiner, (), {"seed": -1}, ValueError, "NegmineMiner: seed must be an int"),
    (NegmineMiner(), (e0, l0, e0), {}, ValueError, "NegmineMiner: ref_labels must be given together with ref_emb"),
    (
        NegmineMiner(),
        (e0, l0, None, l0),
        {},
        ValueError,
        "NegmineMiner: ref_emb must be given together with ref_labels",
    ),
    (NegmineMiner(), (l0, l0), {}, TypeError, "NegmineMiner: embeddings must be a floating tensor"),
    (CrossBatchMemory, ("loss", D), {}, TypeError, "CrossBatchMemory: loss must be a loss module"),
    (
        CrossBatchMemory,
        (negmine.TripletLoss(), D, 8, NegmineMiner()),
        {},
        ValueError,
        "miner must be None with a negmine",
    ),
    (DistributedLossWrapper, (negmine.SupConLoss(),), {}, TypeError, "loss must be a CrossBatchMemory of this module"),
    (DistributedLossWrapper, (memory, True), {}, ValueError, "efficient must be False with a CrossBatchMemory"),
    (memory, (e0, l0, (l0, l0, l0)), {}, ValueError, "indices_tuple must be None: the pairs come from the miner"),
    (memory, (e0, l0), {"enqueue_mask": l0}, ValueError, "enqueue_mask must be a bool tensor of shape (4,)"),
    (memory, (e0[:, :3], l0), {}, ValueError, "embeddings must be of shape (B, D) with query's D = 8"),
]


@pytest.mark.parametrize("function, arguments, options, error, words", REFUSALS, ids=[r[-1][:50] for r in REFUSALS])
def test_refusal(function, arguments, options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        function(*arguments, **options)
