"""The compiled ops under their names, and their fakes: torch.ops.negmine.* from negmine._ops_cpu and negmine._ops_cuda.

An extension that does not load leaves its reason in CPU_REFUSAL or CUDA_REFUSAL; negmine/backends.py repeats it to whoever
asks for that backend. torch must be imported first: the extensions take their symbols from its libraries.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

OPS = torch.ops.negmine


def _load(module: str) -> str:
    """Import an extension; the reason as a sentence where it does not load."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} did not load ({error}); build it with `make venv` or install a wheel"
    return ""


def _load_cuda() -> str:
    from negmine import _build_info  # written by the build, so it is there once _ops_cpu has loaded

    built, found = _build_info.CUDA_VERSION, torch.version.cuda
    if built is None:
        return "this build of negmine has no CUDA ops (NEGMINE_CUDA=cpu, or no nvcc when it was built)"
    if found is None:
        return f"negmine was built for CUDA {built} and this torch {torch.__version__} is a CPU build"
    if built.split(".")[0] != found.split(".")[0]:
        return f"negmine was built for CUDA {built} and this torch uses CUDA {found}: the major versions must agree"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _load("negmine._ops_cuda")


CPU_REFUSAL = _load("negmine._ops_cpu")
CUDA_REFUSAL = CPU_REFUSAL or _load_cuda()  # the schemas are declared in _ops_cpu


def isa_for(query: torch.dtype, keys: torch.dtype) -> str:
    """The instruction set of the CPU kernels for these storage types; "" where the kernels did not load."""
    names = (str(dtype).removeprefix("torch.") for dtype in (query, keys))
    return "" if CPU_REFUSAL else importlib.import_module("negmine._ops_cpu").isa_for(*names)


def launchers(dispatch_key: str) -> dict[str, Callable]:
    """Op name -> op, for every op that has a kernel under the dispatch key 'CPU' or 'CUDA'."""
    if CPU_REFUSAL or (dispatch_key == "CUDA" and CUDA_REFUSAL):
        return {}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {op: getattr(OPS, op).default for op in FAKES if has_kernel(f"negmine::{op}", dispatch_key)}


def _logsumexp(
    query: Tensor, negative_keys: Tensor, scale: Tensor, pivot: Tensor | None, want_mean: bool, *pool: Tensor | None
):
    B, D = query.shape
    row = query.new_empty(B, dtype=torch.float32)  # (B,)
    mean = query.new_empty(B if want_mean else 0, D, dtype=torch.float32)
    return row, mean, row.new_empty(B, dtype=torch.int64), row.new_empty(B, dtype=torch.int64)


def _logsumexp_pair(
    query: Tensor, negative_keys: Tensor, scale: Tensor, pivot: Tensor | None, want_mean: bool, *pool: Tensor | None
):
    B, D = query.shape
    kept = query.new_empty(B, dtype=torch.int64)  # (B,)
    mean = query.new_empty(2, B if want_mean else 0, D, dtype=torch.float32)
    return mean.new_empty(2, B), mean, kept, torch.empty_like(kept)


def _logsumexp_mine(
    query: Tensor,
    negative_keys: Tensor,
    N: int,
    scale: Tensor,
    pivot: Tensor | None,
    want_mean: bool,
    *pool: Tensor | None,
):
    return *_logsumexp(query, negative_keys, scale, pivot, want_mean), *_mine_hardest(query, negative_keys, N)


def _logsumexp_window(
    query: Tensor,
    negative_keys: Tensor,
    ranks: Tensor,
    scale: Tensor,
    pivot: Tensor | None,
    want_mean: bool,
    *pool: Tensor | None,
):
    return *_logsumexp(query, negative_keys, scale, pivot, want_mean), torch.empty_like(ranks)  # (B, 2)


def _logsumexp_grad_keys(
    query: Tensor, negative_keys: Tensor, scale: Tensor, lse: Tensor, weight: Tensor, *pool: Tensor | None
):
    return negative_keys.new_empty(negative_keys.shape, dtype=torch.float32)  # (K, D)


