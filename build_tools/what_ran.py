"""Say in one line what a test run on this machine did not run; with --need MODULE..., insist on modules instead."""

import importlib.util
import sys

from .cuda_toolkit import find_nvcc


def summary() -> str:
    import torch

    from negmine.ops import backends

    if torch.cuda.is_available():
        refusals = [f"{row.name}: {row.refusal}" for row in backends.BACKENDS if row.refusal]
        return f"Ran on {torch.cuda.get_device_name()}; did not run: {'; '.join(refusals) or 'nothing'}."
    cuda = "compiled only" if find_nvcc() else "not even compiled (no nvcc)"
    triton = "interpreted and compiled ahead of time" if importlib.util.find_spec("triton") else "not installed"
    return f"Did not run, for there is no GPU: cuda: {cuda}; triton: {triton}."


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--need"]:
        missing = [module for module in arguments[1:] if importlib.util.find_spec(module) is None]
        if missing:
            raise SystemExit(f"make gpu installs nothing, and {sys.executable} lacks {', '.join(missing)}.")
    else:
        print(summary())


if __name__ == "__main__":
    main(sys.argv[1:])
