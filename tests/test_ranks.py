"""Collective calls with 2 and 3 ranks: invalid arguments on one rank in every call, and losses with the negatives of all ranks.

For each number of ranks, the processes are started once and run all cases of this file one after the other. So a case also shows
that the previous one left all ranks in the same state.
"""

import ast
import contextlib
import copy
import functools
import itertools
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import negmine
from negmine import Mix, MoCoQueue, Negatives, Select
from negmine.adapters import lightly as adapted
from negmine.adapters import sentence_transformers
from negmine.adapters.pytorch_metric_learning import CrossBatchMemory, DistributedLossWrapper
from negmine.collectives import Ranks
from negmine.losses import gathered
from negmine.mining import mining_rounds, scan
from negmine.mining.process_ranks import ProcessRanks
from negmine.queues import ShardedMoCoQueue
from tests import long_run
from tests.cases import ids, unit
from tests.patched import teacher_forced
from tests.ranks import kill_ranks, run_ranks
from tests.test_patches import same_logs, symmetric
from tests.test_sentence_transformers_losses import EVERY, Model, columns

D, K, B = 6, 24, 4
WORLDS = [2, 3]
PACKAGE = Path(negmine.__file__).parent


# One bad rank -----------------------------------------------------------------------------------------------------


def shared_queue(**options):
    return MoCoQueue(D, K, random_init=False, gather_distributed=True, **options)


def sharded_queue(**options):
    queue = ShardedMoCoQueue(D, K, with_labels=True, random_init=False, **options)
    queue.enqueue(unit(5, D))
    return queue


def diverged(bad):
    """A queue whose counters differ on one rank, as after loading a checkpoint only there."""
    queue = shared_queue()
    queue.queue_ptr += bad
    queue.enqueue(unit(2, D))


def load(bad, **changes):
    queue = sharded_queue()
    state = dict(queue.state_dict(), **(changes if bad else {}))
    queue.load_state_dict(state)


def load_shards(bad, **changes):
    states = [None] * dist.get_world_size()
    queue = sharded_queue()
    dist.all_gather_object(states, dict(queue.state_dict()))
    queue.load_shards([dict(state, **(changes if bad else {})) for state in states])


def mine(bad, **changes):
    rank = dist.get_rank()
    group = dist.group.WORLD
    call = {"num_negatives": 2, "process_group": group, **(changes if bad else {})}
    negmine.mine_hard_negatives(unit(3, D), call.pop("corpus", unit(9, D, seed=rank)), [0, 1, 2], **call)


def rounds(bad, **changes):
    def embed(number):
        if bad and not changes:
            raise RuntimeError("no model to embed with")
        return unit(3, D), unit(9, D, seed=dist.get_rank())

    call = {"rounds": 2, "num_negatives": 2, "process_group": dist.group.WORLD, **(changes if bad else {})}
    mining_rounds(embed, lambda number, result: None, [0, 1, 2], **call)


def out_of_memory(bad):
    def scored(*arguments):
        if bad:
            raise MemoryError("no memory for the scores")
        return hardest_rows(*arguments)

    hardest_rows, scan.hardest_rows = scan.hardest_rows, scored
    try:
        mine(False)
    finally:
        scan.hardest_rows = hardest_rows


def paired(loss, bad, query=None, negative_keys=None, **masks):
    good = unit(B, D, seed=1).requires_grad_()
    loss(good if query is None or not bad else query, unit(B, D, seed=2), negative_keys, **(masks if bad else {}))


def labelled(loss, bad, **changes):
    rows, labels = unit(B, D, seed=1).requires_grad_(), torch.arange(B) % 2
    call = {"query": rows, "keys": rows, "query_labels": labels, "key_labels": labels, **(changes if bad else {})}
    loss(**call)


def everyone(bad):
    return torch.ones(B, B * dist.get_world_size() + bad, dtype=torch.bool)


def memory_over_ranks():
    return DistributedLossWrapper(CrossBatchMemory(negmine.SupConLoss(), D, 20))


