"""Prepares vectors for the kernels and the reference: dtype, memory layout, and the score of the positive."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def disable_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which products keep the dtype of their inputs, even if the caller uses autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def widened(vectors: Tensor) -> Tensor:
    """The vectors in the dtype that the reference computes in: float64 is kept, every other dtype becomes fp32."""
    return vectors if vectors.dtype == torch.float64 else vectors.float()


def promoted(*vectors: Any) -> Any:
    """All vectors as float64 if one of them is float64, else unchanged: one float64 argument makes the whole call float64.

    None is returned as None. A tensor that is given twice is converted once.
    """
    is_double = [t is not None and t.dtype == torch.float64 for t in vectors]
    if not any(is_double):
        return vectors
    converted: list[Any] = []
    for at, t in enumerate(vectors):
        same = [i for i in range(at) if vectors[i] is t]
        converted.append(converted[same[0]] if same else t if is_double[at] or t is None else t.double())
    return tuple(converted)


def for_kernels(vectors: Tensor) -> Tensor:
    """The vectors as kernels require them: detached, with a contiguous last dimension."""
    vectors = vectors.detach()
    return vectors if vectors.stride(-1) == 1 or vectors.shape[-1] == 1 else vectors.contiguous()


def frozen(negative_keys: Tensor, usable: Tensor | None) -> Tensor:
    """Keys (K, D) or (B, M, D) as the dense path saves them for backward: a copy, because the caller may overwrite the queue.

    Keys that require grad are not copied. usable (B, K) bool: rows that are hidden from all queries become zeros, because they
    may hold any values, NaN included.
    """
    keys = widened(negative_keys)
    if usable is not None:
        return torch.where((usable if keys.dim() == 3 else usable.any(0))[..., None], keys, 0.0)
    return keys.clone() if keys is negative_keys and not keys.requires_grad else keys


def with_norms(query: Tensor, keys: Tensor, at_zero: float = 0.0) -> tuple[Tensor, Tensor]:
    """query (B, D + 2) and keys (K, D + 2) whose inner product is at_zero - ||q - k||^2 / 2, so that kernels rank by distance.

    The result is fp32 or float64, because a norm would lose its digits in 16 bits. Squares are summed in float64, so that equal
    rows have bit-identical norms wherever they are in memory. A row that is not finite gets the norm NaN, without a gradient
    through the norm, because a mask may hide that row.
    """

    def half_norm(vectors: Tensor) -> Tensor:  # (rows, 1)
        finite = vectors.isfinite().all(1, keepdim=True)
        squares = torch.where(finite, vectors, 0.0).square().sum(1, keepdim=True, dtype=torch.float64)
        return (squares / 2).to(vectors.dtype).masked_fill(~finite, torch.nan)

    query, keys = widened(query), widened(keys)
    ones = torch.ones_like(query[:, :1]), torch.ones_like(keys[:, :1])
    return (
        torch.cat([query, ones[0], at_zero - half_norm(query)], 1),
        torch.cat([keys, -half_norm(keys), ones[1]], 1),
    )


def score_of_positive(query: Tensor, positive_key: Tensor) -> Tensor:
    """Inner product of each query with its positive: (B,) fp32, or float64 if both are float64.

    Autograd saves the positives for backward. They may be rows of a queue that is overwritten before that, so positives that do
    not require grad are copied.
    """
    positive = frozen(positive_key, None) if query.requires_grad and torch.is_grad_enabled() else widened(positive_key)
    return (widened(query) * positive).sum(1)


_constants: dict[tuple[float, torch.device], Tensor] = {}


def scalar(value: float | Tensor, query: Tensor) -> Tensor:
    """The value as a 0-d fp32 tensor on the device of query.

    The gradient of a tensor is kept. The tensor of a Python number is cached and shared between calls.
    """
    if isinstance(value, Tensor):
        return value.to(device=query.device, dtype=torch.float32)
    if torch.compiler.is_compiling():
        return torch.full((), value, dtype=torch.float32, device=query.device)
    key = value, query.device
    cached = _constants.get(key)
    if cached is None:
        with torch.inference_mode(False):
            cached = torch.full((), value, dtype=torch.float32, device=query.device)
        # While a CUDA graph is captured, the memory is not written: only replays of the graph write it.
        captured = query.is_cuda and torch.cuda.is_current_stream_capturing()
        if type(cached) is Tensor and not captured:
            if len(_constants) >= 256:  # a temperature that changes at every step would fill the cache
                _constants.clear()
            _constants[key] = cached
    return cached


def scale_of(temperature: float | Tensor, query: Tensor) -> Tensor:
    """1 / temperature as a 0-d fp32 tensor, as kernels require it. The gradient of the temperature is kept."""
    if isinstance(temperature, Tensor):
        return temperature.reciprocal().to(device=query.device, dtype=torch.float32)
    return scalar(1.0 / temperature, query)
