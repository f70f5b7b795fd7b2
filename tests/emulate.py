"""The CUDA sources as C functions that run on the CPU: compiled by g++ against tests/emulator."""

import ctypes
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = ["-O1", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
SANITIZERS = os.environ.get("NEGMINE_EMULATOR_SANITIZERS", "undefined")  # what they find aborts


def build(source: str, folder: Path, *more: str) -> ctypes.CDLL:
    """tests/emulator/<source>.cpp as a library in the folder, compiled with more flags where they are given."""
    library = folder / f"{source}.so"
    flags = [*FLAGS, *more, f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover", "-Itests/emulator", "-I."]
    subprocess.run(["g++", *flags, f"tests/emulator/{source}.cpp", "-o", str(library)], cwd=ROOT, check=True)
    return ctypes.CDLL(str(library))