def _softplus_sum(
    query: Tensor, negative_keys: Tensor, scale: Tensor, bias: Tensor, want_pull: bool, *pool: Tensor | None
):
    B, D = query.shape
    row = query.new_empty(B, dtype=torch.float32)  # (B,)
    pull = query.new_empty(B if want_pull else 0, D, dtype=torch.float32)
    return row, pull, torch.empty_like(row), row.new_empty(B, dtype=torch.int64)


def _softplus_sum_grad_keys(
    query: Tensor, negative_keys: Tensor, scale: Tensor, bias: Tensor, weight: Tensor, *pool: Tensor | None
):
    return negative_keys.new_empty(negative_keys.shape, dtype=torch.float32)  # (K, D)


def _mine_hardest(query: Tensor, negative_keys: Tensor, N: int, *pool: Tensor | None):
    shape = (query.shape[0], N)
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.int64)


def _mine_hardest_kept(query: Tensor, negative_keys: Tensor, N: int, *pool: Tensor | None):
    scores, index = _mine_hardest(query, negative_keys, N)
    return scores, index, query.new_empty(query.shape[0], dtype=torch.int64)


def _mine_listed(query: Tensor, negative_keys: Tensor, index: Tensor, N: int, most: Tensor | None):
    return _mine_hardest_kept(query, negative_keys, N)


def _rank_thresholds(query: Tensor, negative_keys: Tensor, ranks: Tensor, *pool: Tensor | None):
    return torch.empty_like(ranks)  # (B, R)


def _count_negatives(query: Tensor, negative_keys: Tensor, *pool: Tensor | None):
    return query.new_empty(query.shape[0], dtype=torch.int64)  # (B,)


def _mix_negatives(query: Tensor, negative_keys: Tensor, hard_index: Tensor, pairs: int, with_query: int, *draws):
    B, D = query.shape
    S = pairs + with_query
    parents = query.new_empty(B, S, 2, dtype=torch.int64)
    return query.new_empty(B, S, D), parents, query.new_empty(B, S, dtype=torch.float32)


def _mix_logsumexp(query: Tensor, negative_keys: Tensor, hard_index: Tensor, scale: Tensor, want_mean: bool, *draws):
    B, D = query.shape
    return query.new_empty(B, dtype=torch.float32), query.new_empty(B if want_mean else 0, D, dtype=torch.float32)


def _listed_logsumexp(query: Tensor, negative_keys: Tensor, index: Tensor, scale: Tensor, want_mean: bool):
    B, D = query.shape
    row = query.new_empty(B, dtype=torch.float32)  # (B,)
    return row.new_empty(index.shape), row, row.new_empty(B if want_mean else 0, D)


def _listed_grad_keys(query: Tensor, index: Tensor, weight: Tensor, K: int):
    return weight.new_empty(K, query.shape[1])  # (K, D)


FAKES: dict[str, Callable] = {
    "logsumexp": _logsumexp,
    "logsumexp_pair": _logsumexp_pair,
    "logsumexp_mine": _logsumexp_mine,
    "logsumexp_window": _logsumexp_window,
    "logsumexp_grad_keys": _logsumexp_grad_keys,
    "softplus_sum": _softplus_sum,
    "softplus_sum_grad_keys": _softplus_sum_grad_keys,
    "mine_hardest": _mine_hardest,
    "mine_hardest_kept": _mine_hardest_kept,
    "mine_listed": _mine_listed,
    "rank_thresholds": _rank_thresholds,
    "count_negatives": _count_negatives,
    "mix_negatives": _mix_negatives,
    "mix_logsumexp": _mix_logsumexp,
    "listed_logsumexp": _listed_logsumexp,
    "listed_grad_keys": _listed_grad_keys,
}
if not CPU_REFUSAL:
    for _name, _fake in FAKES.items():
        torch.library.register_fake(f"negmine::{_name}", _fake)
