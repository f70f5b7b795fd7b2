"""Run the CPU kernels for ARM on an emulator and compare them with the portable ones: python -m build_tools.arm

It builds tests/stress/instruction_sets.cpp with a cross compiler (Debian: g++-aarch64-linux-gnu) and runs it under user-mode
emulation (qemu-user). Then it prints how many instructions a score takes in the inner loop of each instruction set, which is the
only information about speed that can be had without such a processor. On an ARM machine it needs neither tool.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from .extensions import CXX_FLAGS, Build
from .native import BuildError, Unit, compile_all, link

PROGRAM = Path("build/arm/instruction_sets")
D = 128  # elements of a vector in the table
# The instruction of the inner loop that adds products, and how many products it adds.
PRODUCTS = {
    "neon": (r"^fmla", 4),
    "neonbf16": (r"^bfmmla", 16),
    "avx2": (r"^vfmadd", 8),
    "avx512": (r"^vfmadd", 16),
    "avx512bf16": (r"^vdpbf16ps", 32),
}
BRANCH = re.compile(r"^(?:b\.\w+|cbn?z|tbn?z|j[a-z]+)\b.*?\b([0-9a-f]+) <")


def tool(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"make test-arm: {name} is not installed (Debian's package {package}).")
    return found


def inner_loops(disassembly: str) -> list[list[str]]:
    """The instructions of every loop without a loop inside."""
    loops = []
    for function in disassembly.split("\n\n"):
        lines = re.findall(r"^\s+([0-9a-f]+):\t(.+)$", function, re.MULTILINE)
        place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        for i, (_, instruction) in enumerate(lines):
            jump = BRANCH.match(instruction)
            start = place.get(int(jump[1], 16), i + 1) if jump else i + 1
            body = [text for _, text in lines[start : i + 1]]
            if body and not any(BRANCH.match(text) for text in body[:-1]):
                loops.append(body)
    return loops


def instructions_per_score(objdump: str, unit: Unit, isa: str) -> float:
    """The number of instructions for one score, in the loop that adds the most products."""
    pattern, each = PRODUCTS[isa]
    command = [objdump, "-d", "--no-show-raw-insn", str(unit.object)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    products, length = max(
        (sum(bool(re.match(pattern, line)) for line in body) * each, -len(body)) for body in inner_loops(text)
    )
    return -length / products * D


def table(objdump: str, units: list[Unit]) -> None:
    for unit in units:
        isa = next((word.split("=")[1] for word in unit.command if word.startswith("-DNEGMINE_SIMD=")), "")
        if unit.source == "kernels/cpu/simd/score.cpp" and isa in PRODUCTS:
            print(
                f"{isa:<12}{instructions_per_score(objdump, unit, isa):6.1f} instructions for a score of {D} elements"
            )


def main() -> None:
    here = platform.machine() in ("aarch64", "arm64")
    own = tool("objdump", "binutils")
    compiler = (
        shlex.split(os.environ.get("CXX", "g++")) if here else [tool("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")]
    )
    emulator = [] if here else [tool("qemu-aarch64", "qemu-user"), "-cpu", "max"]
    native = Build(None)
    cross = Build(None)
    cross.cxx = compiler
    kernels = cross.cpu_kernels("aarch64")
    units = [*kernels, Unit("tests/stress/instruction_sets.cpp", (*compiler, *CXX_FLAGS))]
    try:
        compile_all(units)
        link([*compiler, "-static"], units, ["-lpthread"], PROGRAM)
    except BuildError as error:
        raise SystemExit(f"make test-arm: {error}") from None
    done = subprocess.run([*emulator, str(PROGRAM)])
    if done.returncode:
        raise SystemExit("make test-arm: an instruction set disagrees with the portable one")
    table(own if here else tool("aarch64-linux-gnu-objdump", "binutils-aarch64-linux-gnu"), kernels)
    if not here:
        table(own, [unit for unit in native.cpu_kernels() if unit.object.exists()])


if __name__ == "__main__":
    main()
