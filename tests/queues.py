"""Queues that are difficult for kernels that look at a sample of the queue first."""

import torch

from tests.cases import whole

QUEUES = (
    "all equal",
    "two values",
    "clustered",
    "shuffled clusters",
    "hard between samples",
    "easy between samples",
    "few at the end",
)


def sampled_columns(K, size):
    """The columns that the CUDA kernels sample (kernels/cuda/sample.cuh)."""
    at = torch.arange(size)
    first, after = at * K // size, (at + 1) * K // size
    return first + ((after - first) * (at * 0x9E3779B9 % 2**32) >> 32)


def queue(kind, K, D, least_sample, columns=sampled_columns):
    """Queues for which a sample is misleading. They have small integers, so that results are exact."""
    keys = whole(K, D, seed=1)
    sampled = columns(K, least_sample)
    if kind == "all equal":
        keys = keys[:1].expand(K, D).contiguous()
    if kind == "two values":
        keys = keys[torch.arange(K) % 2]
    if kind == "clustered":
        keys = whole(10, D, seed=1).repeat_interleave(K // 10 + 1, 0)[:K]
    if kind == "shuffled clusters":
        keys = whole(10, D, seed=1)[torch.randint(10, (K,), generator=torch.Generator().manual_seed(3))]
    if kind == "hard between samples":
        keys = keys.abs() + 1
        keys[sampled] *= -1
    if kind == "easy between samples":
        keys = -keys.abs() - 1
        keys[sampled] *= -1
    if kind == "few at the end":
        keys[: K - 10] = 0
    return keys
