"""Compile the CUDA sources with g++ and the headers of tests/emulator, as C functions that run on the CPU."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from negmine.ops.pool import Pool
from tests.ptx import cuda_kernels

ROOT = Path(__file__).parents[1]
FLAGS = ["-O1", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off", "-shared", "-fPIC",
         "-fno-gnu-unique"]  # so that libraries do not share static variables  # fmt: skip
SANITIZERS = os.environ.get("NEGMINE_EMULATOR_SANITIZERS", "undefined")  # an error that they find aborts the process

# How a test runs the kernels of a source, and the flags for it. "emulated": compiled by g++, with one fiber for each CUDA thread
# and with each PTX instruction implemented as it is documented. "compiled": compiled by nvcc to PTX, which tests/ptx executes.
# Each exists for both kinds of matrix products: those of sm_80, and those of sm_90a.
SM90A, AS_PTX = "-D__CUDA_ARCH_FEAT_SM90_ALL", "-DNEGMINE_LAUNCHES_ELSEWHERE"
PRODUCTS = {
    "emulated": (), "emulated_sm90a": (SM90A,), "compiled_sm80": (AS_PTX,), "compiled_sm90a": (AS_PTX, SM90A),
}  # fmt: skip

STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@contextlib.contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def build(source: str, product: str = "emulated") -> ctypes.CDLL:
    """Load tests/emulator/<source>.cpp for one of PRODUCTS. Compiled, it is kept in build/ until a source changes."""
    more = PRODUCTS[product]
    flags = [*FLAGS, *more, f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover", "-Itests/emulator", "-I."]
    sources = [path for folder in ("kernels/cuda", "tests/emulator") for path in sorted((ROOT / folder).rglob("*.*"))]
    content = repr((flags, cuda_kernels.compiler())).encode() + b"".join(path.read_bytes() for path in sources)
    folder = ROOT / "build" / "emulator" / hashlib.sha256(content).hexdigest()[:16] / source
    library = folder / f"{product}.so"
    with _one_process_at_a_time(folder / product):
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            command = ["g++", *flags, f"tests/emulator/{source}.cpp", "-o", str(unfinished)]
            subprocess.run(command, cwd=ROOT, check=True)
            unfinished.replace(library)
        built = ctypes.CDLL(str(library))
        built.emulated_launches.restype = ctypes.c_int64
        if AS_PTX in more:
            cuda_kernels.attach(
                built, library, ROOT / f"tests/emulator/{source}.cpp", "sm_90a" if SM90A in more else "sm_80"
            )
    return built


def pointer(tensor):
    if tensor is not None:
        cuda_kernels.allow(tensor)
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def pool_of(query, keys, **given):
    """A Pool of the given masks, ids, labels and bounds, made contiguous."""
    return Pool(**{name: t.contiguous() if isinstance(t, torch.Tensor) else t for name, t in given.items()})


def pool_arguments(pool):
    """The fields of a pool as arguments of the emulated C functions."""
    mask, query_ids, negative_ids, query_labels, negative_labels, lower, upper, num_rows, *_, same_label = pool
    key_mask, pair_mask = (mask, None) if mask is None or mask.dim() == 1 else (None, mask)
    return [
        pointer(key_mask), pointer(pair_mask), ctypes.c_int64(0 if pair_mask is None else pair_mask.stride(0)),
        *map(pointer, (query_ids, negative_ids, query_labels, negative_labels)), ctypes.c_bool(same_label),
        pointer(lower), pointer(upper), pointer(num_rows),
    ]  # fmt: skip


class Mixing(ctypes.Structure):
    """kernels/cuda/mixing.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "N", "D")),
        *((name, ctypes.c_void_p) for name in ("query", "negative_keys", "hard_index")),
        *((name, ctypes.c_int64) for name in ("query_stride", "negative_keys_stride", "hard_index_stride")),
        *((name, ctypes.c_int32) for name in ("query_storage", "negative_keys_storage")),
        *((name, ctypes.c_int64) for name in ("pairs", "with_query")),
        *((name, ctypes.c_float) for name in ("pair_low", "pair_high", "query_low", "query_high")),
        ("distinct", ctypes.c_bool), ("quantiles", ctypes.c_void_p),
        ("seed", ctypes.c_uint32), ("step", ctypes.c_void_p), ("row_offset", ctypes.c_void_p),
    ]  # fmt: skip


def mixing_of(query, negative_keys, hard_index, draws):
    """Return the structure for the draw arguments of an op. It keeps their tensors alive."""
    *numbers, quantiles, seed, step, row_offset = draws
    tensors = query, negative_keys, hard_index
    mixing = Mixing(
        *(len(query), hard_index.shape[1], query.shape[1]),
        *(pointer(tensor).value for tensor in tensors),
        *(tensor.stride(0) for tensor in tensors),
        *(STORAGE[query.dtype], STORAGE[negative_keys.dtype], *numbers, pointer(quantiles).value),
        *(seed, pointer(step).value, pointer(row_offset).value),
    )
    mixing.tensors = *tensors, quantiles, step, row_offset
    return mixing


def on_gpu(tensor):
    """A copy on the GPU with the same strides."""
    if tensor is None or isinstance(tensor, bool):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda").copy_(tensor)
