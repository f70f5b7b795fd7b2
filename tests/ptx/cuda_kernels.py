"""Run the PTX of kernels/cuda with the host code of kernels/cuda.

nvcc compiles the kernels to PTX. The host code is compiled with the headers of tests/emulator, which pass its launches to this
module, as the address of a kernel and the bytes of its parameters.
"""

import collections
import ctypes
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from build_tools.cuda_toolkit import find_nvcc
from build_tools.extensions import NVCC_FLAGS
from tests import ptx

ROOT = Path(__file__).parents[2]
LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_void_p, ctypes.c_int64
)
# Memory ranges of the tensors of recent calls.
_allowed: collections.deque[tuple[int, int]] = collections.deque(maxlen=40)


def allow(tensor: torch.Tensor) -> None:
    """Allow kernels to access the memory of a tensor."""
    memory = tensor.untyped_storage()
    _allowed.append((memory.data_ptr(), memory.data_ptr() + memory.nbytes()))


def compiler() -> tuple:
    """What decides the PTX of a kernel."""
    nvcc = find_nvcc()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    return version, *NVCC_FLAGS


def plain(names: list[str]) -> list[str]:
    """Demangle names, without the parts in which g++ and nvcc differ: each has its own word for an anonymous namespace."""
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", line) for line in said.splitlines()]


def attach(library: ctypes.CDLL, path: Path, source: Path, arch: str) -> None:
    """Make launches of this library, which was built from `source`, run the PTX of the .cu files that `source` includes.

    The PTX is kept beside the library.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc (NEGMINE_NVCC, CUDA_HOME, PATH)")
    texts = {}
    for number, kernels in enumerate(re.findall(r'#include "(kernels/cuda/\w+\.cu)"', source.read_text())):
        target = path.with_suffix(f".{number}.ptx")
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            command = [nvcc, *NVCC_FLAGS, "-ptx", f"-arch={arch}", kernels, "-o", str(unfinished)]
            subprocess.run(command, cwd=ROOT, check=True)
            unfinished.replace(target)
        found = ptx.entries(target.read_text())
        texts |= zip(plain(list(found)), found.values(), strict=True)
    said = subprocess.run(["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    symbols = [(int(line.split()[0], 16), line.split()[2]) for line in said.splitlines()]
    own = next(at for at, name in symbols if name == "emulated_launch_by")
    base = ctypes.cast(library.emulated_launch_by, ctypes.c_void_p).value - own
    names = dict(zip((base + at for at, _ in symbols), plain([name for _, name in symbols]), strict=True))
    programs: dict[int, ptx.Program] = {}

    def launch(kernel: int, numbers, parameters: int, size: int) -> int:
        try:
            if kernel not in programs:
                programs[kernel] = ptx.Program(texts[names[kernel]])
            x, y, threads, shared, room, bytes_, backwards = numbers[:7]
            ranges = [*_allowed, (room, room + bytes_)]
            grid, given = (x, y, 1), ctypes.string_at(parameters, size)
            programs[kernel].run(grid, threads, shared, given, ranges, backwards=bool(backwards))
        except BaseException:  # no exception may propagate through C code
            traceback.print_exc(file=sys.stderr)
            return 1  # cudaErrorInvalidValue
        return 0

    library.launcher = LAUNCHER(launch)  # keep it alive as long as the library
    library.emulated_launch_by(library.launcher)