GATHER = {"gather_distributed": True}
# name: (a function of `bad`, which is true on one rank; part of the error message of that rank, or None if the ranks only differ)
BAD = {
    "3a enqueue: width": (lambda bad: shared_queue().enqueue(unit(2, D + bad)), "keys must be of shape (B, D)"),
    "3a enqueue: None": (lambda bad: shared_queue().enqueue(None if bad else unit(2, D)), "keys must be a tensor"),
    "3a enqueue, sharded: width": (
        lambda bad: sharded_queue().enqueue(unit(2, D + bad)),
        "keys must be of shape (B, D)",
    ),
    "3a enqueue, sharded: labels": (
        lambda bad: sharded_queue().enqueue(unit(2, D), labels=torch.arange(2 + bad)),
        "labels must be an integer tensor of shape (2,)",
    ),
    "3a mining: no negatives": (lambda bad: mine(bad, num_negatives=0), "num_negatives must be an int of 1 or more"),
    "3a mining: resume_dir": (lambda bad: mine(bad, resume_dir="run"), None),
    "3a info_nce, sharded: query": (
        lambda bad: sharded_queue().info_nce(unit(2, D).long() if bad else unit(2, D), unit(2, D)),
        "query must be a floating tensor",
    ),
    "3a mine_hardest, sharded: N": (lambda bad: sharded_queue().mine_hardest(unit(2, D), 0 if bad else 3), "N must be"),
    "3a gathered: None": (lambda bad: gathered(None if bad else unit(2, D)), "rows must be a tensor"),
    "3a InfoNCELoss: query": (
        lambda bad: paired(negmine.InfoNCELoss(**GATHER), bad, query=torch.arange(4)),
        "query must be a floating tensor",
    ),
    "3a InfoNCELoss: mask": (  # found only after the rows are gathered
        lambda bad: paired(negmine.InfoNCELoss(**GATHER), False, negative_keys=Negatives(None, mask=everyone(bad))),
        "mask must be of shape",
    ),
    "3a SigLIPLoss: ids": (
        lambda bad: paired(negmine.SigLIPLoss(**GATHER), bad, query_ids=torch.arange(B + 1)),
        "query_ids must be an integer tensor",
    ),
    "3a SupConLoss: keys": (
        lambda bad: labelled(negmine.SupConLoss(**GATHER), bad, keys=None),
        "keys must be a tensor",
    ),
    "3a TripletLoss: labels": (
        lambda bad: labelled(negmine.TripletLoss(**GATHER), bad, key_labels=torch.ones(B)),
        "key_labels must be an integer tensor",
    ),
    "3a MultiSimilarityLoss: labels": (  # found only after the keys are gathered
        lambda bad: labelled(negmine.MultiSimilarityLoss(**GATHER), bad, query_labels=torch.arange(B + 1)),
        "query_labels must be of shape (4,)",
    ),
    "3a DistributedLossWrapper: labels": (
        lambda bad: memory_over_ranks()(unit(B, D), torch.arange(B + bad)),
        "labels must be of shape (4,)",
    ),
    "3a DistributedLossWrapper: indices": (  # found only after the rows are gathered
        lambda bad: memory_over_ranks()(unit(B, D), torch.arange(B), (1,) if bad else None),
        "indices_tuple must be None",
    ),
    "3b mining: dtypes": (lambda bad: mine(bad, deduplicate="near", corpus=unit(9, D).half()), None),
    "3b mining: seeds": (lambda bad: mine(bad, seed=1), None),
    "3a rounds: rounds": (lambda bad: rounds(bad, rounds=0), "rounds must be an int of 1 or more"),
    "3a rounds: embed fails": (rounds, "no model to embed with"),
    "3b rounds: keep_old": (lambda bad: rounds(bad, keep_old=1), None),
    "3b InfoNCELoss: dtypes": (
        lambda bad: paired(negmine.InfoNCELoss(**GATHER), bad, query=unit(B, D).bfloat16()),
        None,
    ),
    "3b InfoNCELoss: options": (
        lambda bad: paired(negmine.InfoNCELoss(select=Select(0, 3 + bad), **GATHER), bad),
        None,
    ),
    "3b InfoNCELoss: no gradient": (lambda bad: paired(negmine.InfoNCELoss(**GATHER), bad, query=unit(B, D)), None),
    "3b enqueue: ids": (
        lambda bad: shared_queue(with_ids=True).enqueue(unit(2, D), ids=torch.arange(2) if bad else None),
        None,
    ),
    "3c temperatures": (
        lambda bad: sharded_queue().info_nce(unit(2, D), unit(2, D), temperature=torch.tensor(0.5 if bad else 0.1)),
        None,
    ),
    **{
        f"3d load_shards: {name} {value}": (
            lambda bad, change={name: value}: load_shards(bad, **change),
            f"states: {name} must be an integer from 0 to",
        )
        for name, value in (
            ("queue_len", torch.tensor([99])),
            ("queue_len", torch.tensor([-5])),
            ("queue_len", torch.tensor([2**40])),
            ("queue_ptr", torch.tensor([99])),
            ("queue_ptr", torch.tensor([torch.nan])),
            ("queue_ptr", "1"),
        )
    },
    "3d load_shards: range": (lambda bad: load_shards(bad, queue_range=torch.zeros(3)), "states: queue_range must be"),
    "3d load_state_dict: counter": (
        lambda bad: load(bad, queue_ptr=torch.tensor([K])),
        "queue_ptr must be an integer from 0 to 23",
    ),
    "3d load_state_dict: range": (
        lambda bad: load(bad, queue_range=torch.tensor([1, 2, K])),
        "use load_shards to load",
    ),
    "3e constructor: K": (lambda bad: MoCoQueue(D, K + bad, **GATHER), None),
    "3e constructor: dtype": (lambda bad: MoCoQueue(D, K, dtype=torch.float16 if bad else None, **GATHER), None),
    "3e constructor, sharded: K": (lambda bad: ShardedMoCoQueue(D, K + bad), None),
    "3e constructor, sharded: dim": (
        lambda bad: ShardedMoCoQueue(0 if bad else D, K),
        "dim must be an int of 1 or more",
    ),
    "3e constructor, sharded: ids": (lambda bad: ShardedMoCoQueue(D, K, with_ids=bool(bad)), None),
    "3e diverged counters": (diverged, None),
    "3e another function": (
        lambda bad: sharded_queue().enqueue(unit(2, D)) if bad else sharded_queue().mine_hardest(unit(2, D), 2),
        None,
    ),
    "3f out of memory": (out_of_memory, "no memory for the scores"),
}


