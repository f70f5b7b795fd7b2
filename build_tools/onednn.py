"""Some virtual machines hide part of CPUID, and oneDNN's AMX kernels then die with an illegal instruction.

ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 avoids them. It slows bf16 products where they work, so it is set only where a product in a
child process dies.
"""

import os
import subprocess
import sys
from pathlib import Path

NAME, WITHOUT_AMX = "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"
PRODUCT = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); a @ a"


def avoid_amx_where_it_dies() -> None:
    """Set the variable for this process and its children where oneDNN needs it. To be called before the first product."""
    if NAME in os.environ:
        return
    cpuinfo = Path("/proc/cpuinfo")
    if not (cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()):
        return
    died = subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True).returncode < 0
    os.environ[NAME] = WITHOUT_AMX if died else "DEFAULT"
