"""How vectors reach the kernels and the reference: storage, layout, and the score of a positive."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def disable_autocast(device: torch.device) -> AbstractContextManager:
    """Products in the dtype of their inputs, where the caller's autocast would shorten them."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def widened(vectors: Tensor) -> Tensor:
    """Vectors in the dtype that the reference computes in: float64 stays, everything else is fp32."""
    return vectors if vectors.dtype == torch.float64 else vectors.float()


def promoted(*vectors: Any) -> Any:
    """The vectors as they are; all of them as float64 where one is: float64 in any argument makes a call float64. None stays."""
    wide = [t is not None and t.dtype == torch.float64 for t in vectors]
    if not any(wide):
        return vectors
    made: list[Any] = []
    for at, t in enumerate(vectors):
        before = [i for i in range(at) if vectors[i] is t]  # one tensor given twice stays one
        made.append(made[before[0]] if before else t if wide[at] or t is None else t.double())
    return tuple(made)


def for_kernels(vectors: Tensor) -> Tensor:
    """Detached vectors whose last dimension is contiguous, as kernels take them."""
    vectors = vectors.detach()
    return vectors if vectors.stride(-1) == 1 or vectors.shape[-1] == 1 else vectors.contiguous()


def frozen(negative_keys: Tensor, usable: Tensor | None) -> Tensor:
    """Keys (K, D) or (B, M, D) as the dense path saves them for backward: a copy where the caller may overwrite the queue.

    usable (B, K) bool: rows that no query sees are zeros, for they may hold anything, NaN included.
    """
    keys = widened(negative_keys)
    if usable is not None:
        return torch.where((usable if keys.dim() == 3 else usable.any(0))[..., None], keys, 0.0)
    return keys.clone() if keys is negative_keys and not keys.requires_grad else keys


def with_norms(query: Tensor, keys: Tensor, at_zero: float = 0.0) -> tuple[Tensor, Tensor]:
    """query (B, D + 2), keys (K, D + 2) whose inner product is at_zero - ||q - k||^2 / 2, so that kernels rank by distance.

    In fp32 at least: a norm would lose its digits in 16 bits. Squares are summed in float64, so that equal rows have equal norms
    to the bit wherever they lie. A row that is not finite has norm NaN and no gradient by it: masks may hide such rows.
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
    """Inner product of each query with its positive: (B,) fp32, or float64 where both are.

    Autograd saves the positives, which may be rows of a queue that moves on before backward: a frozen one is copied.
    """
    positive = frozen(positive_key, None) if query.requires_grad and torch.is_grad_enabled() else widened(positive_key)
    return (widened(query) * positive).sum(1)


_constants: dict[tuple[float, torch.device], Tensor] = {}


def scalar(value: float | Tensor, query: Tensor) -> Tensor:
    """A 0-d fp32 tensor on the device of query; carries the gradient of a tensor. One tensor serves every call with a number."""
    if isinstance(value, Tensor):
        return value.to(device=query.device, dtype=torch.float32)
    if torch.compiler.is_compiling():
        return torch.full((), value, dtype=torch.float32, device=query.device)
    key = value, query.device
    made = _constants.get(key)
    if made is None:
        with torch.inference_mode(False):
            made = torch.full((), value, dtype=torch.float32, device=query.device)
        captured = query.is_cuda and torch.cuda.is_current_stream_capturing()  # its memory is filled by replays alone
        if type(made) is Tensor and not captured:
            if len(_constants) >= 256:  # a temperature that moves with the step
                _constants.clear()
            _constants[key] = made
    return made


def scale_of(temperature: float | Tensor, query: Tensor) -> Tensor:
    """1 / temperature as the 0-d fp32 tensor that kernels read; carries the temperature's gradient."""
    if isinstance(temperature, Tensor):
        return temperature.reciprocal().to(device=query.device, dtype=torch.float32)
    return scalar(1.0 / temperature, query)
