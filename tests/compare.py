"""The tolerances of the tests: one function for each kind of claim. They are never raised to make a test pass.

exact     For inputs of small integers: bit-equal to the reference, also where scores are equal.
rounded   |kernel - truth| <= 2 |plain - truth| + floor for each element. truth is the reference in float64 for the same rounded
          inputs, plain the reference in the tested dtype, floor a few eps of the output's scale times the condition of the op.
selected  No index occurs twice, each score is right, and no column was left out whose score is greater than that of the worst
          selected column by more than rounding.
"""

import numpy as np
import torch
from torch import Tensor

from negmine.mining import MiningResult


def exact(name: str, got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    same = (got == want) | (got.isnan() & want.isnan()) if got.is_floating_point() else got == want
    if not bool(same.all()):
        at = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int((~same).sum())} elements differ, first at {at}: {got[at]} instead of {want[at]}"
        )


def rounded(
    name: str, kernel: Tensor, truth: Tensor, plain: Tensor, condition: float = 1.0, terms: Tensor | None = None
) -> None:
    """condition: how much the op amplifies a rounding error of its inputs, e.g. the largest logit for an exponential.

    terms: if the output is a difference of terms that may cancel, a tensor with their magnitude.
    """
    assert kernel.shape == truth.shape, f"{name}: shape {tuple(kernel.shape)}, want {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    k, t, p = (x.detach().double().cpu() for x in (kernel, truth, plain))
    special = ~t.isfinite()
    exact(f"{name} (non-finite)", k[special], t[special])
    assert bool(k[~special].isfinite().all()), f"{name}: not finite where the truth is"
    k, t, p = k[~special], t[~special], p[~special]
    if t.numel() == 0:
        return
    scale = max(float(x.detach().abs().max()) for x in (t, terms) if x is not None and x.numel())
    floor = 4 * torch.finfo(kernel.dtype).eps * max(condition, 1.0) * max(scale, 1e-3)
    allowed = 2 * (p - t).abs().nan_to_num(nan=0.0, posinf=0.0) + floor
    error = (k - t).abs()
    worst = int((error - allowed).argmax())
    assert error[worst] <= allowed[worst], (
        f"{name}: kernel {k[worst]:.9g}, truth {t[worst]:.9g}, plain {p[worst]:.9g}: "
        f"error {error[worst]:.3g} over {allowed[worst]:.3g}"
    )


def selected(
    name: str, scores: Tensor, index: Tensor, truth: Tensor, usable: Tensor | None = None, slack: float = 1e-5
) -> None:
    """Check scores and index (B, N) of a selection with the true scores (B, K) in float64."""
    allowed = torch.ones_like(truth, dtype=torch.bool) if usable is None else usable
    for b in range(len(truth)):
        kept = index[b][index[b] >= 0]
        assert kept.unique().numel() == kept.numel(), f"{name}: row {b} keeps an index twice"
        assert kept.numel() == min(index.shape[1], int(allowed[b].sum())), f"{name}: row {b} keeps {kept.numel()}"
        assert bool((index[b][: kept.numel()] >= 0).all()), f"{name}: row {b} pads before its end"
        if not kept.numel():
            continue
        assert bool(allowed[b][kept].all()), f"{name}: row {b} keeps a masked column"
        error = (scores[b, : kept.numel()].double() - truth[b][kept]).abs().max()
        assert error <= slack, f"{name}: row {b} scores off by {error:.3g}"
        left = allowed[b].clone()
        left[kept] = False
        if bool(left.any()):
            worst, best = truth[b][kept].min(), truth[b][left].max()
            assert best <= worst + slack, f"{name}: row {b} leaves out {best:.9g} and keeps {worst:.9g}"


def same_result(got: MiningResult, want: MiningResult) -> None:
    """Check that two results of mine_hard_negatives are bit-identical."""
    for name in ("indices", "scores", "positive_scores", "num_valid"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
    assert got.skipped == want.skipped