def bad_calls(rank, world, folder):
    """Return the errors on this rank of all calls in BAD, where the last rank is bad, and where ranks checked for agreement."""
    said, sites = {}, set()
    entries = {(Ranks, "agreement"): Ranks.agreement, (ProcessRanks, "together"): ProcessRanks.together}
    assert {name for _, name in entries} == AGREEING

    def recorded(entry):
        def wrapped(*arguments):
            code = sys._getframe(1).f_code
            sites.add((Path(code.co_filename).relative_to(PACKAGE).as_posix(), code.co_name))
            return entry(*arguments)

        return wrapped

    for (kind, name), entry in entries.items():
        setattr(kind, name, recorded(entry))
    for name, (call, _) in BAD.items():
        said[name] = "nothing was refused"
        try:
            call(rank == world - 1)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    for (kind, name), entry in entries.items():
        setattr(kind, name, entry)
    return said, sites


AGREEING = {"agreement", "together"}  # methods of Ranks and ProcessRanks


@functools.cache
def agreements():
    """Return (file, function) of all calls of AGREEING in the package."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in AGREEING:
                    found.add((path.relative_to(PACKAGE).as_posix(), function.name))
    return found


# The negatives of all ranks ---------------------------------------------------------------------------------------

# name: (module of a loss over the batches of all ranks, names of the arguments of its call)
OVER_RANKS = {
    "in batch": (lambda **g: negmine.InfoNCELoss(0.2, **g), {}),
    "decoupled": (lambda **g: negmine.recipes.decoupled(0.2, **g), {}),
    "ids": (lambda **g: negmine.InfoNCELoss(0.2, **g), {"query_ids"}),
    "labels": (lambda **g: negmine.InfoNCELoss(0.2, **g), {"query_labels"}),
    "window": (lambda **g: negmine.InfoNCELoss(0.2, select=Select(0.1, 0.6), **g), {"query_ids"}),
    "mixed": (lambda **g: negmine.InfoNCELoss(0.2, mix=Mix(4, 3, 2), seed=1, **g), {}),
    "keys": (lambda **g: negmine.InfoNCELoss(0.2, **g), {"keys"}),
    "keys with ids": (lambda **g: negmine.InfoNCELoss(0.2, **g), {"keys", "query_ids"}),
    "pools": (lambda **g: negmine.InfoNCELoss(0.2, **g), {"pools"}),
    "pools with ids": (lambda **g: negmine.InfoNCELoss(0.2, **g), {"pools", "query_ids"}),
    "guide": (lambda **g: negmine.InfoNCELoss(0.2, **g), {"guide"}),
    "sigmoids": (lambda **g: negmine.SigLIPLoss(5.0, -3.0, **g), {}),
    "SupCon": (lambda **g: negmine.SupConLoss(0.2, **g), "labelled"),
    "SupCon, in": (lambda **g: negmine.SupConLoss(0.2, positives="in", denominator="own_positive", **g), "labelled"),
    "SupCon, own": (lambda **g: negmine.SupConLoss(0.2, **g), "own"),
    "SupCon, views": (lambda **g: negmine.SupConLoss(0.2, **g), "views"),
    "triplets": (lambda **g: negmine.TripletLoss(0.5, positive="hard", negative="hardest", **g), "labelled"),
    "multi-similarity": (lambda **g: negmine.MultiSimilarityLoss(**g), "labelled"),
}


def gradients(name, rows, world):
    """Return the loss of these rows of the global batch, and the gradient of a layer, averaged over the ranks."""
    make, given = OVER_RANKS[name]
    torch.manual_seed(3)
    layer = nn.Linear(D, D, bias=False)
    loss = make(gather_distributed=dist.is_initialized())
    number = ids(world * B, 0, seed=2)["query_ids"]
    number[1] = number[B] = -1  # unknown, so equal to nothing; the row's own positive is known anyway
    image, number = unit(world * B, D, seed=7)[rows], number[rows]
    query, key = (nn.functional.normalize(layer(image * (1 + 0.1 * i)), dim=1) for i in range(2))
    if given == "labelled":
        own = torch.arange(world * B)[rows]
        value = loss(query, query, number % 2, number % 2, query_ids=own, key_ids=own)
    elif given in ("own", "views"):
        value = loss(query, None, number % 2) if given == "own" else loss(torch.stack([query, key], 1), None)
    else:
        masks = {tag: number for tag in ("query_ids", "query_labels") if tag in given}
        keys = Negatives(nn.functional.normalize(layer(image + 1), dim=1), ids=number if masks else None)
        bias = image[:, 0].detach().clone()  # of the keys
        columns = {
            "keys": keys,
            "pools": [None, Negatives(keys.keys, ids=keys.ids, bias=bias), Negatives(None, select=Select(0, 5))],
            "guide": Negatives(None, guide=negmine.Guide(image, image * 0.5, image * 0.5, margin=0.1)),
        }
        value = loss(query, key, next((columns[name] for name in given if name in columns), None), **masks)
    value.backward()
    return value.detach(), layer.weight.grad


def over_ranks(rank, world, folder):
    out = {}
    for name in OVER_RANKS:
        value, grad = gradients(name, slice(rank * B, rank * B + B), world)
        dist.all_reduce(grad)
        dist.all_reduce(value)
        out[name] = value / world, grad / world
    # Different batch sizes: the sum over the global batch, and the gradient of a gathered tensor.
    rows = torch.arange(3.0 + rank).requires_grad_()
    (gathered(rows[:, None]).square().sum() * (rank + 1)).backward()
    out["ragged"] = rows.grad
    return out


# Queues under DistributedDataParallel -----------------------------------------------------------------------------


class WithQueue(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, D)
        self.queue = ShardedMoCoQueue(D, K, with_ids=True, seed=4)

    def forward(self, image):
        query = nn.functional.normalize(self.layer(image), dim=1)
        loss = self.queue.info_nce(query, image, temperature=0.2)
        self.queue.enqueue(image, ids=torch.arange(len(image)))
        return loss


def under_ddp(rank, world, folder):
    model = DistributedDataParallel(WithQueue())
    before = model.module.queue.queue.clone()
    model(unit(B, D, seed=rank)).backward()  # broadcasts the buffers
    model.module.double().float()
    queue = model.module.queue
    return before, dict(queue.state_dict()), [name for name, _ in queue.named_buffers()]


# Published training code and its patches ---------------------------------------------------------------------------


def patches(rank, world, folder):
    log, models = teacher_forced(5, rank, DistributedDataParallel)
    return log, models["ours"].queue.queue, symmetric(rank)


# Distributed checkpoints ------------------------------------------------------------------------------------------


def models_with_queues(seed=0):
    torch.manual_seed(seed)
    model = nn.Module()
    model.layer = nn.Linear(D, D)
    # Not a multiple of the number of ranks.
    model.sharded = ShardedMoCoQueue(D, K + 1, with_ids=True, random_init=False)
    model.shared = MoCoQueue(D, K, gather_distributed=True)
    return model


def through_a_checkpoint(rank, world, folder):
    results, model = [], models_with_queues()
    for _ in range(5):
        rows = unit(B, D, seed=rank)
        model.sharded.enqueue(rows, ids=torch.arange(B) + 10 * rank)
        model.shared.enqueue(rows)
    for given in (model, models_with_queues(seed=1)):
        fully_shard(given.layer)
        state = negmine.queues.distributed_state_dict(given)
        (checkpoint.load if results else checkpoint.save)(state, checkpoint_id=f"{folder}/checkpoint")
        given.load_state_dict(state)  # also accepts distributed tensors
        queue = given.sharded
        whole = given.layer.weight.full_tensor().detach()
        results.append([t.clone() for t in (queue.queue, queue.queue_ids, given.shared.queue, whole, queue.queue_ptr)])
    return *results, f"{folder}/checkpoint"


# Copies and compilation -------------------------------------------------------------------------------------------


def copies(rank, world, folder):
    """Deep copies of modules with a process group, as for an EMA model, have the same group. Pickling them is an error."""
    group, losses = dist.new_group(list(range(world))), []
    for make in (MoCoQueue, ShardedMoCoQueue):
        queue = make(D, K, process_group=group, **(GATHER if make is MoCoQueue else {}))
        copied = copy.deepcopy(nn.ModuleList([queue]))[0]
        copied.enqueue(unit(B, D, seed=rank))
        assert copied.process_group is group and int(copied.queue_ptr) == world * B and int(queue.queue_ptr) == 0
        with pytest.raises(TypeError, match=r"a module with a process_group cannot be pickled; save its state_dict"):
            pickle.dumps(queue)
    for make in (negmine.InfoNCELoss, negmine.SigLIPLoss):
        loss, call = make(process_group=group, **GATHER), (unit(B, D, seed=rank), unit(B, D, seed=9 + rank))
        losses.append((copy.deepcopy(loss)(*call).detach(), loss(*call).detach()))
    return losses


def compiled(rank, world, folder):
    """Return losses of a compiled step and of the same step uncompiled, and the number of graphs after each step."""
    torch._dynamo.reset()
    counter, made = CompileCounter(), []
    layer, loss = nn.Linear(D, D), negmine.InfoNCELoss(**GATHER)

    def step(rows):
        return loss(layer(rows), rows)

    faster = torch.compile(step, backend=counter)
    for number in range(6):
        rows = unit(B, D, seed=10 * number + rank)
        value = faster(rows)
        value.backward()
        made.append((value.detach(), step(rows).detach(), counter.frame_count))
    return made


# Adapters ---------------------------------------------------------------------------------------------------------


def of_peers():
    """Return {name: (ours, theirs)} for losses of installed packages that gather over ranks themselves."""
    pairs = {}
    with contextlib.suppress(ImportError):
        import lightly.loss as theirs

        for name in ("DCLLoss", "DCLWLoss", "NTXentLoss"):
            pairs[name] = [getattr(module, name)(0.3, **GATHER) for module in (adapted, theirs)]
    with contextlib.suppress(ImportError):
        from pytorch_metric_learning import losses
        from pytorch_metric_learning.utils.distributed import DistributedLossWrapper as TheirWrapper

        ours = DistributedLossWrapper(CrossBatchMemory(losses.ContrastiveLoss(), D, 20))
        pairs["CrossBatchMemory"] = [ours, TheirWrapper(losses.CrossBatchMemory(losses.ContrastiveLoss(), D, 20))]
    return pairs


def adapters(rank, world, folder):
    """Return losses and gradients of a few steps, ours and theirs."""
    out = {}
    for name, pair in of_peers().items():
        for step in range(4):
            made = []
            for loss in pair:
                rows = unit(B, D, seed=10 * step + rank).requires_grad_()
                other = torch.arange(B) % 3 if name == "CrossBatchMemory" else unit(B, D, seed=99 - rank)
                value = loss(rows, other)
                made.append([value.detach(), *torch.autograd.grad(value, rows)])
            out[name, step] = made
    return out


def text_losses(rank, world, folder):
    """Return loss and gradient of a model under DistributedDataParallel, and of one process with the batches of all ranks."""
    every = columns(2, batch=world * B)
    own = [{name: rows[rank * B : (rank + 1) * B] for name, rows in column.items()} for column in every]
    out = {}
    for name, cached in itertools.product(("MultipleNegativesRankingLoss", "GISTEmbedLoss"), ("", "Cached")):
        options = {"directions": EVERY} if "Ranking" in name else {"guide": Model(2), "contrast_anchors": False}
        options |= {"mini_batch_size": 3} if cached else {}
        made = []
        for features, gather in ((own, True), (every, False)):
            model = Model(1)
            loss = getattr(sentence_transformers, cached + name)(model, **options, gather_across_devices=gather)
            loss.model = DistributedDataParallel(model) if gather else model
            value = loss(features)
            value.backward()
            made.append([gathered(value.detach()[None]).mean(), model.table.weight.grad])
        out[cached + name, ""] = made
    return out


def with_memory(rank, world, folder):
    """Return the loss of a negmine loss in a CrossBatchMemory over the ranks, and its gradient, averaged over the ranks."""
    loss, out = memory_over_ranks(), []
    for step in range(3):
        rows = unit(B, D, seed=10 * step + rank).requires_grad_()
        value = loss(rows, torch.arange(B) % 3) / world
        out.append((value.detach(), *torch.autograd.grad(value, rows)))
    return out


def straight_run(rank, world, folder):
    own = folder / "straight"
    own.mkdir(exist_ok=True)
    return long_run.run(rank, world, own, killed=False)


CASES = {
    "straight": straight_run,
    "adapters": adapters,
    "text losses": text_losses,
    "checkpoint": through_a_checkpoint,
    "patches": patches,
    "bad": bad_calls,
    "over ranks": over_ranks,
    "ddp": under_ddp,
    "memory": with_memory,
    "copies": copies,
    "compiled": compiled,
}


def all_cases(rank, world, folder):
    return {name: case(rank, world, folder) for name, case in CASES.items() if name != "compiled" or world == 2}


@pytest.fixture(params=WORLDS)
def got(request, tmp_path_factory):
    """Return the results of all ranks, by case."""
    if request.param not in answers:
        folder = tmp_path_factory.mktemp("ranks")
        answers[request.param] = run_ranks(all_cases, request.param, folder, folder)
    return answers[request.param]


answers: dict[int, list] = {}


def test_3_what_one_rank_refuses_every_rank_raises(got):
    bad = len(got) - 1
    for name, (_, own) in BAD.items():
        for rank, answer in enumerate(got):
            said = answer["bad"][0][name]
            assert said != "nothing was refused", (name, rank)
            if own is not None and rank == bad:
                assert own in said, (name, said)
            else:
                assert f"rank {bad}" in said, (name, rank, said)
                assert said.startswith(
                    "RuntimeError" if "memory" in name or "load_state" in name or "fails" in name else "ValueError"
                ), said


def test_3_every_agreement_of_the_package_has_a_bad_rank(got):
    made = agreements()
    assert len(made) > 8 and made <= got[0]["bad"][1], made - got[0]["bad"][1]


def test_ranks_have_the_loss_and_gradient_of_one_process(got):
    world = len(got)
    for name in OVER_RANKS:
        want = gradients(name, slice(0, world * B), world)
        for rank in range(world):
            for mine, other in zip(got[rank]["over ranks"][name], want, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for rank in range(world):
        rows = torch.arange(3.0 + rank)
        assert torch.equal(got[rank]["over ranks"]["ragged"], 2 * rows * sum(range(1, world + 1)))


def test_ranks_keep_their_rows_under_ddp(got):
    world = len(got)
    twin = MoCoQueue(D, K, with_ids=True)
    twin.queue.copy_(torch.cat([answer["ddp"][0] for answer in got]))
    for rank in range(world):
        twin.enqueue(unit(B, D, seed=rank), ids=torch.arange(B))
    assert torch.equal(torch.cat([answer["ddp"][1]["queue"] for answer in got]), twin.queue)
    assert torch.equal(torch.cat([answer["ddp"][1]["queue_ids"] for answer in got]), twin.queue_ids)
    assert all(answer["ddp"][2] == ["queue_ptr", "queue_len", "num_refused"] for answer in got)


def test_a_memory_over_ranks_has_the_loss_of_one_process(got):
    world, alone = len(got), CrossBatchMemory(negmine.SupConLoss(), D, 20)
    for step in range(3):
        rows = torch.cat([unit(B, D, seed=10 * step + rank) for rank in range(world)]).requires_grad_()
        value = alone(rows, (torch.arange(B) % 3).repeat(world))
        (grad,) = torch.autograd.grad(value, rows)
        for answer, own in zip(got, grad.split(B), strict=True):
            torch.testing.assert_close(answer["memory"][step], (value.detach(), own), rtol=1e-5, atol=1e-6)


def test_copies_belong_to_the_group_of_what_they_copy(got):
    assert all(torch.equal(*pair) for answer in got for pair in answer["copies"])


@pytest.mark.parametrize("got", [2], indirect=True)  # the graph is the same for any number of ranks
def test_a_compiled_step_over_ranks_has_the_same_graphs_at_every_step(got):
    for answer in got:
        for number, (ours, plain, count) in enumerate(answer["compiled"]):
            torch.testing.assert_close(ours, plain)
            assert number == 0 or count == answer["compiled"][1][2]


def test_2e_ranks_run_the_patches_as_they_run_what_they_patch(got):
    for answer in got:
        log, queue, (theirs, ours) = answer["patches"]
        same_logs(log)
        assert torch.equal(queue, got[0]["patches"][1])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_3_distributed_checkpoints_load_into_any_number_of_ranks(got):
    saved, loaded, folder = got[0]["checkpoint"]
    assert all(torch.equal(a, b) for a, b in zip(saved, loaded, strict=True))
    one = models_with_queues()
    state = negmine.queues.distributed_state_dict(one)
    checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    assert torch.equal(one.sharded.queue, torch.cat([answer["checkpoint"][0][0] for answer in got]))
    assert torch.equal(one.sharded.ids, torch.cat([answer["checkpoint"][0][1] for answer in got]))
    assert torch.equal(one.shared.queue, saved[2]) and torch.equal(one.layer.weight, saved[3])
    assert len(one.sharded) == K + 1 and int(one.sharded.queue_ptr) == int(saved[4])


def test_ranks_have_the_losses_of_other_packages(got):
    for answer in got:
        for (name, step), (ours, theirs) in (answer["adapters"] | answer["text losses"]).items():
            torch.testing.assert_close(
                ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda m, n=name, s=step: f"{n}, {s}: {m}"
            )


def tensors(state):
    """Return all tensors in nested dicts and lists, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [tensor for part in parts for tensor in tensors(part)]


# Only two ranks, because with three, DistributedDataParallel may add gradients in another order after a restart.
@pytest.mark.parametrize("got", [2], indirect=True)
def test_4_ranks_that_are_killed_and_resumed_give_the_same_bits(tmp_path, got):
    world = len(got)
    kill_ranks(long_run.run, world, tmp_path, tmp_path, True)
    saved = torch.load(tmp_path / "state.pt")
    assert saved["step"] == long_run.KILLED_AT
    resumed = run_ranks(long_run.run, world, tmp_path, tmp_path, False)
    for state in resumed:
        pairs = list(zip(tensors(state), tensors(got[0]["straight"]), strict=True))
        assert len(pairs) > 20 and all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in zip(*(tensors(answer["straight"]) for answer in got), strict=True))
