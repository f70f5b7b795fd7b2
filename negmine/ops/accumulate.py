"""Gradients of 16-bit vectors are summed in fp32 and rounded once, even if several ops of a call contribute to them.

`each_widened` converts each argument to fp32 once, so autograd adds its gradients in fp32 and rounds them in the backward of that
conversion. The kernels still read the 16-bit storage, which holds the same values.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from negmine.ops.backends import Kernels
from negmine.ops.registry import OPS

NAMES = ("query", "positive_key", "negative_keys")


def widen_once(kernels: Kernels | None, *vectors: Any) -> tuple[Any, ...]:
    """Kernels that take the widened vectors, and query, positive_key (or None) and keys after `each_widened`."""
    return narrowed(kernels, *vectors), *each_widened(*vectors)


def each_widened(*vectors: Any) -> tuple[Any, ...]:
    """The vectors, in fp32 if their gradient would be rounded. A tensor that is given twice is converted once."""
    wide: list[Any] = []
    for at, tensor in enumerate(vectors):
        before = [i for i in range(at) if vectors[i] is tensor]
        if before:
            wide.append(wide[before[0]])
        else:
            wide.append(tensor.float() if tensor is not None and _is_rounded(tensor) else tensor)
    return tuple(wide)


def narrowed(kernels: Kernels | None, *vectors: Any) -> Any:
    """Kernels that take query, positive_key (or None) and keys from each_widened. None (the reference) is returned as is."""
    stored = {name: t.dtype for name, t in zip(NAMES, vectors, strict=True) if t is not None and _is_rounded(t)}
    if kernels is None or not stored:
        return kernels
    return Kernels(**{op: _narrowing(function, op, stored) for op, function in kernels.__dict__.items()})


def _is_rounded(tensor: Tensor) -> bool:
    return tensor.requires_grad and tensor.dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled()


def _narrowing(function: Callable[..., Any], op: str, stored: dict[str, torch.dtype]) -> Callable[..., Any]:
    """The kernel, called with vectors in their storage dtype. gathered_grad_keys is unchanged: its vectors are computed."""
    like = op.replace("grad_bias", "grad_keys")  # the grad_bias of lists is not declared; it has the same arguments
    arguments = () if op == "gathered_grad_keys" else OPS[like].arguments
    places = {at: stored[value.name] for at, value in enumerate(arguments) if value.name in stored}

    def launch(*given: Any) -> Any:
        return function(*(t.to(places[at]) if at in places else t for at, t in enumerate(given)))

    return launch if places else function
