"""LogScale: a learned inverse temperature, stored as its logarithm and bounded, like CLIP's logit_scale."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from negmine.ops import checks


class LogScale(nn.Module):
    """A learned scale of the scores that can be passed as a temperature T: 1 / T = min(exp(log_scale), max).

    Parameters
    ----------
    init : float
        The initial scale, above 0.
    max : float or None
        The largest scale. None means no limit.

    Raises
    ------
    ValueError
        If a value is not above 0, or `init` is above `max`.

    Notes
    -----
    The only parameter is `log_scale`, () fp32. Pass it to the optimiser without weight decay. ``scale()`` returns the scale,
    and calling the module returns the temperature, 1 / scale.

    If log_scale is above log(max), the scale is max, and log_scale gets a gradient only if a descent step would lower it, so
    that it can return below the limit.

    References
    ----------
    CLIP's logit_scale: Radford et al. 2021 (arXiv 2103.00020).

    Examples
    --------
    >>> scale = negmine.losses.LogScale(1 / 0.07, 100.0)
    >>> loss_of = negmine.InfoNCELoss(temperature=scale)
    >>> query, key = torch.randn(2, 8, 16)
    >>> loss_of(query, key).backward()
    >>> scale.log_scale.grad is not None
    True
    """

    def __init__(self, init: float = 1 / 0.07, max: float | None = 100.0) -> None:
        super().__init__()
        init = checks.require_number("LogScale", "init", init, above=0)
        if max is not None:
            max = checks.require_number("LogScale", "max", max, above=0)
            if init > max:
                raise checks.refuse("LogScale", "init", f"at most max={max!r}", init)
        self.max = max
        self.log_scale = nn.Parameter(torch.tensor(math.log(init), dtype=torch.float32))

    def _bounded(self) -> Tensor:
        if self.max is None:
            return self.log_scale
        return _Clamp.apply(self.log_scale, math.log(self.max))

    def scale(self) -> Tensor:
        """() fp32: min(exp(log_scale), max), with gradient."""
        return self._bounded().exp()

    def forward(self, step: Any = None) -> Tensor:
        """() fp32: the temperature, 1 / scale, with gradient. It does not depend on the step."""
        return (-self._bounded()).exp()

    def extra_repr(self) -> str:
        return f"max={self.max!r}"


class _Clamp(torch.autograd.Function):
    """min(x, most). The gradient passes if x is below most, or if a descent step would lower x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.most = most
        return x.clamp_max(most)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradient.masked_fill((x >= ctx.most) & (gradient < 0), 0.0), None
