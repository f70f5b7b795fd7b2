"""open_clip's losses with the same signatures, without their (B, B) matrices.

    from negmine.adapters.open_clip import ClipLoss       instead of   from open_clip import ClipLoss

open_clip itself is not imported. Values and gradients are those of open_clip_torch 3.3.0.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negmine.collectives import Ranks
from negmine.losses.info_nce import info_nce
from negmine.losses.ring import RingLogSumExp, RingSoftplusSum
from negmine.losses.siglip import siglip
from negmine.ops import checks
from negmine.ops.backends import choose
from negmine.ops.first_derivative import fused
from negmine.ops.vectors import promoted, widened


def _check_pair(op: str, image_features: Any, text_features: Any) -> None:
    checks.require_vectors(op, "image_features", image_features, "(B, D)", (2,))
    checks.require_vectors(op, "text_features", text_features, "(B, D)", (2,), image_features, "image_features")
    if image_features.shape != text_features.shape:
        raise checks.refuse(
            op, "text_features", f"of image_features' shape {tuple(image_features.shape)}", text_features
        )


class _OfAllRanks(torch.autograd.Function):
    """Average the losses of the ranks' rows, which gives the loss of the whole batch.

    The gradient of each rank's loss is multiplied by `share`, so that features get the gradient that they have in open_clip.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, ranks: Ranks, share: float) -> Tensor:
        ctx.share = share
        return ranks.mean(loss)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:
        return d_loss * ctx.share, None, None


