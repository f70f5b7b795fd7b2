"""Make .venv and install what the other make targets need: python3 -m build_tools.make_venv

If torch is already installed on the machine, the environment uses it, and nothing is installed that could replace it. Otherwise
the pinned torch is installed. If .venv exists, only missing packages are installed.
"""

import importlib.util
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ENVIRONMENT = Path(".venv")
PYTHON = ENVIRONMENT / "bin/python"
BUILD = ["setuptools", "wheel", "pybind11", "build"]
USE = [
    "numpy",
    "ml_dtypes",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "tqdm",
    "matplotlib",
    "ruff",
    "mypy",
    "clang-format",
]
BENCH = ["pytest-benchmark", "usearch"]
SEARCH = ["faiss-cpu", "safetensors", "pyarrow"]  # optional for users; the tests need them
DOCS = ["mkdocs", "mkdocs-material", "mkdocstrings-python"]
# Not in constraints.txt, because CUDA builds of torch require their own version of Triton.
TRITON = "triton==3.8.0"
# Packages with whose losses tests/test_adapters.py compares. Without their dependencies, which tests/peers.py replaces, they
# take 2 MB.
PEERS = ["pytorch-metric-learning", "lightly", "open_clip_torch"]


def run(*arguments: str) -> None:
    subprocess.run([str(PYTHON), *arguments], check=True)


def imports(module: str) -> bool:
    return subprocess.run([str(PYTHON), "-c", f"import {module}"], capture_output=True).returncode == 0


def main() -> None:
    machine_torch = importlib.util.find_spec("torch")
    if not PYTHON.exists():
        print(f"making {ENVIRONMENT} for Python {sysconfig.get_python_version()}", flush=True)
        venv.create(ENVIRONMENT, with_pip=True, system_site_packages=machine_torch is not None)
    pins = Path("constraints.txt").read_text().splitlines()
    if machine_torch and machine_torch.origin:
        pins = [pin for pin in pins if not pin.startswith(("torch==", "numpy=="))]
        if not imports("torch"):  # this Python is itself in an environment, and environments do not nest
            site = ENVIRONMENT / f"lib/python{sysconfig.get_python_version()}/site-packages"
            (site / "machine_torch.pth").write_text(f"{Path(machine_torch.origin).parents[1]}\n")
    constraints = ENVIRONMENT / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n")
    install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    torch = [] if machine_torch else ["torch"]
    wanted = [*torch, *BUILD, *USE, *BENCH, *SEARCH, *DOCS]
    print("installing", *wanted, *PEERS, flush=True)
    run(*install, "--constraint", str(constraints), *wanted)
    run(*install, "--constraint", str(constraints), "--no-deps", *PEERS)
    if not imports("triton"):
        print(f"installing {TRITON}", flush=True)
        run(*install, "--no-deps", TRITON)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"make venv: {' '.join(error.cmd[1:5])} ... failed; the reason is above.")
