"""Sums gradients of 16-bit vectors in fp32 and rounds them once, even if several ops of a call contribute to them.

`each_widened` converts each argument to fp32 once. Autograd then adds its gradients in fp32 and rounds the sum in the backward of
that conversion. The kernels still read 16-bit storage: `narrowed` converts the vectors back, which loses nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from negmine.ops.backends import Kernels
from negmine.ops.registry import OPS

NAMES = ("query", "positive_key", "negative_keys")


def widen_once(kernels: Kernels | None, *vectors: Any) -> tuple[Any, ...]:
    """The kernels after `narrowed`, and query, positive_key (or None) and keys after `each_widened`."""
    return narrowed(kernels, *vectors), *each_widened(*vectors)


def each_widened(*vectors: Any) -> tuple[Any, ...]:
    """The vectors, in fp32 if their gradient would be rounded to 16 bits. A tensor that is given twice is converted once."""
    converted: list[Any] = []
    for at, tensor in enumerate(vectors):
        same = [i for i in range(at) if vectors[i] is tensor]
        if same:
            converted.append(converted[same[0]])
        else:
            converted.append(tensor.float() if tensor is not None and _is_rounded(tensor) else tensor)
    return tuple(converted)


def narrowed(kernels: Kernels | None, *vectors: Any) -> Any:
    """Kernels that accept query, positive_key (or None) and keys from `each_widened`. None (the reference) is returned as is."""
    stored = {name: t.dtype for name, t in zip(NAMES, vectors, strict=True) if t is not None and _is_rounded(t)}
    if kernels is None or not stored:
        return kernels
    return Kernels(**{op: _narrowing(function, op, stored) for op, function in kernels.__dict__.items()})


def _is_rounded(tensor: Tensor) -> bool:
    return tensor.requires_grad and tensor.dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled()


def _narrowing(function: Callable[..., Any], op: str, stored: dict[str, torch.dtype]) -> Callable[..., Any]:
    """The kernel, called with vectors in their storage dtype. gathered_grad_keys is unchanged: it gets computed fp32 vectors."""
    arguments = () if op == "gathered_grad_keys" else OPS[op].arguments
    dtypes = {position: stored[value.name] for position, value in enumerate(arguments) if value.name in stored}

    def launch(*given: Any) -> Any:
        return function(*(t.to(dtypes[position]) if position in dtypes else t for position, t in enumerate(given)))

    return launch if dtypes else function
