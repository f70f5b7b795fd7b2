"""Comparisons for the fuzzers: a result must equal the reference bit for bit, or within the rounding of its scores."""

from dataclasses import replace

import torch
from torch import Tensor

from negmine import Negatives

EPS = torch.finfo(torch.float32).eps


class Fault(AssertionError):
    """A result that does not agree."""


def require(good: bool | Tensor, sentence: str) -> None:
    if not bool(good):
        raise Fault(sentence)


def double(call: dict) -> dict:
    """Return the call for the reference: tensors in float64, detached from the graph of the original call."""
    return {name: widened(value) for name, value in call.items()} | {"backend": "reference"}


def widened(value):
    """Convert a floating tensor, or the keys of Negatives, to float64; return other values unchanged."""
    if isinstance(value, Negatives):
        return replace(value, keys=widened(value.keys))
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def tensors(result) -> list[Tensor]:
    flat = result if isinstance(result, tuple) else (result,)
    return [t for part in flat for t in (tensors(part) if isinstance(part, tuple) else [part])]


def same(name: str, got: Tensor, want: Tensor) -> None:
    require(got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}")
    want = want.to(got.dtype)
    equal = (got == want) | (got.isnan() & want.isnan()) if got.is_floating_point() else got == want
    require(equal.all(), f"{name}: {int((~equal).sum())} of {equal.numel()} differ")


def near(name: str, got: Tensor, truth: Tensor, plain: Tensor, slack: Tensor | float, spreads: bool = True) -> None:
    """Check `got` where truth (float64) and plain (fp32) are finite: it must be finite too, and close to truth.

    If NaN must propagate (`spreads`), got must also be NaN wherever truth and plain are NaN.
    """
    require(got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(truth.shape)}")
    g, t, p = (x.detach().double() for x in (got, truth, plain))
    finite = t.isfinite() & p.isfinite()
    lost = (t.isnan() & p.isnan() & ~g.isnan() & spreads) | (finite & ~g.isfinite())
    require(~lost.any(), f"{name}: {g[lost][:3].tolist()} instead of {p[lost][:3].tolist()}")
    error = (g - t).abs() - 2 * (p - t).abs() - slack - 2 * torch.finfo(got.dtype).eps * t.abs()
    worst = error.masked_fill(~finite, -1.0)
    if worst.numel() and float(worst.max()) > 0:
        at = int(worst.argmax())
        raise Fault(
            f"{name}: {g.flatten()[at]} truth {t.flatten()[at]} plain {p.flatten()[at]}, too far by {worst.max():.3g}"
        )


def rounding(call: dict) -> float:
    """How much the rounding of fp32 sums may change a score of this call: a few eps of the largest product of norms."""
    largest = [
        float(call[name].detach().double().nan_to_num(posinf=0, neginf=0).norm(dim=-1).max())
        for name in ("query", "negative_keys", "positive_key")
        if isinstance(call.get(name), Tensor) and call[name].numel()
    ]
    return 4 * EPS * largest[0] * max(largest[1:], default=0.0) * call["query"].shape[-1] ** 0.5 if largest else 0.0
