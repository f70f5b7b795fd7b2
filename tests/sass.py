"""Disassemble compiled kernels with the tools of Triton's package, find their loops, and count instructions."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple


def show(tool: str, *arguments: object, folder: Path | None = None) -> str:
    """Return the output of cuobjdump or nvdisasm."""
    import triton

    command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def functions(cubin: Path) -> dict[str, str]:
    """Return the machine code of each kernel in a file, by its mangled name."""
    parts = re.split(r"^//-+ \.text\.(\w+) -+$", show("nvdisasm", "-c", cubin), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def parsed(sass: str) -> tuple[list[str], dict[int, int]]:
    """Return the instructions of one kernel, and {index of a jump: index of its target}."""
    labels, code = {}, []
    for line in sass.splitlines():
        if m := re.match(r"^\s*(\.L_x_\d+):", line):
            labels[m[1]] = len(code)
        elif m := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(m[1])
    jumps = [(i, m[1]) for i, x in enumerate(code) if (m := re.search(r"(?:BRA|CALL.*NOINC).*?(\.L_x_\d+)", x))]
    return code, {i: labels[to] for i, to in jumps if to in labels}


def goes_on(instruction: str) -> bool:
    """Return whether the instruction after this one may be executed next."""
    return not re.match(r"(BRA(?!\.DIV|\.CONV)(?!.*P\d)|EXIT|RET)", instruction)


def loops(code: list[str], jumps: dict[int, int]) -> list[tuple[int, int]]:
    """Return the indices of the first and the last instruction of every loop.

    A backward jump closes a loop only if its target leads back to the jump. The compiler places code for diverged lanes at the
    end of a kernel; that code also ends with a backward jump, but it runs once.
    """

    def leads(begin: int, end: int) -> bool:
        seen, ahead = {begin}, [begin]
        for i in ahead:
            for j in (i + 1 if goes_on(code[i]) else begin, jumps.get(i, begin)):
                if j not in seen and j < len(code):
                    seen.add(j)
                    ahead.append(j)
        return end in seen

    return [(to, i) for i, to in jumps.items() if to < i and leads(to, i)]


def spans(code: list[str], jumps: dict[int, int]) -> list[tuple[int, int]]:
    """Return the indices of the first and the last instruction of every innermost loop.

    A loop with matrix products counts as innermost if no loop inside it has matrix products.
    """
    every = loops(code, jumps)
    multiply = [(a, b) for a, b in every if with_product([code[a : b + 1]])]

    def holds(outer: tuple[int, int], some: list[tuple[int, int]]) -> bool:
        return any(outer != x and outer[0] <= x[0] and x[1] <= outer[1] for x in some)

    return [x for x in every if not holds(x, multiply if x in multiply else every)]


def innermost(sass: str) -> list[list[str]]:
    """Return the instructions of each of these loops."""
    code, jumps = parsed(sass)
    return [code[a : b + 1] for a, b in spans(code, jumps)]


def multiplied(body: list[str]) -> int:
    """How many products of two numbers a warp computes with the tensor core instructions among these."""
    shapes = [m.groups() for x in body if (m := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", x))]
    by_warpgroups = sum(int(m) * int(n) * int(k) for m, n, k in shapes) // 4
    return by_warpgroups + 16 * 8 * 16 * sum("HMMA.16816" in x for x in body)


def outside_of_loops(sass: str) -> int:
    """Return the number of instructions of a kernel that are not in a loop."""
    code, jumps = parsed(sass)
    within = {place for start, end in loops(code, jumps) for place in range(start, end + 1)}
    return len(code) - len(within)


def shortest_iterations(sass: str) -> list[int]:
    """Return the number of instructions on the shortest path through one iteration, for each innermost loop with products.

    The shortest path jumps over code that rarely runs.
    """
    code, jumps = parsed(sass)
    found = []
    for start, end in spans(code, jumps):
        if not any("MMA" in x for x in code[start : end + 1]):
            continue
        fewest, ahead = {start: 1}, [start]
        for i in ahead:
            rare = re.match(r"CALL(?!.*P\d)", code[i])
            for j in [len(code) if rare or not goes_on(code[i]) else i + 1, jumps.get(i, len(code))]:
                if j not in fewest and j < len(code):
                    fewest[j] = fewest[i] + 1
                    ahead.append(j)
        found.append(fewest[end])
    return found


def products(sass: str) -> set[str]:
    """Return the tensor core instructions, without the width of their tile."""
    return {re.sub(r"x\d+x", "x", x) for x in re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)[\w.]*", sass)}


def with_product(every: list[list[str]]) -> list[int]:
    """Return the number of instructions of each loop that has products."""
    return [len(body) for body in every if any(re.search("GMMA|HMMA|UTC.*MMA|FFMA|v_mfma|v_wmma", x) for x in body)]


# Scores that one thread computes in an iteration of the innermost loop of kernels/cuda: for a chunk of keys, or on sm_90a, where
# warpgroups multiply, for a whole tile.
SCORES_PER_ITERATION = {"80": 32, "90a": 64, "100": 32}


class Scoring(NamedTuple):
    """One of the kernels of kernels/cuda that compute scores, for bf16 and D from 65 to 128."""

    kernel: str  # "scan": mine_hardest, "rank": rank_thresholds, "sum": logsumexp with its mean, "grad": logsumexp_grad_keys
    by_pair: bool  # whether it checks for every score whether the pair is in the pool
    brackets: int  # of "rank"; 1 for the others
    scores: int  # that one thread computes in an iteration of the innermost loop
    instructions: int  # of such an iteration


def scoring(name: str, code: str, capability: str) -> Scoring | None:
    """Identify the kernel by its mangled name, and count the instructions of its innermost loop. None for other kernels."""
    many = SCORES_PER_ITERATION[capability]
    if m := re.search(r"scan_kernel\w*E1ELi8ELb([01])ELi([12])E", name):
        # The shortest iteration: no cut changes because of equal scores.
        return Scoring("rank", m[1] == "1", int(m[2]), 32 if m[1] == "1" else many, min(shortest_iterations(code)))
    if m := re.search(r"scan_kernel\w*E1ELi8ELb([01])E", name):
        # The shortest iteration: no cut changes because of equal scores, and no buffer becomes full.
        return Scoring("scan", m[1] == "1", 1, many, min(shortest_iterations(code)))
    if m := re.search(r"sum_kernel\w*E1ELi8ELb1ELb([01])E", name):
        return Scoring("sum", m[1] == "1", 1, many, min(shortest_iterations(code)))
    if m := re.search(r"grad_kernel\w*E1ELi8ELb([01])E", name):
        return Scoring("grad", m[1] == "1", 1, 32 if m[1] == "1" else many, min(shortest_iterations(code)))
    return None
