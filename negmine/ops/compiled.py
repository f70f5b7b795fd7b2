"""Loads the compiled libraries negmine._ops_cpu and negmine._ops_cuda, and keeps the reason if one cannot be loaded.

torch must be imported first, because the libraries are linked against it.
"""

import importlib
from collections.abc import Callable

import torch

from negmine.ops.registry import OPS, overload


def _load(module: str) -> str:
    """Import an extension. Returns the reason, as a sentence, if it cannot be loaded."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} did not load ({error}); build it with `make venv` or install a wheel"
    return ""


def _load_cuda() -> str:
    try:
        built = importlib.import_module("negmine._build_info").CUDA_VERSION
    except ImportError:
        return "negmine was not built: run `make venv` or install a wheel"
    if torch.version.hip:
        return f"its kernels do not run on AMD's GPUs, for which this torch {torch.__version__} was built"
    found = torch.version.cuda
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
CUDA_REFUSAL = _load_cuda()


def isa_for(query: torch.dtype, keys: torch.dtype) -> str:
    """The instruction set of the CPU kernels for these storage types, or "" if the kernels were not loaded."""
    names = (str(dtype).removeprefix("torch.") for dtype in (query, keys))
    return "" if CPU_REFUSAL else importlib.import_module("negmine._ops_cpu").isa_for(*names)


def functions(namespace: str, dispatch_key: str) -> dict[str, Callable]:
    """Op name -> function, for every declared op that has a kernel in the namespace under the dispatch key."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {op: overload(namespace, op) for op in OPS if has_kernel(f"{namespace}::{op}", dispatch_key)}
