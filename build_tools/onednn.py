"""Avoid oneDNN's AMX kernels on virtual machines that hide part of CPUID, where they fail with an illegal instruction.

ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 avoids them. It makes bf16 products slower on machines where AMX works, so it is set only if
a product in a child process fails.
"""

import os
import subprocess
import sys
from pathlib import Path

NAME, WITHOUT_AMX = "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"
PRODUCT = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); a @ a"


def avoid_amx_where_it_dies() -> None:
    """Set the variable for this process and its children if oneDNN needs it. Call this before the first product."""
    if NAME in os.environ:
        return
    cpuinfo = Path("/proc/cpuinfo")
    if not (cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()):
        return
    died = subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True).returncode < 0
    os.environ[NAME] = WITHOUT_AMX if died else "DEFAULT"
