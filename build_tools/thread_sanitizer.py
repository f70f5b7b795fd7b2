"""Build tests/stress/threads.cpp with gcc's thread sanitizer and run it: python -m build_tools.thread_sanitizer [ROUNDS]

The kernels are compiled with the flags of the extensions and -fsanitize=thread. First, the sanitizer must find a deliberate race,
because a sanitizer that finds nothing would prove nothing.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from .extensions import CXX_FLAGS, Build
from .native import BuildError, Unit, compile_all, link

SANITIZE = "-g -fsanitize=thread"
PROGRAM = Path("build/threads")


def build() -> Path:
    os.environ["CXX"] = f"{os.environ.get('CXX', 'g++')} {SANITIZE}"
    made = Build(None)
    units = [*made.cpu_kernels(), Unit("tests/stress/threads.cpp", (*made.cxx, *CXX_FLAGS))]
    compile_all(units)
    link(made.cxx, units, ["-lpthread"], PROGRAM)
    return PROGRAM


def run(*arguments: str) -> subprocess.CompletedProcess:
    # Newer Linux kernels randomise addresses more than the sanitizer of older compilers supports.
    without_randomisation = [shutil.which("setarch"), platform.machine(), "-R"] if shutil.which("setarch") else []
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    return subprocess.run(
        [*without_randomisation, str(PROGRAM), *arguments], env=environment, capture_output=True, text=True
    )


def main(arguments: list[str]) -> None:
    try:
        build()
    except BuildError as error:
        raise SystemExit(f"make threads: {error}") from None
    control = run("1", "race")
    if control.returncode != 66 or "data race" not in control.stderr:
        raise SystemExit(f"make threads: the sanitizer did not find the deliberate race:\n{control.stderr}")
    done = run(*arguments)
    print(done.stdout, done.stderr, sep="", end="")
    if done.returncode:
        raise SystemExit("make threads: a race, or a result that differs between threads")
    print("no data race, and the deliberate one was found")


if __name__ == "__main__":
    main(sys.argv[1:])
