"""The three extension modules: their sources, compiler flags and libraries.

    negmine._ops_cpu    ops over kernels/cpu by torch's stable ABI; negmine/ops declares them
    negmine._ops_cuda   ops over kernels/cuda by torch's stable ABI; it is linked to a stub of libtorch_cuda.so, so that it
                        loads if torch has CUDA and raises ImportError otherwise
    negmine._C          pybind11; it uses neither headers nor libraries of torch

Because they use the stable ABI (torch 2.10) and the limited API (Python 3.10), one binary of the first two works with every
torch from 2.10 on. Flags belong to folders, not to extensions: kernels/cpu is compiled once and linked into _ops_cpu and _C.
"""

import importlib.util
import os
import platform
import shlex
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .cuda_toolkit import Toolkit
from .native import BuildError, Unit, link

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "amxbf16": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# Without this flag, gcc schedules for ARM before it allocates registers, and spills accumulators.
NEON = ["-DNEGMINE_NEON", "-fno-schedule-insns"]
ARM_FLAGS = {"neon": NEON, "neonbf16": [*NEON, "-march=armv8.2-a+bf16"]}
ISA_FLAGS = {
    "x86_64": X86_FLAGS,
    "aarch64": ARM_FLAGS,
    "arm64": ARM_FLAGS,
}  # by machine, in addition to the portable set
EMULATED_TILES = "-DNEGMINE_EMULATED_TILES"
CXX_FLAGS = ["-O3", "-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden", "-fPIC", "-Wall", "-I."]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-DTORCH_STABLE_ONLY", "-DPy_LIMITED_API=0x030A0000"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "-I.", "-Xcompiler=-fPIC,-fvisibility=hidden"]
PTXAS_FLAGS = ["-Xptxas=-v,-warn-spills,-warn-lmem-usage"]


def package_folder(name: str) -> Path:
    """Where a package is installed, without importing it (torch takes seconds)."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise BuildError(f"The build needs {name}, but this Python has none.")
    return Path(spec.origin).parent.resolve()  # resolved, as in the names of headers whose prefix is removed


@dataclass
class Build:
    """The units and link commands of all extensions, with a CUDA toolkit or without."""

    toolkit: Toolkit | None

    @cached_property
    def cxx(self) -> list[str]:
        return shlex.split(os.environ.get("CXX", "g++"))

    @cached_property
    def torch(self) -> Path:
        return package_folder("torch")

    @cached_property
    def pybind11_include(self) -> Path:
        # torch contains a copy of pybind11's headers, which is used if pybind11 is not installed. One translation unit must
        # never include both.
        own = importlib.util.find_spec("pybind11")
        return package_folder("pybind11") / "include" if own else self.torch / "include"

    @property
    def python_include(self) -> list[str]:
        return [f"-I{sysconfig.get_path('include')}"]

    def cpu_kernels(self, machine: str = platform.machine()) -> list[Unit]:
        # Baseline code comes first. If translation units share an inline function, the linker keeps the first copy, which must
        # not be an AVX-512 copy, because every processor runs it.
        once = [Unit(source, (*self.cxx, *CXX_FLAGS)) for source in glob("kernels/cpu/*.cpp")]
        isas = {"portable": [], **ISA_FLAGS.get(machine, {})}
        if os.environ.get("NEGMINE_EMULATED_TILES") == "1":  # for tests; compiles only the files that use tiles again
            isas["amxbf16"] = [*isas["amxbf16"], EMULATED_TILES]
            once = [
                Unit(unit.source, (*unit.command, EMULATED_TILES)) if unit.source.endswith("/dispatch.cpp") else unit
                for unit in once
            ]
        per_isa = [
            Unit(source, (*self.cxx, *CXX_FLAGS, f"-DNEGMINE_SIMD={isa}", *flags))
            for isa, flags in isas.items()
            for source in glob("kernels/cpu/simd/*.cpp")
        ]
        return once + per_isa

    def cuda_kernels(self) -> list[Unit]:
        assert self.toolkit
        command = (self.toolkit.nvcc, *NVCC_FLAGS, *PTXAS_FLAGS, *self.toolkit.gencode)
        return [Unit(source, command) for source in glob("kernels/cuda/*.cu")]

    def torch_ops(self, cuda: bool) -> list[Unit]:
        torch = [f"-isystem{self.torch}/include", f"-isystem{self.torch}/include/torch/csrc/api/include"]
        # Messages contain the paths of headers. Those of a wheel must not contain paths of the machine that built it.
        torch.append(f"-ffile-prefix-map={self.torch}/=torch/")
        command = [*self.cxx, *CXX_FLAGS, *STABLE_ABI, *self.python_include, *torch]
        if cuda:
            assert self.toolkit
            command += ["-DUSE_CUDA", f"-isystem{self.toolkit.include}"]
        sources = [source for source in glob("csrc/torch/*.cpp") if ("/ops_cuda" in source) == cuda]
        return [Unit(source, tuple(command)) for source in sources]

    def python_module(self) -> list[Unit]:
        version, arches = ("", "")
        if self.toolkit:
            version, arches = ".".join(map(str, self.toolkit.version)), ";".join(self.toolkit.arches)
        facts = [f'-DNEGMINE_CUDA_VERSION="{version}"', f'-DNEGMINE_CUDA_ARCHES="{arches}"']
        own = [f"-isystem{self.pybind11_include}", f"-ffile-prefix-map={self.pybind11_include}/="]
        command = [*self.cxx, *CXX_FLAGS, *facts, *self.python_include, *own]
        return [Unit(source, tuple(command)) for source in glob("csrc/python/*.cpp")]

    @cached_property
    def units(self) -> dict[str, list[Unit]]:
        """The units that each extension is linked from, by its name."""
        kernels = self.cpu_kernels()
        units = {"negmine._ops_cpu": self.torch_ops(cuda=False) + kernels, "negmine._C": self.python_module() + kernels}
        if self.toolkit:
            units["negmine._ops_cuda"] = self.torch_ops(cuda=True) + self.cuda_kernels()
        return units

    def link(self, name: str, output: Path) -> None:
        command = [*self.cxx, "-shared", "-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed"]
        libraries = []
        if name != "negmine._C":
            libraries += [f"-L{self.torch}/lib", "-ltorch_cpu"]
        if name == "negmine._ops_cuda":
            assert self.toolkit
            libraries = [f"-L{self.libtorch_cuda_stub()}", "-ltorch_cuda", *libraries]
            libraries += [f"-L{self.toolkit.library}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        link(command, self.units[name], libraries, output)

    def libtorch_cuda_stub(self) -> Path:
        """An empty libtorch_cuda.so to link to, because a CPU build of torch has none. The loader then finds that of torch."""
        folder = Path("build/stub")
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / "libtorch_cuda.so"
        if not library.exists():
            line = [
                *self.cxx,
                "-shared",
                "-fPIC",
                f"-Wl,-soname,{library.name}",
                "-x",
                "c++",
                os.devnull,
                "-o",
                str(library),
            ]
            subprocess.run(line, check=True)
        return folder


def glob(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path().glob(pattern))
