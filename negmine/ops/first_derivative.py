"""fused applies the autograd function of an op. first_derivative_only decorates its backward, so that second derivatives raise.

torch's once_differentiable raises only if the autograd engine reaches its node. torch.autograd.grad(..., inputs) skips nodes
that do not lead to an input and would silently return an incomplete second derivative. Here, a node that raises is on the path
to every input.
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


class _NoGradient:
    """The context of a forward pass that needs no gradient."""

    def __init__(self, count: int) -> None:
        self.needs_input_grad = (False,) * count

    def save_for_backward(self, *_: Any) -> None:
        pass

    def mark_non_differentiable(self, *_: Any) -> None:
        pass

    def set_materialize_grads(self, _: bool) -> None:
        pass


def fused(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply(*arguments), in every context of torch.

    Without gradients (torch.no_grad, or no tensor that requires one), only what the forward pass returns is computed: torch
    itself reports needs_input_grad of a tensor that requires grad as True under no_grad too. Under torch.compile, the same
    tensor may be given twice, which Dynamo does not support by itself. The transforms of torch.func raise an error.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "negmine: torch.func and functorch transforms (grad, vmap, jacrev, ...) take no fused kernel, which is for "
            "backward(); backend='reference' takes them"
        )
    backward = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments)
    if not backward and forward_ad._current_level < 0:  # torch refuses forward-mode derivatives by itself
        return function.forward(_NoGradient(len(arguments)), *arguments)
    if torch.compiler.is_compiling():
        distinct: list[Any] = []
        for argument in arguments:
            again = isinstance(argument, Tensor) and any(argument is other for other in distinct)
            distinct.append(argument.view_as(argument) if again else argument)
        return function.apply(*distinct)
    return function.apply(*arguments)
