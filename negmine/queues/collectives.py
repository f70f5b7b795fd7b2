"""What ranks exchange: rows of every rank in rank order."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(rows: Tensor, group: Any, counts: list[int] | None = None) -> Tensor:
    """The rows of every rank in rank order; ranks may hold different numbers of them, `counts` where they are known."""
    world = dist.get_world_size(group)
    if counts is None:
        size = torch.tensor([len(rows)], device=rows.device)
        sizes = [torch.zeros_like(size) for _ in range(world)]
        dist.all_gather(sizes, size, group=group)
        counts = [int(s) for s in sizes]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
