"""What works here, why the rest does not, and what to install: negmine doctor, or python -m negmine.doctor

    backends    each row of negmine/backends.py: the reason why it refuses, or what a small call of it really gave
    features    what other packages add: each tried, or what to install
    build       how the compiled modules were made: version, CUDA, architectures, instruction sets
    versions    Python, torch, Triton, NumPy, FAISS, the GPUs

It changes nothing and always exits with 0: a backend that cannot run here is a fact, not a failure.
"""

import importlib
import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Callable

import numpy as np
import torch

from negmine.mining import NegativeIndex
from negmine.ops import backends
from negmine.selection import mine_hardest
from negmine.version import __version__

Rows = list[tuple[str, str]]
LEAST = {"torch": (2, 10), "triton": (3, 6)}  # as pyproject.toml has them


def _trial(name: str, device: str) -> str:
    """'works', or in words what a small call of this backend did instead."""
    # In bf16, which every backend takes.
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device).bfloat16()  # (B, D)
    keys = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]], device=device).bfloat16()  # (K, D)
    try:
        index = mine_hardest(query, keys, 2, backend=name).index.tolist()
    except Exception as error:  # whatever a driver or a compiler may raise, a report says it
        first_line, *_ = str(error).splitlines() or [""]
        return f"no: a small call raised {type(error).__name__}: {first_line}"
    return "works" if index == [[1, 2], [0, 2]] else f"no: a small call gave {index} instead of [[1, 2], [0, 2]]"


def backend_rows() -> list[tuple[str, str, str]]:
    """Name, device and 'works' or 'no: why', in order of preference."""
    rows = []
    for row in backends.BACKENDS:
        missing = [op for op in backends.OPS if row.functions and op not in row.functions]
        if row.refusal:
            verdict = f"no: {row.refusal}"
        elif "mine_hardest" in missing:  # no call can name it
            verdict = f"loads; runs {', '.join(row.functions)}, and the next ones the rest"
        else:
            on_gpu = row.device == "cuda" and torch.cuda.is_available()
            verdict = _trial(row.name, "cuda" if on_gpu else "cpu")
            if missing:
                verdict += f"; the next ones run {', '.join(missing)}"
            if row.name == "triton" and backends.INTERPRETED:
                verdict += "; interpreted (TRITON_INTERPRET=1), a thousandfold slower than compiled"
            elif row.name == "triton" and torch.version.hip:
                verdict += "; on AMD's GPUs its kernels have been compiled, never run by us"
        rows.append((row.name, row.device, verdict))
    return rows


def _index_trial(kind: str, device: str) -> str:
    """'works', or why a small index of this kind does not."""
    try:
        index = NegativeIndex.build(np.eye(4, dtype=np.float32), kind, device=device)
        found = index.search(np.eye(4, dtype=np.float32), 1).indices.ravel().tolist()
    except Exception as error:  # as above
        first_line, *_ = str(error).splitlines() or [""]
        return f"no: a small index raised {type(error).__name__}: {first_line}"
    return "works" if found == [0, 1, 2, 3] else f"no: a small index found {found} instead of [0, 1, 2, 3]"


def _on_gpu(kind: str) -> Callable[[], str]:
    def trial() -> str:
        if not torch.cuda.is_available():
            return "no: torch sees no CUDA device"
        return _index_trial(kind, "cuda")

    return trial


# Feature, what it is for, the module that must be there, what installs it, and a trial of it where an import does not say enough.
FEATURES: tuple[tuple[str, str, str, str, Callable[[], str] | None], ...] = (
    ("FAISS, CPU", "approximate indexes", "faiss", "negmine[faiss]", lambda: _index_trial("Flat", "cpu")),
    ("FAISS, GPU", "the same on a GPU", "faiss", "negmine[faiss-gpu]", _on_gpu("Flat")),
    ("cuVS", "the index 'cagra'", "cuvs", "cuvs-cu12 or cuvs-cu13", _on_gpu("cagra")),
    ("safetensors", "embeddings in .safetensors", "safetensors", "safetensors", None),
    ("pyarrow", "embeddings in .parquet", "pyarrow", "pyarrow", None),
    ("sentence-transformers", "its adapter", "sentence_transformers", "sentence-transformers", None),
    ("matplotlib", "make demo, make plots", "matplotlib", "negmine[demo]", None),
)


def _version_without_import(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def feature_rows() -> list[tuple[str, str, str]]:
    """Name, what it is for, and 'works', 'installed' or 'no: why, and what to install'."""
    rows = []
    for name, purpose, module, package, trial in FEATURES:
        if importlib.util.find_spec(module) is None:
            verdict = f"no: not installed; pip install {package}"
        elif trial is not None:
            verdict = trial()
        else:  # some of them take seconds to import
            verdict = f"installed, {_version_without_import(name)}"
        rows.append((name, purpose, verdict))
    return rows


def build_rows() -> Rows:
    """How this copy was built, and the instruction set that its CPU kernels chose here."""
    try:
        info = importlib.import_module("negmine._build_info")
        module = importlib.import_module("negmine._C")
    except ImportError as error:
        return [("compiled", f"no: {error}; build it with `make venv` or install a wheel")]
    has = [name for name, present in module.cpu_features().items() if present]
    chosen = ", ".join(f"{module.isa_for(dtype, dtype)} for {dtype}" for dtype in ("float32", "bfloat16", "float16"))
    return [
        ("version", f"{info.VERSION}, commit {info.COMMIT or 'unknown'}"),
        ("CUDA", info.CUDA_VERSION or "none"),
        ("architectures", ", ".join(f"sm_{arch}" for arch in info.CUDA_ARCHES) or "none"),
        ("compiler", f"{module.build_info()['compiler']}, {' '.join(info.CXX_FLAGS)}"),
        ("CPU kernels", f"{chosen}; this machine runs {', '.join(has) or 'portable code only'}"),
    ]


def _version_of(name: str) -> str:
    """The version of a module, or why there is none."""
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        return getattr(importlib.import_module(name), "__version__", "installed, version unknown")
    except Exception as error:  # a broken installation is what a doctor is asked about
        return f"installed, but its import failed: {error}"


def _too_old(name: str, version: str) -> str:
    """What to say of a version that is older than negmine needs; empty for any other."""
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    least = LEAST[name]
    return f"; too old: {least[0]}.{least[1]} or later is needed" if found and found < least else ""


def version_rows() -> Rows:
    """Python, torch, Triton, NumPy, FAISS and the GPUs."""
    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(i)
        code = torch.cuda.get_device_properties(i).gcnArchName if torch.version.hip else f"sm_{major}{minor}"
        gpus.append(f"{torch.cuda.get_device_name(i)} ({code})")
    return [
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        (
            "torch",
            f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, ROCm {torch.version.hip or 'none'}, "
            f"{torch.get_num_threads()} threads" + _too_old("torch", torch.__version__),
        ),
        ("triton", (triton := _version_of("triton")) + _too_old("triton", triton)),
        *((name, _version_of(name)) for name in ("numpy", "faiss")),
        ("GPUs", ", ".join(gpus) or "none that torch sees"),
    ]


def report() -> str:
    """All of it as text."""
    lines = [f"negmine {__version__}", "", "backends, in order of preference"]
    lines += [f"  {name:<10} {device:<5} {verdict}" for name, device, verdict in backend_rows()]
    if backends.FORCED:
        lines.append(f"  NEGMINE_BACKEND={backends.FORCED} insists on one")
    lines += ["", "features, by packages that are not required"]
    lines += [f"  {name:<22} {purpose:<27} {verdict}" for name, purpose, verdict in feature_rows()]
    for title, rows in (("build", build_rows()), ("versions", version_rows())):
        lines += ["", title, *(f"  {name:<16} {value}" for name, value in rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
