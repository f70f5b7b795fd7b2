"""Sums over explicit lists of columns (B, M), one for each query, instead of over a pool with masks and bounds.

`over_lists(kernels)` returns kernels whose sums take Columns instead of a pool. Its index (B, M) int64 holds -1 for an empty
entry, and a column that occurs twice counts twice. The vectors (B, M, D) are gathered in pieces, so they are never all in memory.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine.ops.backends import Kernels
from negmine.ops.pool import pieces
from negmine.ops.vectors import disable_autocast

PIECE = 1 << 20  # how many numbers of gathered vectors are in memory at one time


def flat_rows(negative_keys: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The keys as one matrix, and the lists as row numbers of it. Keys (B, M, D) become (B * M, D)."""
    if negative_keys.dim() == 2:
        return negative_keys, index
    B, M, D = negative_keys.shape
    first = torch.arange(B, device=index.device)[:, None] * M  # (B, 1)
    return negative_keys.reshape(B * M, D), torch.where(index < 0, -1, index + first)


def gather_rows(keys: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of keys (K, D) at index (...) int64, as (..., D) in dtype, with zeros where index is -1."""
    if not len(keys):
        return keys.new_zeros(*index.shape, keys.shape[1], dtype=dtype)
    return keys[index.clamp_min(0)].to(dtype).masked_fill((index < 0)[..., None], 0.0)


def gathered_scores(kernels: Kernels, query: Tensor, negative_keys: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """The scores (B, M) fp32 of the listed columns, -inf for an empty entry."""
    keys, rows = flat_rows(negative_keys, index)
    return kernels.gathered_logsumexp(query, keys, rows, scale, False)[0]


def list_logsumexp(
    kernels: Kernels, query: Tensor, negative_keys: Tensor, scales: Tensor, pivot: Tensor | None, want_mean: bool,
    N: int, ranks: Tensor | None, index: Tensor, bias: Tensor | None, _same_label: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op logsumexp over lists. N must be 0 and ranks None."""
    keys, rows = flat_rows(negative_keys, index)
    results = [
        kernels.gathered_logsumexp(query, keys, rows, scale, want_mean and bias is None) for scale in scales.unbind(0)
    ]
    scores, present = results[0][0], index >= 0  # (B, M) each
    above = torch.zeros_like(present) if pivot is None else present & (scores > pivot[:, None])
    if bias is None:
        lse, mean = (torch.stack([result[part] for result in results]) for part in (1, 2))
    else:
        x = (scales[:, None, None] * scores.masked_fill(~present, 0.0) + bias).masked_fill(
            ~present, -torch.inf
        )  # (S, B, M)
        lse = torch.nn.functional.pad(x, (0, 1), value=-torch.inf).logsumexp(2)  # (S, B)
        p = (x - lse[:, :, None]).exp().masked_fill(~present, 0.0)  # (S, B, M)
        mean = x.new_zeros(len(scales), len(query) if want_mean else 0, query.shape[1])
        for b in pieces(index.shape[1] * query.shape[1], mean.shape[1], PIECE):
            with disable_autocast(query.device):
                mean[:, b] = torch.einsum("sbm,bmd->sbd", p[:, b], gather_rows(keys, rows[b], x.dtype))
    empty = scores.new_empty(len(query), 0)
    return lse, mean, present.sum(1), above.sum(1), empty, empty.long(), empty.long()


def _logits(kernels: Kernels, query: Tensor, keys: Tensor, rows: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """scale * s + bias (B, M), 0 for an empty entry."""
    x = scale * kernels.gathered_logsumexp(query, keys, rows, scale, False)[0].masked_fill(rows < 0, 0.0)
    return x if bias is None else x + bias.masked_fill(rows < 0, 0.0)


def list_logsumexp_grad_bias(
    kernels: Kernels, query: Tensor, negative_keys: Tensor, scale: Tensor, lse: Tensor, weight: Tensor, index: Tensor,
    bias: Tensor | None, _same_label: bool,
) -> Tensor:  # fmt: skip
    """weight_b times the softmax probability of each listed column (B, M), 0 for an empty entry."""
    keys, rows = flat_rows(negative_keys, index)
    p = (_logits(kernels, query, keys, rows, scale, bias) - lse[:, None]).exp()  # (B, M)
    return (p * weight[:, None]).masked_fill(index < 0, 0.0)


def list_logsumexp_grad_keys(
    kernels: Kernels, query: Tensor, negative_keys: Tensor, scale: Tensor, lse: Tensor, weight: Tensor, index: Tensor,
    bias: Tensor | None, same_label: bool,
) -> Tensor:  # fmt: skip
    keys, rows = flat_rows(negative_keys, index)
    each = list_logsumexp_grad_bias(kernels, query, negative_keys, scale, lse, weight, index, bias, same_label)
    return kernels.gathered_grad_keys(query, rows, each, keys.shape[0]).view(negative_keys.shape)


def list_softplus_sum(
    kernels: Kernels, query: Tensor, negative_keys: Tensor, scale: Tensor, offset: Tensor, want_sigmoid_keys: bool,
    index: Tensor, bias: Tensor | None, _same_label: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    keys, rows = flat_rows(negative_keys, index)
    absent = index < 0  # (B, M)
    x = _logits(kernels, query, keys, rows, scale, bias) + offset  # (B, M)
    sigmoid = x.sigmoid().masked_fill(absent, 0.0)  # (B, M)
    sigmoid_keys = x.new_zeros(len(query) if want_sigmoid_keys else 0, query.shape[1])
    for b in pieces(index.shape[1] * query.shape[1], len(sigmoid_keys), PIECE):
        with disable_autocast(query.device):
            sigmoid_keys[b] = torch.einsum("bm,bmd->bd", sigmoid[b], gather_rows(keys, rows[b], x.dtype))
    return (-F.logsigmoid(-x)).masked_fill(absent, 0.0).sum(1), sigmoid_keys, sigmoid.sum(1), (~absent).sum(1)


def list_softplus_sum_grad_bias(
    kernels: Kernels, query: Tensor, negative_keys: Tensor, scale: Tensor, offset: Tensor, weight: Tensor, index: Tensor,
    bias: Tensor | None, _same_label: bool,
) -> Tensor:  # fmt: skip
    """weight_b times the sigmoid of each listed column (B, M), 0 for an empty entry."""
    keys, rows = flat_rows(negative_keys, index)
    sigmoid = (_logits(kernels, query, keys, rows, scale, bias) + offset).sigmoid()  # (B, M)
    return (sigmoid * weight[:, None]).masked_fill(index < 0, 0.0)


def list_softplus_sum_grad_keys(
    kernels: Kernels, query: Tensor, negative_keys: Tensor, scale: Tensor, offset: Tensor, weight: Tensor, index: Tensor,
    bias: Tensor | None, same_label: bool,
) -> Tensor:  # fmt: skip
    keys, rows = flat_rows(negative_keys, index)
    each = list_softplus_sum_grad_bias(kernels, query, negative_keys, scale, offset, weight, index, bias, same_label)
    return kernels.gathered_grad_keys(query, rows, each, keys.shape[0]).view(negative_keys.shape)


class Columns(NamedTuple):
    """The argument that kernels over lists take instead of a Pool."""

    index: Tensor  # type: ignore[assignment]  # (B, M) int64, -1 = empty entry; hides tuple.index
    bias: Tensor | None = None  # (B, M) fp32, added to the logits
    same_label: bool = False


def over_lists(kernels: Kernels) -> Kernels:
    """Kernels with the sums of `kernels` over lists of columns."""
    return Kernels(**{op: partial(function, kernels) for op, function in LIST_SUMS.items()})


LIST_SUMS: dict[str, Any] = {
    "logsumexp": list_logsumexp,
    "logsumexp_grad_keys": list_logsumexp_grad_keys,
    "logsumexp_grad_bias": list_logsumexp_grad_bias,
    "softplus_sum": list_softplus_sum,
    "softplus_sum_grad_keys": list_softplus_sum_grad_keys,
    "softplus_sum_grad_bias": list_softplus_sum_grad_bias,
}
