"""lightly's contrastive losses with the same signatures, on fused kernels: no (B, K) or (2B, 2B) matrix, no copy of the bank.

    from negmine.adapters.lightly import NTXentLoss       instead of   from lightly.loss import NTXentLoss

lightly itself is not imported. Values and gradients are those of lightly 1.6.0, except where a docstring says otherwise.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negmine import reference
from negmine.losses.gathered import Gathering
from negmine.losses.info_nce import info_nce
from negmine.losses.methods import positive_weights
from negmine.losses.schedules import refuse_recomputation
from negmine.ops import checks
from negmine.ops.vectors import score_of_positive, widened
from negmine.options import Negatives
from negmine.queues.moco import MoCoQueue

WeightFunction = Callable[[Tensor, Tensor], Tensor]


def _unit(op: str, out0: Any, out1: Any) -> tuple[Tensor, Tensor]:
    checks.require_vectors(op, "out0", out0, "(B, D)", (2,))
    checks.require_vectors(op, "out1", out1, "(B, D)", (2,), out0, "out0")
    if out0.shape != out1.shape:
        raise checks.refuse(op, "out1", f"of out0's shape {tuple(out0.shape)}", out1)
    return _normalized(out0), _normalized(out1)


def _normalized(rows: Tensor) -> Tensor:
    """Rows divided by their norms (B, D), as fp32 for 16-bit input, so that gradients are summed before they are rounded.

    The gradient of a row of zeros, which would be too large for fp16, is set to 0 for 16-bit input.
    """
    wide = widened(rows)
    unit = F.normalize(wide, dim=1)
    return unit if wide.dtype == rows.dtype else unit.masked_fill((wide == 0).all(1, keepdim=True), 0.0)


def _both_views(gathering: Gathering, out0: Tensor, out1: Tensor, **options: Any) -> Tensor:
    """info_nce (2B,) of each view: its positive is the image's other view, its negatives are all views of other images."""
    views = torch.cat([out0, out1])  # (2B, D)
    first = gathering.rank * len(out0)  # all ranks have the same number of images
    image = torch.arange(first, first + len(out0), device=out0.device).repeat(2)  # (2B,)
    options |= {"query_ids": image, "reduction": "none"}
    return gathering.paired(info_nce, views, torch.cat([out1, out0]), Negatives(views, ids=image), options)


class NTXentLoss(nn.Module):
    """lightly.loss.NTXentLoss: SimCLR's loss within a batch, or MoCo's against a memory bank.

    Parameters
    ----------
    temperature : float
        Divides the scores.
    memory_bank_size : int or sequence
        0 for no memory bank, or (rows, dim). The bank is the attribute `memory_bank`, a MoCoQueue. In training mode, each
        call whose out0 requires grad adds its out1 to the bank.
    gather_distributed : bool
        With a bank, every rank stores the rows of all ranks. Without a bank, the views of all ranks are negatives, and
        gradients flow across ranks.
    backend : str, optional
        As in `info_nce`.

    Notes
    -----
    Differences from lightly: the bank is part of the state dict. A batch that does not fit before the end of the bank
    continues at its start, but lightly drops the rest of such a batch. The bank is not copied in each step.

    Examples
    --------
    >>> from negmine.adapters.lightly import NTXentLoss
    >>> loss = NTXentLoss(temperature=0.1, memory_bank_size=(100, 16))
    >>> loss(torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)).backward()
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        op = "NTXentLoss"
        temperature = checks.require_temperature(op, temperature)
        size = [memory_bank_size] if isinstance(memory_bank_size, int) else list(memory_bank_size)
        if size != [0] and (len(size) != 2 or min(size) < 1):
            raise checks.refuse(op, "memory_bank_size", "0 or (rows, dim)", memory_bank_size)
        self.gathering = Gathering(op, gather_distributed, None)
        self.temperature, self.backend = temperature, backend
        self.memory_bank = None
        if size != [0]:
            rows, dim = size
            self.memory_bank = MoCoQueue(dim, rows, gather_distributed=gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss () of the two views (B, D) of each image, which are normalised. Gradients flow to both."""
        out0, out1 = _unit("NTXentLoss", out0, out1)
        if self.memory_bank is not None:
            refuse_recomputation("NTXentLoss")
        options: dict[str, Any] = {"temperature": self.temperature, "backend": self.backend}
        if self.memory_bank is None:
            return reference.reduced(_both_views(self.gathering, out0, out1, **options), "mean")
        loss = info_nce(out0, out1, self.memory_bank, **options)
        if self.training and out0.requires_grad:
            self.memory_bank.enqueue(out1)
        return loss


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """Weights of the positives: pairs with a low score have larger weights.

        w_b = 2 - B softmax over the batch of (out0_b . out1_b / sigma)

    Parameters
    ----------
    out0, out1 : Tensor (B, D)
        The two views of each image.
    sigma : float
        The temperature of the weights.

    Returns
    -------
    Tensor (B,)
        Without gradient.

    References
    ----------
    Yeh et al. 2021 (arXiv 2110.06848).

    Examples
    --------
    >>> from negmine.adapters.lightly import negative_mises_fisher_weights
    >>> negative_mises_fisher_weights(torch.randn(8, 16), torch.randn(8, 16)).shape
    torch.Size([8])
    """
    return positive_weights((out0 * out1).sum(1), sigma)


