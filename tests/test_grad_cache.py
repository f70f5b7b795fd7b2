"""grad_cache gives the loss and the gradients of a step that keeps all graphs. test_ddp.py tests it on several ranks."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import negmine
from negmine.losses import grad_cache
from tests.cases import unit

B, IN, D = 7, 6, 5


class Encoder(nn.Module):
    """Takes rows, and a keyword argument that is not split into chunks."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(nn.Linear(IN, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, D)).to(dtype)

    def forward(self, rows, factor=1.0):
        return F.normalize(self.layers(rows) * factor, dim=-1)


def inputs(rows=B):
    x = [torch.randn(n, IN, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (rows, 2 * rows)]
    return x[0], x[1]


def gradients(*modules):
    return [p.grad.clone() for module in modules for p in module.parameters()]


def step(how, one_encoder, dtype=torch.float64, autocast=False, scaler=None):
    """Return the loss, its statistics and the gradients of one step. how: a chunk size, or "rows" to keep all graphs."""
    encoders = [Encoder(dtype)] * 2 if one_encoder else [Encoder(dtype), Encoder(dtype)]
    scale = negmine.losses.LogScale(5.0)
    memory = nn.Parameter(unit(9, D, dtype=dtype, seed=4))
    queries, documents = (rows.to(dtype) for rows in inputs())

    def loss(q, documents):
        pools = [negmine.Negatives(documents[B:]), None, memory]
        return negmine.info_nce(q, documents[:B], pools, temperature=scale(), return_stats=True)

    backward = None if scaler is None else lambda value: scaler.scale(value).backward()
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        if isinstance(how, int):
            given = [queries, {"rows": documents, "factor": 0.5}]
            value, stats = grad_cache(loss, encoders[0] if one_encoder else encoders, given, how, backward=backward)
        else:
            q = torch.cat([encoders[0](rows) for rows in queries.split(3)])
            value, stats = loss(q, torch.cat([encoders[1](rows, factor=0.5) for rows in documents.split(3)]))
    if not isinstance(how, int):
        value.backward()
    after = torch.rand(1)
    return value, stats, [*gradients(*dict.fromkeys(encoders), scale), memory.grad], after


@pytest.mark.parametrize("one_encoder", [True, False], ids=["one encoder", "two encoders"])
def test_the_gradients_are_those_of_the_graphs_of_all_chunks(one_encoder):
    """Also with dropout: its masks and the random state afterwards are the same as for one pass over the chunks."""
    want, got = (step(how, one_encoder) for how in ("graphs", 3))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert not got[0].requires_grad


def test_autocast_and_a_scaled_loss():
    """Weights that autocast has cached without gradient are cast again, so each gets its gradient, scaled like the loss."""
    want = step("graphs", True, torch.float32, autocast=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    got = step(3, True, torch.float32, autocast=True, scaler=scaler)
    assert torch.equal(got[0], want[0])
    for g, w in zip(got[2], want[2], strict=True):  # in bf16, the order of a sum has an effect
        assert (g / 2**10 - w).norm() <= 0.02 * w.norm()


@pytest.mark.parametrize("chunk_size", [1, B, 100])
def test_any_chunk_size_is_the_step_without_chunks(chunk_size):
    encoder, texts = Encoder().eval(), [list("abcdefg"), inputs()[0]]

    def encode(rows, mark=None):  # a list of texts is split into chunks too
        assert mark is None or mark == "document"
        return encoder(rows if isinstance(rows, torch.Tensor) else inputs()[0][[ord(c) - ord("a") for c in rows]])

    def loss(q, k):
        return negmine.losses.methods.decoupled_weighted(q, 0.9 * k.flip(0), None)

    want = loss(encode(texts[0]), encode(texts[1]))
    want_gradient = torch.autograd.grad(want, list(encoder.parameters()))
    got = grad_cache(loss, encode, (texts[0], (texts[1], "document")), chunk_size)
    torch.testing.assert_close((got, gradients(encoder)), (want.detach(), list(want_gradient)), rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        assert torch.equal(grad_cache(loss, encode, texts, chunk_size), got)
    encoder.requires_grad_(False).zero_grad()
    grad_cache(loss, encode, texts, chunk_size)  # without gradients, nothing is run again
    assert all(p.grad is None for p in encoder.parameters())


def encode(rows):
    return rows


rows = torch.ones(4, 3)
REFUSALS = [
    ((torch.sum, encode, rows, 2), ValueError, "inputs must be a list or tuple of at least one input, got a Tensor"),
    ((torch.sum, [encode], [rows, rows], 2), TypeError, "encoders must be a callable, or one for each of the 2 inputs"),
    ((torch.sum, encode, [rows], 0), ValueError, "chunk_size must be an int of 1 or more, got 0"),
    ((torch.sum, encode, [rows[:0]], 2), ValueError, "inputs[0] must be a tensor (B, ...), a list"),
    ((torch.sum, encode, [(rows, [1])], 2), ValueError, "got lengths [1, 4]"),
    ((torch.sum, lambda x: x[:1], [rows], 2), TypeError, "what the encoder of inputs[0] returns must be a floating"),
    ((encode, encode, [rows], 2), TypeError, "what loss returns must be a 0-d tensor"),
]


@pytest.mark.parametrize("call, error, words", REFUSALS, ids=[words[:40] for *_, words in REFUSALS])
def test_refusal(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        grad_cache(*call)
