"""Compile and link the C++ and CUDA sources.

The file name of an object contains a digest of the command that made it, and its depfile lists the files it was made from. So a
source is compiled once for all extensions and build variants with the same flags, changes of flags and headers are always
noticed, and a rebuild without changes takes no time. The ptxas logs are next to the objects, in *.ptxas.txt.
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
    """A compiler failed, or something was requested that cannot be built on this machine."""


@dataclass(frozen=True)
class Unit:
    """A source and the command that compiles it to an object file, without input and outputs."""

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
        temporary = self.object.with_suffix(
            f".{os.getpid()}.tmp"
        )  # so that a killed compiler does not leave a partial object
        outputs = ["-c", self.source, "-o", str(temporary), "-MD", "-MF", str(self.object.with_suffix(".d"))]
        done = subprocess.run([*self.command, *outputs], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{shlex.join([*self.command, *outputs])}\n{done.stdout}{done.stderr}")
        if self.source.endswith(".cu"):
            self.object.with_suffix(".ptxas.txt").write_text(done.stderr)
            if SPILL.search(done.stderr):
                temporary.unlink()
                raise BuildError(
                    f"{self.source}: ptxas spills registers or warns of a loss of performance:\n{done.stderr}"
                )
        elif done.stderr:
            print(done.stderr)
        temporary.replace(self.object)


def jobs() -> int:
    asked = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not asked.isdigit() or asked == "0":
        raise BuildError(f"MAX_JOBS must be a positive integer, but is {asked!r}.")
    return int(asked)


def compile_all(units: list[Unit]) -> None:
    """Compile every unit that is not current, several at a time."""
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
    # The old file is replaced, not overwritten, because a process may have it mapped.
    temporary = output.with_suffix(f".{os.getpid()}.tmp")
    line = [*command, *(str(unit.object) for unit in units), *libraries, "-o", str(temporary)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{shlex.join(line)}\n{done.stdout}{done.stderr}")
    temporary.replace(output)
