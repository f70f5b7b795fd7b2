"""Gradient caching (Gao et al. 2021, arXiv 2101.06983) for models that take the features of sentence-transformers.

First, each mini-batch is embedded without a graph, and the gradient of the loss with respect to the embeddings is computed. When
the caller calls backward, each mini-batch is embedded again with a graph, with the same random numbers and autocast settings, and
the gradient is propagated into the model. negmine.losses.grad_cache does the same in one call, but calls backward itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from negmine.ops import checks

Features = dict[str, Any]  # by name: tensors with one row for each text, and values that hold for all texts


def rows_of(op: str, features: Features) -> int:
    """How many texts the features hold. Raises ValueError if they cannot be split into mini-batches of texts."""
    tensors = {name: value for name, value in features.items() if isinstance(value, Tensor) and value.dim()}
    first = next((tensors[name] for name in ("input_ids", "attention_mask") if name in tensors), None)
    if first is None:
        first = next(iter(tensors.values()), None)
    per_text = {name: value for name, value in tensors.items() if name != "prompt_length"}
    if first is None or "offsets" in features or any(len(value) != len(first) for value in per_text.values()):
        came = checks.Phrase(", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items()) or "none")
        wanted = "padded tensors with one row for each text, to split into mini-batches (neither packed nor of images)"
        raise checks.refuse(op, "sentence_features", wanted, came)
    return len(first)


def part_of(features: Features, begin: int, end: int) -> Features:
    """The features of texts begin to end, without the padding at the end that all of these texts have."""
    mask = features.get("attention_mask")
    width = longest = None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        width, used = mask.shape[1], mask[begin:end].bool().any(0).nonzero()
        longest = int(used.max()) + 1 if len(used) else width
    made: Features = {}
    for name, value in features.items():
        if not isinstance(value, Tensor) or not value.dim() or name == "prompt_length":
            made[name] = value
        elif value.dim() > 1 and value.shape[1] == width:
            made[name] = value[begin:end, :longest]
        else:
            made[name] = value[begin:end]
    return made


def cuts(op: str, features: Features, size: int, num_tokens: int | None) -> list[tuple[int, int]]:
    """The (begin, end) of each mini-batch.

    A mini-batch has `size` texts or, if num_tokens is given, as many texts as fit into that many tokens, but at least one.
    """
    count = rows_of(op, features)
    if num_tokens is None:
        return [(begin, min(begin + size, count)) for begin in range(0, count, size)]
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor):
        raise checks.refuse(op, "mini_batch_num_tokens", "None for features without attention_mask", num_tokens)
    made, begin, tokens = [], 0, 0
    for text, length in enumerate(mask.sum(1).tolist()):
        if text > begin and tokens + length > num_tokens:
            made.append((begin, text))
            begin, tokens = text, 0
        tokens += length
    return [*made, (begin, count)]


class _RandomState:
    """The state of the random number generators of the CPU and of the devices that the features are on."""

    def __init__(self, features: Features) -> None:
        self.host = torch.get_rng_state()
        self.devices, self.states = get_device_states(*features.values())

    @contextmanager
    def replayed(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.host)
            set_device_states(self.devices, self.states)
            yield


class Part(NamedTuple):
    """A mini-batch of one column, and its embeddings."""

    features: Features
    state: _RandomState
    autocast: dict[str, Any]
    rows: Tensor  # (n, D), a leaf


def embed(model: nn.Module, features: Features, ranges: list[tuple[int, int]]) -> list[Part]:
    """Embed the mini-batches of one column without a graph."""
    made = []
    for begin, end in ranges:
        part = part_of(features, begin, end)
        state = _RandomState(part)
        with torch.no_grad():
            rows = model(dict(part))["sentence_embedding"]  # a copy, because models write into their input
        device = rows.device.type
        autocast = {"device_type": device, "enabled": torch.is_autocast_enabled(device)}
        autocast["dtype"] = torch.get_autocast_dtype(device)
        made.append(Part(part, state, autocast, rows.detach().requires_grad_(torch.is_grad_enabled())))
    torch.clear_autocast_cache()  # it holds weights that were cast without a graph
    return made


def differentiable(loss: Tensor, model: nn.Module, columns: list[list[Part]]) -> Tensor:
    """A copy of loss () whose backward propagates the gradients that the rows of the parts already hold into the model."""
    made = loss.detach().requires_grad_()
    every = [(part, part.rows.grad) for column in columns for part in column]
    made.register_hook(partial(_replay, model, [(part, grad) for part, grad in every if grad is not None]))
    return made


def _replay(model: nn.Module, parts: list[tuple[Part, Tensor]], grad: Tensor) -> None:
    unsynchronised: Callable[[], Any] = getattr(model, "no_sync", nullcontext)  # of DistributedDataParallel
    with torch.enable_grad():
        for number, (part, cached) in enumerate(parts, 1):
            with nullcontext() if number == len(parts) else unsynchronised():
                with part.state.replayed(), torch.autocast(**part.autocast):
                    rows = model(dict(part.features))["sentence_embedding"]
                if rows.requires_grad:
                    rows.backward(cached.to(rows.dtype) * grad)
