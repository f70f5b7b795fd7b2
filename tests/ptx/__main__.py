"""Run pytest with Triton's kernels compiled for sm_90: python -m tests.ptx 90 tests/test_kernels.py -k triton"""

import os
import sys

import pytest

from tests.ptx import triton_kernels

if __name__ == "__main__":
    os.environ["NEGMINE_PTX"] = sys.argv[1]  # for tests/conftest.py
    triton_kernels.install(int(sys.argv[1]))
    sys.exit(pytest.main(["-n0", "-p", "no:cacheprovider", *sys.argv[2:]]))
