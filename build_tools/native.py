"""Compile and link the C++ and CUDA sources.

An object's file name holds a digest of the command that made it, and its depfile lists what it was made from. So one
source compiled with the same flags is compiled once, whichever extension or build variant asks, a changed flag or
header is never missed, and a rebuild with nothing to do takes no time. ptxas logs stay beside the objects:
*.ptxas.txt.
"""

import hashlib
import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

OBJECTS = Path("build/objects")
SPILL = re.compile(r"[1-9]\d* bytes spill|Potential Performance Loss")


class BuildError(Exception):
    """A compiler refused, or the build was asked for something that this machine cannot make."""


@dataclass(frozen=True)
class Unit:
    """One object file to be: a source and the command that compiles it, without its input and outputs."""

    source: str
    command: tuple[str, ...]

    @property
    def object(self) -> Path:
        digest = hashlib.sha256(shlex.join([*self.command, self.source]).encode()).hexdigest()[:12]
        return OBJECTS / f"{self.source.replace('/', '.')}.{digest}.o"

    def is_current(self) -> bool:
        depfile = self.object.with_suffix(".d")
        if not (self.object.exists() and depfile.exists()):
            return False
        made = self.object.stat().st_mtime
        prerequisites = shlex.split(depfile.read_text().split(":", 1)[1].replace("\\\n", " "))
        return all(os.path.exists(path) and os.path.getmtime(path) <= made for path in prerequisites)

    def compile(self) -> None:
        temporary = self.object.with_suffix(f".{os.getpid()}.tmp")  # a killed compiler must not leave half an object
        outputs = ["-c", self.source, "-o", str(temporary), "-MD", "-MF", str(self.object.with_suffix(".d"))]
        done = subprocess.run([*self.command, *outputs], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{shlex.join([*self.command, *outputs])}\n{done.stdout}{done.stderr}")
        if self.source.endswith(".cu"):
            self.object.with_suffix(".ptxas.txt").write_text(done.stderr)
            if SPILL.search(done.stderr):
                temporary.unlink()
                raise BuildError(f"{self.source}: ptxas spills registers or gives up speed:\n{done.stderr}")
        elif done.stderr:
            print(done.stderr)
        temporary.replace(self.object)


def jobs() -> int:
    asked = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not asked.isdigit() or asked == "0":
        raise BuildError(f"MAX_JOBS must be a positive integer, but is {asked!r}.")
    return int(asked)


def compile_all(units: list[Unit]) -> None:
    """Every unit that is not current, several at a time, each once."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    todo = [unit for unit in dict.fromkeys(units) if not unit.is_current()]

    def compile_one(unit: Unit) -> None:
        print(
            f"compiling {unit.source}",
            *(word for word in unit.command if word.startswith("-DNEGMINE_SIMD")),
            flush=True,
        )
        unit.compile()

    with ThreadPoolExecutor(jobs()) as pool:
        list(pool.map(compile_one, todo))


def link(command: list[str], units: list[Unit], libraries: list[str], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    # Through a new file: a process that has the old one mapped keeps it.
    temporary = output.with_suffix(f".{os.getpid()}.tmp")
    line = [*command, *(str(unit.object) for unit in units), *libraries, "-o", str(temporary)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{shlex.join(line)}\n{done.stdout}{done.stderr}")
    temporary.replace(output)
