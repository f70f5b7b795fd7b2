"""first_derivative_only: the backward of a fused op, which has first derivatives and refuses second ones in words.

torch's once_differentiable refuses only where the engine comes by: torch.autograd.grad(..., inputs) leaves out what leads to no
input, and would return a second derivative that lacks the kernels' part. Here the refusal stands on the way to every input.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    """A gradient as it is, tied to what it was made from, that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "negmine: the kernels know first derivatives, so they cannot differentiate a gradient; "
            "backend='reference' has derivatives of every order"
        )


def first_derivative_only(backward: Callable) -> Callable:
    """Decorates the backward of a torch.autograd.Function, as torch.autograd.function.once_differentiable does."""

    @wraps(backward)
    def guarded(ctx: Any, *outer: Any) -> Any:
        create_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            made = backward(ctx, *outer)
        if not create_graph:
            return made
        sources = [t for t in (*outer, *ctx.saved_tensors) if isinstance(t, Tensor) and t.requires_grad]
        return tuple(_Once.apply(t, *sources) if isinstance(t, Tensor) and sources else t for t in made)

    return guarded
