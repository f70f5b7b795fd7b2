"""Compiles the CUDA sources with g++ against tests/emulator, as C functions that run on the CPU."""

import ctypes
import os
import subprocess
from pathlib import Path

import torch

from negmine.ops.pool import Pool
from tests.ptx import cuda_kernels

ROOT = Path(__file__).parents[1]
FLAGS = ["-O1", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off", "-shared", "-fPIC",
         "-fno-gnu-unique"]  # each library has variables of its own  # fmt: skip
SANITIZERS = os.environ.get("NEGMINE_EMULATOR_SANITIZERS", "undefined")  # what they find aborts

# How the kernels of a source run in a test, and what chooses it: by fibers that know what is documented of each instruction, or,
# as PTX, by the machine of tests/ptx; in either of their products.
SM90A, ELSEWHERE = "-D__CUDA_ARCH_FEAT_SM90_ALL", "-DNEGMINE_LAUNCHES_ELSEWHERE"
PRODUCTS = {
    "emulated": (), "emulated_sm90a": (SM90A,), "compiled_sm80": (ELSEWHERE,), "compiled_sm90a": (ELSEWHERE, SM90A),
}  # fmt: skip

STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def build(source: str, folder: Path, *more: str) -> ctypes.CDLL:
    """tests/emulator/<source>.cpp as a library in the folder, compiled with more flags where they are given."""
    library = folder / f"{source}.so"
    flags = [*FLAGS, *more, f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover", "-Itests/emulator", "-I."]
    subprocess.run(["g++", *flags, f"tests/emulator/{source}.cpp", "-o", str(library)], cwd=ROOT, check=True)
    built = ctypes.CDLL(str(library))
    if ELSEWHERE in more:
        cuda_kernels.attach(
            built, library, ROOT / f"tests/emulator/{source}.cpp", "sm_90a" if SM90A in more else "sm_80"
        )
    return built


def pointer(tensor):
    if tensor is not None:
        cuda_kernels.allow(tensor)
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def pool_of(query, keys, **given):
    """The pool arguments of an op, from a caller's masks, tags and bounds."""
    return Pool(**{name: t.contiguous() if isinstance(t, torch.Tensor) else t for name, t in given.items()})


def pool_arguments(pool):
    """The same as the emulated functions take them."""
    mask, query_ids, negative_ids, query_labels, negative_labels, lower, upper, num_rows, *_, same_label = pool
    key_mask, pair_mask = (mask, None) if mask is None or mask.dim() == 1 else (None, mask)
    return [
        pointer(key_mask), pointer(pair_mask), ctypes.c_int64(0 if pair_mask is None else pair_mask.stride(0)),
        *map(pointer, (query_ids, negative_ids, query_labels, negative_labels)), ctypes.c_bool(same_label),
        pointer(lower), pointer(upper), pointer(num_rows),
    ]  # fmt: skip


def on_gpu(tensor):
    """A copy with the same strides."""
    if tensor is None or isinstance(tensor, bool):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda").copy_(tensor)
