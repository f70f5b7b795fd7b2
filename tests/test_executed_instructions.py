"""The number of instructions that the AMX kernels execute for a score, counted on any processor with AVX512-BF16.

tests/stress/executed_instructions.cpp runs a call of the released kernels instruction by instruction, and emulates the tile
instructions. The counts are the difference between two calls, the second with twice as many keys, so that instructions
that run once per call do not count.
"""

import platform
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from build_tools.extensions import CXX_FLAGS, EMULATED_TILES, Build
from build_tools.native import Unit, compile_all, link

SOURCE = "tests/stress/executed_instructions.cpp"
B, K, D = 512, 128, 128


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not Path(SOURCE).exists() or shutil.which("g++") is None or shutil.which("objdump") is None:
        pytest.skip("needs the sources, g++ and objdump")
    if platform.machine() != "x86_64" or "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX512-BF16")
    kernels = [  # with emulated tiles, AMX kernels are chosen on any processor
        Unit(unit.source, (*unit.command, EMULATED_TILES)) if unit.source.endswith("/dispatch.cpp") else unit
        for unit in Build(None).cpu_kernels()
    ]
    units = [*kernels, Unit(SOURCE, ("g++", *CXX_FLAGS))]
    compile_all(units)
    made = tmp_path_factory.mktemp("steps") / "executed_instructions"
    link(["g++", "-static", "-no-pie"], units, ["-lpthread"], made)
    return made


@pytest.fixture(scope="module")
def instructions(program):
    """Return {address: kind of instruction}."""
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", program], capture_output=True, text=True, check=True)
    lines = re.findall(r"^\s+([0-9a-f]+):\t(.+)$", text.stdout, re.MULTILINE)
    return {address: kind_of(instruction) for address, instruction in lines}


def kind_of(instruction: str) -> str:
    name = instruction.split(maxsplit=1)[0]
    for start, kind in (("tdp", "product"), ("tileload", "tile load"), ("tilestore", "tile store")):
        if name.startswith(start):
            return kind
    return "vector" if name.startswith("v") and re.search("%[xyz]mm", instruction) else "other"


def executed(program, instructions, op: str, keys: int) -> Counter:
    command = [program, op, "bf16", "bf16", str(B), str(keys), str(D)]
    off, *lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert float(off) < 1e-5  # the log-sum-exp is about 9
    counts: Counter = Counter()
    for address, count in map(str.split, lines):
        counts[instructions.get(address, "other")] += int(count)
    return counts


# For each score, these kernels execute 0.96 vector and 0.56 other instructions for the log-sum-exp, and 1.39 and 0.87 with the
# gradient. A prototype with compile-time sizes, without masks and odd shapes, executes 0.82 and 0.27 for the log-sum-exp, 1.16
# and 0.40 with the gradient, and the same tile instructions.
@pytest.mark.parametrize(
    ("op", "products", "loads", "stores", "vector", "other"),
    [("logsumexp", 16, 16, 4, 1.0, 0.6), ("gradient", 32, 36, 8, 1.45, 0.95)],
)
def test_a_score_takes_few_instructions_in_tiles(program, instructions, op, products, loads, stores, vector, other):
    """Tile instructions are counted per 32 x 32 scores, the others per score."""
    more, less = (executed(program, instructions, op, rows) for rows in (2 * K, K))
    counts = {kind: (more[kind] - less[kind]) / (B * K) for kind in more}
    assert [1024 * counts[kind] for kind in ("product", "tile load", "tile store")] == [products, loads, stores]
    assert counts["vector"] <= vector
    assert counts["other"] <= other
