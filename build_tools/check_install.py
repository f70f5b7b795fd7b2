"""Build, install and run negmine from an sdist, in fresh environments: python -m build_tools.check_install [PYTHON...]

PYTHON: interpreters with torch 2.10 or later, setuptools, wheel and pybind11; default: this one. For each of them, an sdist of
the checkout is unpacked in another folder and a wheel is built from it, with NEGMINE_CUDA and the other variables as for any
build. The contents of the wheel are checked, also by auditwheel and torch-abi-audit if they are installed. Then the wheel is
installed in a fresh environment that uses the torch of that interpreter, and its results are compared with the reference.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from .check_wheel import faults

NEEDED = ("torch", "numpy", "setuptools", "wheel", "pybind11")
SITES = "import sys; print(*(p for p in sys.path if p.endswith('-packages')), sep='\\n')"
PROGRAM = """
import torch, negmine, negmine._C
from negmine import doctor
from negmine.ops import backends
assert SITE in negmine.__file__, negmine.__file__
query, keys = torch.randint(-3, 4, (5, 8)).float(), torch.randint(-3, 4, (400, 8)).bfloat16()
mined = [negmine.mine_hardest(query, keys, 9, backend=b) for b in ("cpu", "reference")]
assert torch.equal(mined[0].index, mined[1].index) and torch.equal(mined[0].scores, mined[1].scores)
leaf = query.clone().requires_grad_()
negmine.info_nce(leaf, query, keys, select=negmine.Select(0, 0.1), backend="cpu").backward()
assert bool(leaf.grad.isfinite().all())
assert (negmine._C.mine_hardest(query.numpy(), keys.float().numpy(), 9)[1] == mined[1].index.numpy()).all()
cuda = next(row for row in backends.BACKENDS if row.name == "cuda")
print(f"torch {torch.__version__}: ops agree with the reference; cuda: {cuda.refusal or 'ready'}")
"""


class CheckFailed(Exception):
    """A check failed; the message says which."""


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Run a command and return what it prints. Raises CheckFailed with the end of its output if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise CheckFailed(f"{' '.join(map(str, command[:4]))} ... failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def make_sdist(folder: Path) -> Path:
    """Unpack an sdist of this checkout. Objects that are already compiled are copied, and used if they are current."""
    run(sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="tar")  # keeps the times of files, which tell whether an object is current
    source = next(path.parent for path in folder.glob("*/setup.py"))
    if Path("build/objects").is_dir():
        shutil.copytree("build/objects", source / "build/objects")
    return source


def build_wheel(python: str, source: Path, folder: Path) -> Path:
    """Build a wheel from the sdist with that interpreter, and check its contents."""
    missing = [name for name in NEEDED if not has(python, name)]
    if missing:
        raise CheckFailed(f"{python} does not have {', '.join(missing)}, and this check installs nothing into it.")
    flags = ["--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", folder]
    run(python, "-m", "pip", "wheel", *flags, source)
    wheel = next(folder.glob("*.whl"))
    if wrong := faults(wheel):
        raise CheckFailed(f"{wheel.name}: {'; '.join(wrong)}")
    return wheel


def has(python: str, module: str) -> bool:
    probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", probe], capture_output=True).returncode == 0


def audits(wheel: Path, folder: Path) -> list[str]:
    """One line for each of auditwheel and torch-abi-audit that is installed."""
    lines = []
    tools = Path(sys.executable).parent
    if (tools / "auditwheel").exists():
        shown = " ".join(run(tools / "auditwheel", "show", wheel).split())
        if tag := re.search(r'constrains the platform tag to "(\w+)"', shown):
            lines.append(f"auditwheel: {tag[1]}")
    if (tools / "torch-abi-audit").exists():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "unpacked")
        for library in sorted((folder / "unpacked/negmine").glob("_ops_*.so")):
            shown = run(tools / "torch-abi-audit", library)
            if not re.search(r"Torch ABI:\s+STABLE", shown):
                raise CheckFailed(f"torch-abi-audit does not find {library.name} stable:\n{shown}")
            lines.append(f"torch-abi-audit: {shown.strip().splitlines()[-1].strip()}")
    return lines


def install_and_run(python: str, wheel: Path, folder: Path) -> str:
    """Install the wheel in a fresh environment that uses the torch of that interpreter, and run PROGRAM there."""
    run(python, "-m", "venv", "--without-pip", folder / "env")
    second = folder / "env/bin/python"
    site = Path(run(second, "-c", SITES).split()[0])
    (site / "torch_of_the_first.pth").write_text(run(python, "-c", SITES))
    # All packages of the first environment can be imported too, but a negmine that is installed there must not be used.
    run(python, "-m", "pip", "--python", second, "install", "--quiet", "--no-deps", "--ignore-installed", wheel)
    return run(second, "-c", f"SITE = {str(folder)!r}\n{PROGRAM}", cwd=folder).strip()


def check(python: str, folder: Path) -> list[str]:
    """Do all checks for one interpreter, and return lines about the wheel."""
    wheel = build_wheel(python, make_sdist(folder), folder)
    return [
        f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB",
        *audits(wheel, folder),
        install_and_run(python, wheel, folder),
    ]


def main(pythons: list[str]) -> None:
    for python in pythons or [sys.executable]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(python, *check(python, Path(folder)), sep="\n    ", flush=True)
            except CheckFailed as error:
                raise SystemExit(f"check-wheel: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
