"""Code in the published MoCo style, and the same code with the queue and the loss replaced: same loss, gradients, checkpoints."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import negmine

DIM, K, B, T = 16, 48, 8, 0.07


class MoCo(nn.Module):
    """A builder as it is published: queue (D, K), pointer, einsum, logits and labels for CrossEntropyLoss."""

    def __init__(self, encoder, m=0.999):
        super().__init__()
        self.m, self.T = m, T
        self.encoder_q, self.encoder_k = encoder, copy.deepcopy(encoder)
        for parameter in self.encoder_k.parameters():
            parameter.requires_grad = False
        self.register_buffer("queue", F.normalize(torch.randn(DIM, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def _momentum_update_key_encoder(self):
        for q, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            k.data = k.data * self.m + q.data * (1.0 - self.m)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys):
        ptr = int(self.queue_ptr)
        assert K % len(keys) == 0
        self.queue[:, ptr : ptr + len(keys)] = keys.T
        self.queue_ptr[0] = (ptr + len(keys)) % K

    def forward(self, im_q, im_k):
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            self._momentum_update_key_encoder()
            k = F.normalize(self.encoder_k(im_k), dim=1)
        l_pos = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        l_neg = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        logits = torch.cat([l_pos, l_neg], dim=1) / self.T
        labels = torch.zeros(logits.shape[0], dtype=torch.long)
        self._dequeue_and_enqueue(k)
        return logits, labels


class FusedMoCo(MoCo):
    """The same builder: MoCoQueue instead of the two buffers, info_nce instead of logits and labels."""

    def __init__(self, encoder, m=0.999):
        super().__init__(encoder, m)
        del self.queue, self.queue_ptr
        self.queue = negmine.MoCoQueue(DIM, K)

    def forward(self, im_q, im_k):
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            self._momentum_update_key_encoder()
            k = F.normalize(self.encoder_k(im_k), dim=1)
        loss = negmine.info_nce(q, k, self.queue, temperature=self.T)
        self.queue.enqueue(k)
        return loss


def builders():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, DIM))
    published, fused = MoCo(copy.deepcopy(encoder)), FusedMoCo(copy.deepcopy(encoder))
    fused.queue.load_state_dict({"queue": published.queue, "queue_ptr": published.queue_ptr})
    return published, fused


def train(model, steps, seed=1):
    """Losses and the last gradient of a few SGD steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1)
    losses = []
    for _ in range(steps):
        x = torch.randn(B, 10, generator=generator)
        views = x + 0.1 * torch.randn(2, B, 10, generator=generator)
        out = model(*views)
        loss = F.cross_entropy(*out) if isinstance(out, tuple) else out
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.grad.clone() for p in model.encoder_q.parameters()]


def test_the_same_losses_gradients_and_queue_over_a_training_run():
    published, fused = builders()
    (want, want_grads), (got, got_grads) = train(published, 15), train(fused, 15)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fused.queue.queue, published.queue.T)
    assert int(fused.queue.queue_ptr) == int(published.queue_ptr)


def test_checkpoints_load_both_ways():
    published, fused = builders()
    train(published, 3)
    train(fused, 3)
    state = published.state_dict()
    renamed = {("queue." + name if name.startswith("queue") else name): value for name, value in state.items()}
    fresh = builders()[1]
    fresh.load_state_dict(renamed)
    torch.testing.assert_close(fresh.queue.queue, published.queue.T)
    torch.testing.assert_close(train(fresh, 2, seed=4)[0], train(published, 2, seed=4)[0], rtol=1e-5, atol=1e-6)

    back = builders()[0]
    encoders = {name: value for name, value in fused.state_dict().items() if not name.startswith("queue.")}
    back.load_state_dict({**encoders, **fused.queue.moco_state_dict()})
    torch.testing.assert_close(back.queue, fused.queue.queue.T)
    torch.testing.assert_close(train(back, 2, seed=5)[0], train(fused, 2, seed=5)[0], rtol=1e-5, atol=1e-6)


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