class _AveragedGradient(torch.autograd.Function):
    """A number that is equal on all ranks. Its gradient is averaged over the ranks and divided by `share`."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, ranks: Ranks, share: float) -> Tensor:
        ctx.ranks, ctx.share = ranks, share
        return number.view_as(number)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.ranks.mean(gradient) / ctx.share, None, None


class ClipLoss(nn.Module):
    """open_clip.ClipLoss: the mean of image-to-text and text-to-image cross entropy within a batch.

        logits = logit_scale * image_features @ text_features.T + logit_bias

    Call it with image_features and text_features (B, D), logit_scale, and optionally logit_bias and output_dict. logit_scale
    is a number, or a 0-d tensor, which gets a gradient. It returns the loss or, with output_dict, ``{"contrastive_loss":
    loss}``.

    Parameters
    ----------
    local_loss : bool
        Whether each rank returns the loss of its own rows against the rows of all ranks, instead of the loss of all rows.
    gather_with_grad : bool
        Whether gradients flow back to the other ranks. Without this, `local_loss` leaves out the gradient of the other side
        of a pair, as in open_clip.
    cache_labels : bool
        Has no effect, because there are no labels to cache.
    rank, world_size : int
        As in open_clip, for the default process group. All ranks must have the same number of rows.
    use_horovod : bool
        Must be False.
    backend : str, optional
        As in `info_nce`.

    Notes
    -----
    Features are not gathered. Each rank computes the loss of its own rows, with the features of one other rank in memory at a
    time. Vectors are used as given; the models of open_clip return unit vectors. logit_bias is common to all logits and does
    not change the loss, so its gradient is 0.

    Examples
    --------
    >>> from negmine.adapters.open_clip import ClipLoss
    >>> images, texts = F.normalize(torch.randn(2, 8, 16), dim=2).unbind()
    >>> scale = torch.tensor(14.3, requires_grad=True)
    >>> ClipLoss()(images, texts, scale).backward()
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        op = "ClipLoss"
        if use_horovod:
            raise checks.refuse(op, "use_horovod", "False: torch.distributed gathers", use_horovod)
        checks.require_count(op, "world_size", world_size)
        checks.require_count(op, "rank", rank, 0)
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.rank, self.world_size, self.backend = rank, world_size, backend

    def _one_way(self, query: Tensor, keys: Tensor, temperature: float | Tensor) -> Tensor:
        return info_nce(query, keys, temperature=temperature, backend=self.backend)

    def _over_ranks(self, images: Tensor, texts: Tensor, temperature: float | Tensor) -> Tensor:
        """The loss against the features of all ranks, which are passed from rank to rank."""
        images, texts = promoted(images, texts)
        ranks, stored = Ranks(), {"images": images.dtype, "texts": texts.dtype}
        kernels = choose("ClipLoss", ("logsumexp", "logsumexp_grad_keys"), self.backend, (images, texts))
        images, texts = widened(images), widened(texts)
        scale = _number(1 / temperature, images)
        share = 1.0 if self.gather_with_grad else 1 / self.world_size
        if not self.local_loss:
            scale = _AveragedGradient.apply(scale, ranks, share)

        def one_way(query: Tensor, keys: Tensor, *dtypes: torch.dtype) -> Tensor:
            if self.local_loss and not self.gather_with_grad:
                keys = keys.detach()
            lse = fused(RingLogSumExp, query, keys, scale, kernels, ranks, *dtypes)  # (B,)
            return -F.logsigmoid((query * keys).sum(1) * scale - lse).mean()

        image_way = one_way(images, texts, stored["images"], stored["texts"])
        loss = (image_way + one_way(texts, images, stored["texts"], stored["images"])) / 2
        return loss if self.local_loss else _OfAllRanks.apply(loss, ranks, share)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss () of B pairs, or a dict of it. image_features, text_features: (B, D), row b of both is a pair."""
        _check_pair("ClipLoss", image_features, text_features)
        temperature = 1 / checks.require_scalar("ClipLoss", "logit_scale", logit_scale, above=0)
        if self.world_size == 1:
            # Both directions add to the gradients of both arguments: in fp32, so that they are summed before they are rounded.
            images, texts = widened(image_features), widened(text_features)
            loss = (self._one_way(images, texts, temperature) + self._one_way(texts, images, temperature)) / 2
        else:
            loss = self._over_ranks(image_features, text_features, temperature)
        if isinstance(logit_bias, Tensor):
            # DistributedDataParallel raises an error for a parameter without gradient.
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """open_clip.SigLipLoss: the pairwise sigmoid loss of a batch.

        loss = mean over b of sum over k of softplus(-z_bk (logit_scale s_bk + logit_bias)),   z = 1 where b = k, else -1

    Call it with image_features and text_features (B, D), logit_scale, logit_bias, and optionally output_dict. Scale and bias
    are numbers, or 0-d tensors, which get gradients. A logit_bias of None means no bias.

    Parameters
    ----------
    cache_labels : bool
        Has no effect.
    rank, world_size : int
        As in open_clip, for the default process group: each rank's images are compared with the texts of all ranks, with
        gradient. All ranks must have the same number of rows.
    dist_impl : str, optional
        Has no effect: texts are always passed from rank to rank.
    backend : str, optional
        As in `info_nce`.

    References
    ----------
    Zhai et al. 2023 (arXiv 2303.15343).

    Examples
    --------
    >>> from negmine.adapters.open_clip import SigLipLoss
    >>> images, texts = F.normalize(torch.randn(2, 8, 16), dim=2).unbind()
    >>> loss = SigLipLoss()(images, texts, logit_scale=10.0, logit_bias=-10.0)
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        op = "SigLipLoss"
        checks.require_count(op, "world_size", world_size)
        checks.require_count(op, "rank", rank, 0)
        checks.require_choice(op, "dist_impl", dist_impl or "bidir", ("bidir", "shift", "reduce", "gather"))
        self.rank, self.world_size, self.backend = rank, world_size, backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss () of B pairs, or a dict of it. image_features, text_features: (B, D), row b of both is a pair."""
        _check_pair("SigLipLoss", image_features, text_features)
        logit_scale = checks.require_scalar("SigLipLoss", "logit_scale", logit_scale)
        if logit_bias is not None:
            logit_bias = checks.require_scalar("SigLipLoss", "logit_bias", logit_bias)
        bias: float | Tensor = 0.0 if logit_bias is None else logit_bias
        if self.world_size == 1:
            loss = siglip(image_features, text_features, scale=logit_scale, bias=bias, backend=self.backend)
        else:
            loss = self._over_ranks(image_features, text_features, logit_scale, bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _over_ranks(self, images: Tensor, texts: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
        """The loss against the texts of all ranks, which are passed from rank to rank."""
        images, texts = promoted(images, texts)
        stored = images.dtype, texts.dtype
        ops = ("softplus_sum", "softplus_sum_grad_keys")
        kernels = choose("SigLipLoss", ops, self.backend, (images, texts))
        images, texts = widened(images), widened(texts)
        numbers = _number(scale, images), _number(bias, images)
        total = fused(RingSoftplusSum, images, texts, *numbers, kernels, Ranks(), *stored)  # (B,)
        return (total - F.logsigmoid(numbers[0] * (images * texts).sum(1) + numbers[1])).mean()


def _number(value: float | Tensor, vectors: Tensor) -> Tensor:
    """A number or tensor as a 0-d tensor in the dtype of the vectors; a tensor keeps its gradient."""
    return torch.as_tensor(value, dtype=vectors.dtype, device=vectors.device)
