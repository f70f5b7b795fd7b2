"""MoCoQueue with the checkpoints of MoCo, and InfoNCELoss. tests/test_patches.py has the published builder and its patch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import negmine


def test_a_growing_queue_has_no_moco_form():
    with pytest.raises(ValueError, match="must be full"):
        negmine.MoCoQueue(4, 6, random_init=False).moco_state_dict()


def test_the_loss_module_counts_its_steps():
    q, pos, keys = (F.normalize(torch.randn(n, 8), dim=1) for n in (4, 4, 30))
    loss = negmine.InfoNCELoss(0.1, mix=negmine.Mix(5, 6, 3), seed=2)
    first, second = loss(q, pos, keys), loss(q, pos, keys)
    assert first != second
    for step, value in enumerate((first, second)):
        assert torch.equal(
            value, negmine.info_nce(q, pos, keys, temperature=0.1, mix=negmine.Mix(5, 6, 3), seed=2, step=step)
        )
    resumed = negmine.InfoNCELoss(0.1, mix=negmine.Mix(5, 6, 3), seed=2)
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed(q, pos, keys), loss(q, pos, keys))
    loss.eval()
    assert torch.equal(loss(q, pos, keys), loss(q, pos, keys))


def test_a_learnable_temperature_learns():
    module = negmine.InfoNCELoss(nn.Parameter(torch.tensor(0.5)))
    q, pos, keys = (F.normalize(torch.randn(n, 8), dim=1) for n in (4, 4, 30))
    module(q, pos, keys).backward()
    assert len(list(module.parameters())) == 1 and module.temperature.grad is not None
