"""Print one line about what the tests could not run on this machine; with --need MODULE..., require modules instead."""

import importlib.util
import sys

from .cuda_toolkit import find_nvcc


def summary() -> str:
    import torch

    from negmine.ops import backends

    if torch.cuda.is_available():
        refusals = [f"{row.name}: {row.refusal}" for row in backends.BACKENDS if row.refusal]
        return f"Ran on {torch.cuda.get_device_name()}. Did not run: {'; '.join(refusals) or 'nothing'}."
    cuda = "only compiled" if find_nvcc() else "not compiled, because there is no nvcc"
    triton = "interpreted and compiled ahead of time" if importlib.util.find_spec("triton") else "not installed"
    return f"Did not run, because there is no GPU: cuda ({cuda}); triton ({triton})."


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--need"]:
        missing = [module for module in arguments[1:] if importlib.util.find_spec(module) is None]
        if missing:
            raise SystemExit(f"make gpu installs nothing, and {sys.executable} does not have {', '.join(missing)}.")
    else:
        print(summary())


if __name__ == "__main__":
    main(sys.argv[1:])
