"""Build negmine: the Python package and its extension modules. Its name, dependencies and tools are in pyproject.toml.

NEGMINE_CUDA=auto|cpu|cu130|...   which CUDA version; NEGMINE_ARCHES, NEGMINE_NVCC, CUDA_HOME: see build_tools/cuda_toolkit.py
MAX_JOBS                          number of compilers at a time; default: the number of cores

Each variant has its own build folder, which is emptied first, so that no stale file gets into a wheel. Objects are shared between
variants (build_tools/native.py).
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))  # a PEP 517 front end does not put this folder there

from build_tools.cuda_toolkit import chosen_toolkit  # noqa: E402
from build_tools.extensions import CXX_FLAGS, NVCC_FLAGS, Build  # noqa: E402
from build_tools.native import BuildError, compile_all  # noqa: E402

VERSION = runpy.run_path("negmine/version.py")["__version__"]
try:
    TOOLKIT = None if "sdist" in sys.argv else chosen_toolkit()
except BuildError as error:
    raise SystemExit(f"negmine: {error}") from None
VARIANT = TOOLKIT.tag if TOOLKIT else "cpu"
FULL_VERSION = VERSION if "sdist" in sys.argv else f"{VERSION}+{VARIANT}"  # an sdist is for all variants


def build_info() -> str:
    """The text of negmine/_build_info.py."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout if shutil.which("git") else ""
    facts = {
        "VERSION": FULL_VERSION,
        "COMMIT": commit.strip() or None,
        "CUDA_VERSION": ".".join(map(str, TOOLKIT.version)) if TOOLKIT else None,
        "CUDA_ARCHES": TOOLKIT.arches if TOOLKIT else (),
        "CXX_FLAGS": tuple(CXX_FLAGS),
        "NVCC_FLAGS": tuple(NVCC_FLAGS) if TOOLKIT else (),
    }
    lines = [f"{name} = {value!r}\n" for name, value in facts.items()]
    return '"""How this copy was built. Written by setup.py."""\n\n' + "".join(lines)


class BuildVariant(build):
    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_base = f"build/{VARIANT}"

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExtensions(build_ext):
    def run(self) -> None:
        super().run()
        info = Path("negmine" if self.inplace else f"{self.build_lib}/negmine", "_build_info.py")
        info.write_text(build_info())  # replaces the one that build_py may have copied from an in-place build

    def build_extensions(self) -> None:
        made = Build(TOOLKIT)
        try:
            compile_all([unit for units in made.units.values() for unit in units])
            for extension in self.extensions:
                made.link(extension.name, Path(self.get_ext_fullpath(extension.name)))
        except BuildError as error:
            raise SystemExit(f"negmine: {error}") from None

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        expected = {Path(self.get_ext_filename(extension.name)).name for extension in self.extensions}
        for library in Path("negmine").glob("_*.so"):
            if library.name not in expected:
                library.unlink()


STABLE = ["negmine._ops_cpu"] + (["negmine._ops_cuda"] if TOOLKIT else [])

setup(
    version=FULL_VERSION,
    # The folder kernels/ of the checkout is installed as negmine.kernels.
    package_dir={"negmine": "negmine", "negmine.kernels": "kernels"},
    packages=[
        *find_packages(include=["negmine", "negmine.*"]),
        "negmine.kernels",
        *(f"negmine.kernels.{package}" for package in find_packages("kernels")),
    ],
    package_data={"negmine": ["py.typed"], "negmine.kernels": ["README.md"]},
    # build_tools/extensions.py lists the sources; MANIFEST.in adds them to the sdist.
    ext_modules=[*(Extension(name, [], py_limited_api=True) for name in STABLE), Extension("negmine._C", [])],
    cmdclass={"build": BuildVariant, "build_ext": BuildExtensions},
)
