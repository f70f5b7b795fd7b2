"""open_clip's losses by their own signatures, without their (B, B) matrices.

    from negmine.adapters.open_clip import ClipLoss       instead of   from open_clip import ClipLoss

open_clip itself is not imported. Values and gradients are those of open_clip_torch 3.3.0.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from negmine.losses.info_nce import info_nce
from negmine.losses.siglip import siglip
from negmine.ops import checks
from negmine.ops.vectors import widened
from negmine.options import Negatives


def _check_pair(op: str, image_features: Any, text_features: Any) -> None:
    checks.require_vectors(op, "image_features", image_features, "(B, D)", (2,))
    checks.require_vectors(op, "text_features", text_features, "(B, D)", (2,), image_features, "image_features")
    if image_features.shape != text_features.shape:
        raise checks.refuse(
            op, "text_features", f"of image_features' shape {tuple(image_features.shape)}", text_features
        )


def _gathered(features: Tensor, rank: int, world_size: int, with_grad: bool, own_grad: bool) -> Tensor:
    """features (B, D) of every rank (world_size * B, D); carries gradient to every rank, to this one alone, or to none."""
    if world_size == 1:
        return features
    if with_grad:
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(features))
    parts = [torch.empty_like(features) for _ in range(world_size)]
    dist.all_gather(parts, features.detach())
    if own_grad:
        parts[rank] = features
    return torch.cat(parts)


class ClipLoss(nn.Module):
    """open_clip.ClipLoss: the mean of image-to-text and text-to-image cross entropy within a batch.

        logits = logit_scale * image_features @ text_features.T + logit_bias

    local_loss: each rank takes the loss of its own rows against all. gather_with_grad: gradients travel back to other ranks;
    local_loss without it leaves out the gradient of a pair's other side, in open_clip as here. rank, world_size: as in open_clip;
    ranks hold equally many rows. cache_labels: accepted, there are no labels to cache. use_horovod: refused.
    forward(image_features, text_features (B, D), logit_scale, logit_bias=None, output_dict=False): unit vectors as open_clip's
    models return them; logit_scale a number or a 0-d tensor, which receives gradient. A bias that all logits share changes
    nothing: its gradient is 0. Returns the loss, or {"contrastive_loss": loss}.
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

    def _one_way(self, query: Tensor, keys: Tensor, first: int, temperature: float | Tensor) -> Tensor:
        """Rows of query against keys, whose rows [first, first + B) are the positives."""
        own = torch.arange(first, first + len(query), device=query.device)  # (B,)
        everyone = torch.arange(len(keys), device=query.device)  # (K,)
        positive_key = keys if len(keys) == len(query) else keys[first : first + len(query)]
        negatives = Negatives(keys, ids=everyone)
        return info_nce(query, positive_key, negatives, temperature=temperature, query_ids=own, backend=self.backend)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        _check_pair("ClipLoss", image_features, text_features)
        temperature = 1 / checks.require_scalar("ClipLoss", "logit_scale", logit_scale, above=0)
        gather = partial(
            _gathered,
            rank=self.rank,
            world_size=self.world_size,
            with_grad=self.gather_with_grad,
            own_grad=not self.local_loss,
        )
        # Both ways differentiate both: in fp32, so that each gradient is summed before it is rounded.
        image_features, text_features = widened(image_features), widened(text_features)
        images, texts = gather(image_features), gather(text_features)
        if self.local_loss and self.world_size > 1:
            first = self.rank * len(image_features)
            image_way = self._one_way(image_features, texts, first, temperature)
            text_way = self._one_way(text_features, images, first, temperature)
        else:
            image_way = self._one_way(images, texts, 0, temperature)
            text_way = self._one_way(texts, images, 0, temperature)
        loss = (image_way + text_way) / 2
        if isinstance(logit_bias, Tensor):
            loss = loss + 0.0 * logit_bias.sum()  # a parameter without any gradient would stop DistributedDataParallel
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """open_clip.SigLipLoss: the pairwise sigmoid loss of a batch (Zhai et al. 2023, arXiv 2303.15343).

        loss = mean over b of sum over k of softplus(-z_bk (logit_scale s_bk + logit_bias)),   z = 1 where b = k, else -1

    rank, world_size: each rank's images against every rank's texts, gradients included; ranks hold equally many rows. dist_impl:
    accepted, texts are gathered at once, whatever way open_clip passes them round. cache_labels: accepted.
    forward(image_features, text_features (B, D), logit_scale, logit_bias, output_dict=False): logit_scale and logit_bias are
    numbers, or 0-d tensors that receive gradient; None is no bias.
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
        _check_pair("SigLipLoss", image_features, text_features)
        logit_scale = checks.require_scalar("SigLipLoss", "logit_scale", logit_scale)
        if logit_bias is not None:
            logit_bias = checks.require_scalar("SigLipLoss", "logit_bias", logit_bias)
        texts = _gathered(text_features, self.rank, self.world_size, with_grad=True, own_grad=True)
        everyone = torch.arange(len(texts), device=texts.device)  # (K,)
        first = self.rank * len(image_features)
        loss = siglip(
            image_features,
            text_features,
            Negatives(texts, ids=everyone),
            scale=logit_scale,
            bias=0.0 if logit_bias is None else logit_bias,
            query_ids=everyone[first : first + len(image_features)],
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss
