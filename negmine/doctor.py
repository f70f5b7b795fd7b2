"""Reports what works on this machine, why the rest does not, and what to install: negmine doctor, or python -m negmine.doctor

    backends    the result of a small call of each backend, or the reason why it is not available
    features    what optional packages add: the result of a small test, or what to install
    build       how the compiled modules were built: version, CUDA, architectures, instruction sets
    versions    Python, torch, Triton, NumPy, FAISS, the GPUs

It changes nothing, and the exit code is always 0: a backend that is not available on this machine is not an error.
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
LEAST = {"torch": (2, 10), "triton": (3, 6)}  # the same versions as in pyproject.toml


def _trial(name: str, device: str) -> str:
    """'works', or how a small call of this backend failed."""
    # In bf16, which every backend supports.
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device).bfloat16()  # (B, D)
    keys = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]], device=device).bfloat16()  # (K, D)
    try:
        index = mine_hardest(query, keys, 2, backend=name).index.tolist()
    except Exception as error:  # a driver or a compiler may raise anything, and the report must show it
        first_line, *_ = str(error).splitlines() or [""]
        return f"failed: a small call raised {type(error).__name__}: {first_line}"
    return "works" if index == [[1, 2], [0, 2]] else f"failed: a small call gave {index} instead of [[1, 2], [0, 2]]"


def backend_rows() -> list[tuple[str, str, str]]:
    """The name, device and status of each backend, in order of preference. The status gives the reason if it does not work."""
    rows = []
    for row in backends.BACKENDS:
        missing = [op for op in backends.OPS if row.functions and op not in row.functions]
        if row.refusal:
            verdict = f"not available: {row.refusal}"
        elif "mine_hardest" in missing:  # no call can name it
            verdict = f"loaded; has only {', '.join(row.functions)}"
        else:
            on_gpu = row.device == "cuda" and torch.cuda.is_available()
            verdict = _trial(row.name, "cuda" if on_gpu else "cpu")
            if missing:
                verdict += f"; does not have {', '.join(missing)}"
            if row.functions and row.by_name_only.issuperset(row.functions):
                verdict += f"; used only with backend={row.name!r}"
            if row.name == "triton" and backends.INTERPRETED:
                verdict += "; interpreted (TRITON_INTERPRET=1), about 1000 times slower than compiled"
            elif row.name == "triton" and torch.version.hip:
                verdict += "; its kernels are compiled for AMD GPUs, but have not been tested on one"
        rows.append((row.name, row.device, verdict))
    return rows


def _index_trial(kind: str, device: str) -> str:
    """'works', or how a small index of this kind failed."""
    try:
        index = NegativeIndex.build(np.eye(4, dtype=np.float32), kind, device=device)
        found = index.search(np.eye(4, dtype=np.float32), 1).indices.ravel().tolist()
    except Exception as error:  # as above
        first_line, *_ = str(error).splitlines() or [""]
        return f"failed: a small index raised {type(error).__name__}: {first_line}"
    return "works" if found == [0, 1, 2, 3] else f"failed: a small index found {found} instead of [0, 1, 2, 3]"


def _on_gpu(kind: str) -> Callable[[], str]:
    def trial() -> str:
        if not torch.cuda.is_available():
            return "not available: torch sees no CUDA device"
        return _index_trial(kind, "cuda")

    return trial


# Feature, purpose, the module that it needs, what to install, and a small test if it may fail although the module is installed.
FEATURES: tuple[tuple[str, str, str, str, Callable[[], str] | None], ...] = (
    ("FAISS, CPU", "approximate indexes", "faiss", "negmine[faiss]", lambda: _index_trial("Flat", "cpu")),
    ("FAISS, GPU", "approximate indexes on GPU", "faiss", "negmine[faiss-gpu]", _on_gpu("Flat")),
    ("cuVS", "the index 'cagra'", "cuvs", "cuvs-cu12 or cuvs-cu13", _on_gpu("cagra")),
    ("safetensors", "embeddings in .safetensors", "safetensors", "safetensors", None),
    ("pyarrow", "embeddings in .parquet", "pyarrow", "pyarrow", None),
    ("sentence-transformers", "the adapter for it", "sentence_transformers", "sentence-transformers", None),
    ("matplotlib", "plots of the demo", "matplotlib", "negmine[demo]", None),
)


def _version_without_import(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def feature_rows() -> list[tuple[str, str, str]]:
    """The name, the purpose and the status of each optional feature. The status tells what to install if a package is missing."""
    rows = []
    for name, purpose, module, package, trial in FEATURES:
        if importlib.util.find_spec(module) is None:
            verdict = f"not installed; pip install {package}"
        elif trial is not None:
            verdict = trial()
        else:  # not imported, because some of these modules take seconds to import
            verdict = f"installed, {_version_without_import(name)}"
        rows.append((name, purpose, verdict))
    return rows


def build_rows() -> Rows:
    """How this copy was built, and the instruction set that its CPU kernels chose here."""
    try:
        info = importlib.import_module("negmine._build_info")
        module = importlib.import_module("negmine._C")
    except ImportError as error:
        return [("compiled", f"not available: {error}; build it with `make venv` or install a wheel")]
    has = [name for name, present in module.cpu_features().items() if present]
    chosen = ", ".join(f"{module.isa_for(dtype, dtype)} for {dtype}" for dtype in ("float32", "bfloat16", "float16"))
    return [
        ("version", f"{info.VERSION}, commit {info.COMMIT or 'unknown'}"),
        ("CUDA", info.CUDA_VERSION or "none"),
        ("architectures", ", ".join(f"sm_{arch}" for arch in info.CUDA_ARCHES) or "none"),
        ("compiler", f"{module.build_info()['compiler']}, {' '.join(info.CXX_FLAGS)}"),
        ("CPU kernels", f"{chosen}; this machine supports {', '.join(has) or 'portable code only'}"),
    ]


def _version_of(name: str) -> str:
    """The version of a module, or the reason if it has none."""
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        return getattr(importlib.import_module(name), "__version__", "installed, version unknown")
    except Exception as error:  # a broken installation, which the report must show
        return f"installed, but its import failed: {error}"


def _too_old(name: str, version: str) -> str:
    """A remark if the version is older than negmine needs; else empty."""
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
        ("GPUs", ", ".join(gpus) or "none visible to torch"),
    ]


def report() -> str:
    """The whole report as text."""
    lines = [f"negmine {__version__}", "", "backends, in order of preference (name, device, status)"]
    lines += [f"  {name:<10} {device:<5} {verdict}" for name, device, verdict in backend_rows()]
    if backends.FORCED:
        lines.append(
            f"  NEGMINE_BACKEND={backends.FORCED} is set: only this backend is used unless a call names another"
        )
    lines += ["", "features of optional packages"]
    lines += [f"  {name:<22} {purpose:<27} {verdict}" for name, purpose, verdict in feature_rows()]
    for title, rows in (("build", build_rows()), ("versions", version_rows())):
        lines += ["", title, *(f"  {name:<16} {value}" for name, value in rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
