"""HardnessReport: figures as arrays and facts, saved as JSON or .npz, and shown as an HTML page."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from negmine.mining.atomic_file import atomic_write
from negmine.mining.numpy_file import read_npz
from negmine.mining.regular_file import MAX_JSON_BYTES, cause, parse_json, read_json
from negmine.ops.checks import describe, refuse
from negmine.report import page, words

FORMAT = 1
KINDS = (".json", ".npz")


def _plain(array: np.ndarray) -> Any:
    """An array as nested lists; a float that is not finite as null, which JSON can hold."""
    if array.dtype.kind != "f":
        return array.tolist()
    if array.ndim == 0:
        return float(array) if math.isfinite(array) else None
    return [_plain(part) for part in array]


def _array(value: Any, dtype: str) -> np.ndarray:
    """The array that _plain wrote; null comes back as NaN."""
    if np.dtype(dtype).kind not in "biuf":
        raise ValueError(f"a figure has dtype {describe(dtype)}")
    return np.array(value, dtype=np.float64 if dtype.startswith("float") else dtype).astype(dtype)


@dataclass(frozen=True, eq=False)  # == of arrays has no one answer
class HardnessReport:
    """The result of `hardness_report`, whose docstring lists the figures.

    Attributes
    ----------
    figures : dict of arrays
        The figures by name.
    facts : dict
        Sizes, arguments, and suspects with their texts.

    Examples
    --------
    >>> rows = F.normalize(torch.randn(200, 16), dim=1)
    >>> report = negmine.hardness_report(rows[:20], rows, list(range(20)))
    >>> print(report.summary().splitlines()[0])
    How hard are these negatives?
    """

    figures: dict[str, np.ndarray]
    facts: dict[str, Any]  # sizes, arguments, suspects with their texts: what JSON can hold

    def findings(self) -> list[str]:
        """The findings, one sentence each."""
        return words.findings(self.figures, self.facts)

    def advice(self) -> list[str]:
        """Recommendations, one sentence each."""
        return words.advice(self.figures, self.facts)

    def summary(self) -> str:
        """Title, table by difficulty, findings and advice, as text."""
        lines = [self.facts["title"], "", *words.table(self.figures, self.facts), ""]
        lines += [*self.findings(), "", "What to do next", *(f"- {sentence}" for sentence in self.advice())]
        return "\n".join(lines)

    def to_html(self, path: str | os.PathLike) -> None:
        """Write one HTML page without scripts or network requests, with inline plots."""
        with atomic_write("HardnessReport.to_html", path) as file:
            file.write(page.render(self.figures, self.facts).encode())

    def save(self, path: str | os.PathLike) -> None:
        """Write figures and facts to a .json or .npz file, atomically."""
        op = "HardnessReport.save"
        path = require_kind(op, path)
        head = {"format": FORMAT, "facts": self.facts}
        with atomic_write(op, path) as file:
            if path.suffix == ".npz":
                description = np.frombuffer(json.dumps(head).encode(), np.uint8)
                arrays: dict[str, Any] = {"description": description, **self.figures}
                np.savez(file, **arrays)
            else:
                written = {name: {"dtype": str(a.dtype), "values": _plain(a)} for name, a in self.figures.items()}
                text = json.dumps(head | {"figures": written}, allow_nan=False).encode()
                if len(text) > MAX_JSON_BYTES:
                    wanted = f"a .npz file where the JSON holds more than {MAX_JSON_BYTES:,} bytes"
                    raise refuse(op, "path", wanted, str(path))
                file.write(text)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "HardnessReport":
        """Read a file that `save` wrote. Raises ValueError for another kind of file and for a damaged one."""
        op = "HardnessReport.load"
        path = require_kind(op, path)
        if not path.is_file():
            raise refuse(op, "path", "an existing file", str(path))
        what = f"{op}: {describe(str(path))} is damaged or was not written by save"
        try:
            if path.suffix == ".npz":
                figures = read_npz(path)
                head = parse_json(figures.pop("description").tobytes(), "its description")
            else:
                head = read_json(path)
                figures = {name: _array(a["values"], a["dtype"]) for name, a in head["figures"].items()}
            found, facts = head["format"], head["facts"]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError) as error:
            raise ValueError(f"{what} ({cause(error)})") from error
        if found != FORMAT:
            came = f"has format {describe(found)}, and this version of negmine reads {FORMAT}"
            raise ValueError(f"{op}: {describe(str(path))} {came}")
        report = cls(figures, facts)
        try:  # the figures and facts belong together if the pages can be made of them
            with np.errstate(all="ignore"):
                report.summary()
                page.render(figures, facts)
        except Exception as error:
            raise ValueError(f"{what} ({cause(error)})") from error
        return report


def require_kind(op: str, path: Any, name: str = "path") -> Path:
    """The path of a file whose suffix says which of KINDS it is."""
    if not isinstance(path, (str, os.PathLike)) or Path(path).suffix not in KINDS:
        raise refuse(op, name, "a .json or .npz file", path if path is None else str(path))
    return Path(path)
