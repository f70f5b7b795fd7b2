"""Find nvcc and its headers and libraries, and decide whether CUDA kernels are built.

NEGMINE_CUDA    auto (default): build them if nvcc is found; cpu: do not; cu130, cu132, ...: build them with this version, or fail
NEGMINE_ARCHES  default 80;90a;100; the highest one without a letter is also stored as PTX, for later GPUs
NEGMINE_NVCC    the compiler; default: that of CUDA_HOME, otherwise the one on PATH
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .native import BuildError

FIRST_WITH_SM_100 = (12, 8)


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    version: tuple[int, int]
    arches: tuple[str, ...]
    include: str
    library: str  # the folder of libcudart_static.a

    @property
    def tag(self) -> str:
        return "cu" + "".join(map(str, self.version))

    @property
    def gencode(self) -> list[str]:
        plain = max((arch for arch in self.arches if arch.isdigit()), key=int, default=None)
        flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.arches]
        return flags + ([f"-gencode=arch=compute_{plain},code=compute_{plain}"] if plain else [])


def find_nvcc() -> str | None:
    if asked := os.environ.get("NEGMINE_NVCC"):
        if not shutil.which(asked):
            raise BuildError(f"NEGMINE_NVCC must name the CUDA compiler, but {asked!r} is not an executable file.")
        return asked
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc")


def chosen_toolkit() -> Toolkit | None:
    """The toolkit that NEGMINE_CUDA asks for, or None for a build without CUDA."""
    asked = os.environ.get("NEGMINE_CUDA") or "auto"
    if not re.fullmatch(r"auto|cpu|cu\d{3}", asked):
        raise BuildError(f"NEGMINE_CUDA must be auto, cpu or a version such as cu130, but is {asked!r}.")
    nvcc = None if asked == "cpu" else find_nvcc()
    if nvcc is None:
        if asked in ("auto", "cpu"):
            return None
        raise BuildError(
            f"NEGMINE_CUDA={asked} needs nvcc, found by NEGMINE_NVCC, CUDA_HOME or PATH, but there is none."
        )
    toolkit = inspect(nvcc)
    if asked not in ("auto", toolkit.tag):
        raise BuildError(f"NEGMINE_CUDA={asked} was asked for, but {nvcc} is {toolkit.tag}.")
    return toolkit


def inspect(nvcc: str) -> Toolkit:
    banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", banner)
    if not found:
        raise BuildError(f"{nvcc} --version names no release: {banner!r}.")
    version = (int(found[1]), int(found[2]))
    default = "80;90a;100" if version >= FIRST_WITH_SM_100 else "80;90a"
    arches = tuple((os.environ.get("NEGMINE_ARCHES") or default).replace(",", ";").split(";"))
    for arch in arches:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise BuildError(f"NEGMINE_ARCHES must be compute capabilities such as 80;90a;100, but contains {arch!r}.")
    # nvcc on PATH may be a script, so the toolkit may be in another folder. The compiler itself knows where.
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dryrun, re.M)
    if not top:
        raise BuildError(f"{nvcc} --dryrun names no TOP, so the toolkit's headers and libraries are unknown.")
    root = Path(top[1].strip()).resolve()
    include = folder_of("cuda_runtime.h", root, ("include",), nvcc)
    library = folder_of("libcudart_static.a", root, ("lib64", "lib"), nvcc)
    return Toolkit(nvcc, version, arches, include, library)


def folder_of(name: str, root: Path, folders: tuple[str, ...], nvcc: str) -> str:
    for place in [root, *sorted(root.glob("targets/*"))]:
        for folder in folders:
            if (place / folder / name).exists():
                return str(place / folder)
    raise BuildError(f"{nvcc} belongs to {root}, but {name} is not there.")
