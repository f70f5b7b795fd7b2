"""The version of the package; setup.py adds the CUDA variant behind a plus."""

__version__ = "0.1.0"
