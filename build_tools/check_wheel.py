"""Check the contents of wheels: python -m build_tools.check_wheel WHEEL...

At its top level a wheel has only negmine and its metadata. It has exactly the extension modules of its variant, the Triton
kernels, and neither sources nor files of another build.
"""

import sys
import zipfile
from pathlib import Path, PurePosixPath

BUILD_INFO = "negmine/_build_info.py"


def faults(wheel: Path) -> list[str]:
    """What is wrong with the wheel, one sentence for each fault."""
    name, version, *_ = wheel.name.split("-")
    with zipfile.ZipFile(wheel) as archive:
        files = [PurePosixPath(file) for file in archive.namelist()]
        build_info = archive.read(BUILD_INFO).decode() if PurePosixPath(BUILD_INFO) in files else ""
        named = [str(file) for file in files if file.suffix == ".so" and b"-packages/" in archive.read(str(file))]
    found = [f"{', '.join(named)} contain paths of the machine that built them"] if named else []
    tops = {file.parts[0] for file in files}
    if tops != {"negmine", f"{name}-{version}.dist-info"}:
        found.append(f"its top level is {sorted(tops)}")
    expected = {"_C", "_ops_cpu"} if version.endswith("+cpu") else {"_C", "_ops_cpu", "_ops_cuda"}
    modules = sorted(str(file) for file in files if file.suffix == ".so")
    if {PurePosixPath(module).name.split(".")[0] for module in modules} != expected or len(modules) != len(expected):
        found.append(f"its extension modules are {modules}, not {sorted(expected)}")
    if f"VERSION = {version!r}" not in build_info:
        found.append(f"{BUILD_INFO} does not have version {version}")
    for file in ("negmine/__init__.py", "negmine/py.typed", "negmine/kernels/triton/__init__.py"):
        if PurePosixPath(file) not in files:
            found.append(f"{file} is missing")
    foreign = [str(file) for file in files if file.suffix in (".cpp", ".h", ".cu", ".cuh", ".o", ".pyc")]
    if foreign:
        found.append(f"it contains {foreign}")
    return found


def main(arguments: list[str]) -> None:
    for argument in arguments:
        wheel = Path(argument)
        if wrong := faults(wheel):
            raise SystemExit(f"{wheel.name}: " + "; ".join(wrong))
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, contents are correct")


if __name__ == "__main__":
    main(sys.argv[1:])
