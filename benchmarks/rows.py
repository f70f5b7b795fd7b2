"""Result files with one row for each measurement: their paths, reading, appending, and the columns that describe the machine."""

import csv
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, str]
END = "<!-- end -->"  # marks the end of a generated part of a page


def read(path: Path) -> list[Row]:
    """Read the rows, oldest first. A file that does not exist has no rows."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def newest(path: Path, *columns: str) -> list[Row]:
    """Read the rows; of rows with the same values in these columns, keep the newest."""
    return list({tuple(row[name] for name in columns): row for row in read(path)}.values())


def write(path: Path, columns: list[str], rows: list[dict[str, Any]], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if mode == "w":
            writer.writeheader()
        writer.writerows(rows)


def append(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Add rows to a file.

    If its columns differ from `columns`, the file is written again with the columns of both, and missing values are empty.
    """
    old = read(path)
    if old and list(old[0]) == columns:
        write(path, columns, rows, "a")
    else:
        old_only = [name for name in (old[0] if old else ()) if name not in columns]
        write(path, columns + old_only, old + rows)


def write_between(page: Path, begin: str, text: str) -> None:
    """Replace the text between the line `begin` of a page and the next END."""
    before, rest = page.read_text().split(begin)
    page.write_text("\n".join([before + begin, "", text.strip("\n"), "", END + rest.split(END, 1)[1]]))


# Generations of server processors by family and model number. Virtual machines often show only "AMD EPYC" or
# "Intel(R) Xeon(R) Processor" as the name. AMD's processors with AVX-512 are not listed, so their file is amd-epyc.csv.
GENERATIONS = {
    ("AuthenticAMD", "25", "1"): "zen-3",
    ("GenuineIntel", "6", "85"): "skylake",  # Cascade Lake and Cooper Lake have this number too
    ("GenuineIntel", "6", "106"): "ice-lake",
    ("GenuineIntel", "6", "143"): "sapphire-rapids",
    ("GenuineIntel", "6", "173"): "granite-rapids",
    ("GenuineIntel", "6", "207"): "emerald-rapids",
}


def machine_name(device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The name of the GPU or of the CPU, as part of a file name (amd-epyc, intel-xeon-ice-lake)."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        fields = dict(re.findall(r"^(.+?)\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE))
        name = re.sub(r"\(R\)|\bProcessor\b|\bCPU\b|@.*", " ", fields.get("model name", "cpu"))
        generation = tuple(fields.get(key, "") for key in ("vendor_id", "cpu family", "model"))
        name += " " + GENERATIONS.get(generation, "")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit of the working tree, with "-dirty" if files differ from it. Result files and generated pages do not count."""
    root = RESULTS.parents[1]
    generated = (
        ":(exclude)benchmarks/results",
        ":(exclude)README.md",
        ":(exclude)benchmarks/README.md",
        ":(exclude)docs/planning.md",
        ":(exclude)docs/gpu.md",
    )

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *generated)
    return (git("rev-parse", "--short", "HEAD") or "none") + ("-dirty" if changed else "")
