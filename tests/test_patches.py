"""The patches of examples/patches on code in published styles: the same losses, gradients, logs and checkpoints."""

import copy
import re

import pytest
import torch
from torch import nn

import negmine
from tests.patched import DIM, ROOT, K, batches, encoder, moco, published, teacher_forced


def same_logs(log):
    torch.testing.assert_close(torch.tensor(log["ours"]), torch.tensor(log["theirs"]), rtol=1e-5, atol=1e-5)
    for queue, ptr, our_queue, our_ptr in log["queues"]:
        assert torch.equal(ptr, our_ptr)
        torch.testing.assert_close(our_queue, queue)


def test_2e_2g_moco_has_the_losses_queue_and_log_of_the_published_builder():
    log, _ = teacher_forced(15)
    same_logs(log)
    assert 0 < sum(acc1 for _, acc1, _ in log["ours"]) < sum(acc5 for _, _, acc5 in log["ours"])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_2f_whole_model_checkpoints_load_strictly_both_ways(prefix):
    def whole(model):
        return nn.ModuleDict({"module": model}) if prefix else model

    _, models = teacher_forced(3)
    theirs, ours = models["theirs"], models["ours"]
    fresh = moco(patch=True, seed=9)
    whole(fresh).load_state_dict(whole(theirs).state_dict())
    torch.testing.assert_close(fresh.queue.queue, theirs.queue.T)
    back = moco(seed=9)
    whole(back).load_state_dict(whole(ours).state_dict())
    assert torch.equal(back.queue, ours.queue.queue.T) and torch.equal(back.queue_ptr, ours.queue.queue_ptr)
    twin = copy.deepcopy(ours)  # with hooks of its own
    twin.load_state_dict(theirs.state_dict())
    assert torch.equal(twin.queue.queue, theirs.queue.T) and set(twin.state_dict()) == set(theirs.state_dict())
    assert set(whole(ours).state_dict()) == set(whole(theirs).state_dict())
    with pytest.raises(RuntimeError, match="queue_ptr must be an integer"):
        ours.load_state_dict({**theirs.state_dict(), "queue_ptr": torch.tensor([K])})
    with pytest.raises(RuntimeError, match="size mismatch for queue"):
        ours.load_state_dict({**theirs.state_dict(), "queue": torch.zeros(DIM, K + 1)})


@pytest.mark.parametrize("options", [{"with_ids": True}, {"random_init": False}])
def test_2f_a_queue_without_the_published_form_is_saved_as_it_is(options):
    def model():
        module = nn.Module()
        module.queue = negmine.MoCoQueue(DIM, K, **options)
        negmine.queues.moco_checkpoint_hooks(module)
        return module

    first, second = model(), model()
    first.queue.enqueue(torch.randn(5, DIM))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.queue.keys, first.queue.keys) and int(second.queue.queue_ptr) == 5
    second.load_state_dict(moco().state_dict(), strict=False)  # the encoders are unexpected, the queue is not
    assert len(second.queue) == K
    for name in ("keys", 3):
        with pytest.raises(TypeError, match="moco_checkpoint_hooks: name must be the name of an attribute of module"):
            negmine.queues.moco_checkpoint_hooks(first, name)


def test_simclr_hides_self_pairs_by_ids_given_once():
    theirs, ours = (published("simclr", patch).SimCLR(encoder(), 0.3) for patch in (False, True))
    ours.model.load_state_dict(theirs.model.state_dict())
    for images in batches(3):
        results = []
        for loop in (theirs, ours):
            loss, top1 = loop.step(list(images))
            results.append((loss, top1, *torch.autograd.grad(loss, tuple(loop.model.parameters()))))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def moco_v3(patch):
    torch.manual_seed(2)
    return published("moco_v3", patch).MoCo_v3(encoder(), nn.Linear(DIM, DIM), encoder(), T=0.5)


def symmetric(rank=0):
    """Compare the loss and the gradients of both builders on one batch."""
    results = []
    for patch in (False, True):
        model = moco_v3(patch)
        loss = model(*next(batches(1, rank)))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    return results


def test_moco_v3_is_symmetric_without_a_queue():
    theirs, ours = symmetric()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def changed(text):
    return [
        line for line in text.splitlines() if line[:1] in "+-" and line[:3] not in ("---", "+++") and line[1:].strip()
    ]


def test_the_diff_of_the_readme_is_the_patch():
    (shown,) = re.findall(r"^```diff\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    patch = changed((ROOT / "examples/patches/moco.patch").read_text())
    at = 0
    for line in changed(shown):
        at = patch.index(line, at) + 1
    assert "gather_distributed=True" in shown
