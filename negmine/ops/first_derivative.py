"""`fused` applies the autograd function of an op; `first_derivative_only` makes second derivatives through it raise an error.

torch's once_differentiable raises only if the autograd engine reaches its node. torch.autograd.grad(..., inputs) skips nodes
that do not lead to an input and would silently return an incomplete second derivative. `first_derivative_only` puts a node that
raises on the path to every input.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _Once(torch.autograd.Function):
    """The identity on a gradient. It depends on the inputs of the op, and its backward raises an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "negmine: the fused kernels have first derivatives only; use backend='reference' for higher derivatives"
        )


def first_derivative_only(backward: Callable) -> Callable:
    """Decorates the backward of a torch.autograd.Function, as torch.autograd.function.once_differentiable does."""

    @wraps(backward)
    def guarded(ctx: Any, *outer: Any) -> Any:
        create_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            gradients = backward(ctx, *outer)
        if not create_graph:
            return gradients
        sources = [t for t in (*outer, *ctx.saved_tensors) if isinstance(t, Tensor) and t.requires_grad]
        return tuple(_Once.apply(t, *sources) if isinstance(t, Tensor) and sources else t for t in gradients)

    return guarded


class _NoGradient:
    """A stand-in for the autograd context in a forward pass that needs no gradient."""

    def __init__(self, count: int) -> None:
        self.needs_input_grad = (False,) * count

    def save_for_backward(self, *_: Any) -> None:
        pass

    def mark_non_differentiable(self, *_: Any) -> None:
        pass

    def set_materialize_grads(self, _: bool) -> None:
        pass


def fused(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply(*arguments), with three special cases.

    Under torch.no_grad, or if no tensor requires grad, the forward pass computes no gradient. (torch reports needs_input_grad as
    True for a tensor that requires grad even under no_grad.) Under torch.compile, the same tensor may be given twice, which
    Dynamo alone does not support. The transforms of torch.func raise a RuntimeError.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "negmine: the fused kernels do not support the transforms of torch.func (grad, vmap, jacrev, ...); "
            "use backend='reference'"
        )
    backward = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments)
    if not backward and forward_ad._current_level < 0:  # with forward-mode derivatives, apply raises torch's own error
        return function.forward(_NoGradient(len(arguments)), *arguments)
    if torch.compiler.is_compiling():
        distinct: list[Any] = []
        for argument in arguments:
            again = isinstance(argument, Tensor) and any(argument is other for other in distinct)
            distinct.append(argument.view_as(argument) if again else argument)
        return function.apply(*distinct)
    return function.apply(*arguments)