class DCLLoss(nn.Module):
    """lightly.loss.DCLLoss: decoupled contrastive learning within a batch, in both directions.

        loss = mean over the 2B views of -w x_pos + log sum over the views of other images of exp(x),   x = s / temperature

    Parameters
    ----------
    temperature : float
        Divides the scores.
    weight_fn : callable, optional
        weight_fn(out0, out1) -> w (B,), called once for each direction.
    gather_distributed : bool
        Use the negatives of all ranks, with gradient.
    backend : str, optional
        As in `info_nce`.

    Notes
    -----
    A batch of one image has no negatives: its loss is 0, where lightly's is -inf.

    References
    ----------
    Yeh et al. 2021 (arXiv 2110.06848).

    Examples
    --------
    >>> from negmine.adapters.lightly import DCLLoss
    >>> loss = DCLLoss()(torch.randn(8, 16), torch.randn(8, 16))
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: WeightFunction | None = None,
        gather_distributed: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        temperature = checks.require_temperature(op, temperature)
        self.gathering = Gathering(op, gather_distributed, None)
        self.temperature, self.weight_fn, self.backend = temperature, weight_fn, backend

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss () of the two views (B, D) of each image, which are normalised. Gradients flow to both."""
        out0, out1 = _unit(type(self).__name__, out0, out1)
        rows = _both_views(
            self.gathering, out0, out1, temperature=self.temperature, decoupled=True, backend=self.backend
        )  # (2B,)
        if self.weight_fn is not None and len(out0) > 1:
            weight = torch.cat([self.weight_fn(out0, out1), self.weight_fn(out1, out0)])  # (2B,)
            x_positive = score_of_positive(out0, out1).repeat(2) / self.temperature
            rows = rows + (1 - weight) * x_positive
        return reference.reduced(rows, "mean")


class DCLWLoss(DCLLoss):
    """lightly.loss.DCLWLoss: `DCLLoss` with the weights of `negative_mises_fisher_weights`.

    Parameters
    ----------
    temperature : float
        Divides the scores.
    sigma : float
        The temperature of the weights.
    gather_distributed : bool
        As in `DCLLoss`.
    backend : str, optional
        As in `info_nce`.

    Examples
    --------
    >>> from negmine.adapters.lightly import DCLWLoss
    >>> loss = DCLWLoss(sigma=0.5)(torch.randn(8, 16), torch.randn(8, 16))
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sigma: float = 0.5,
        gather_distributed: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        weight_fn = partial(negative_mises_fisher_weights, sigma=sigma)
        super().__init__(temperature, weight_fn, gather_distributed, backend=backend)
