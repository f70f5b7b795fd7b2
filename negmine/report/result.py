"""HardnessReport: the figures of a hardness report as arrays, which can be saved, summarised and shown as an HTML page."""

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
    """An array as nested lists for JSON, with None for floats that are not finite."""
    if array.dtype.kind != "f":
        return array.tolist()
    if array.ndim == 0:
        return float(array) if math.isfinite(array) else None
    return [_plain(part) for part in array]


def _array(value: Any, dtype: str) -> np.ndarray:
    """The array that _plain converted, with NaN for None."""
    if np.dtype(dtype).kind not in "biuf":
        raise ValueError(f"a figure has dtype {describe(dtype)}")
    return np.array(value, dtype=np.float64 if dtype.startswith("float") else dtype).astype(dtype)


@dataclass(frozen=True, eq=False)  # arrays cannot be compared by ==
class HardnessReport:
    """The result of `hardness_report`. The docstring of that function lists the figures.

    Attributes
    ----------
    figures : dict of arrays
        The figures by name.
    facts : dict
        Sizes, arguments, and likely false negatives with their texts.

    Examples
    --------
    >>> rows = F.normalize(torch.randn(200, 16), dim=1)
    >>> report = negmine.hardness_report(rows[:20], rows, list(range(20)))
    >>> print(report.summary().splitlines()[0])
    How hard are these negatives?
    """

    figures: dict[str, np.ndarray]
    facts: dict[str, Any]  # only values that JSON can hold

    def findings(self) -> list[str]:
        """A list of what was found, one sentence each."""
        return words.findings(self.figures, self.facts)

    def advice(self) -> list[str]:
        """A list of recommendations, one sentence each."""
        return words.advice(self.figures, self.facts)

    def summary(self) -> str:
        """The title, a table by difficulty, the findings and the advice, as text."""
        lines = [self.facts["title"], "", *words.table(self.figures, self.facts), ""]
        lines += [*self.findings(), "", "What to do next", *(f"- {sentence}" for sentence in self.advice())]
        return "\n".join(lines)

    def to_html(self, path: str | os.PathLike) -> None:
        """Write an HTML page with plots, atomically.

        The page is one file. It contains no scripts and makes no network requests.

        Parameters
        ----------
        path : path
            The file.
        """
        with atomic_write("HardnessReport.to_html", path) as file:
            file.write(page.render(self.figures, self.facts).encode())

    def save(self, path: str | os.PathLike) -> None:
        """Write the report to a file, atomically.

        Parameters
        ----------
        path : path
            The file, whose suffix is .json or .npz.

        Raises
        ------
        ValueError
            If the suffix is another one, or the report is too large for JSON.
        """
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
                    wanted = f"a .npz file if the JSON has more than {MAX_JSON_BYTES:,} bytes"
                    raise refuse(op, "path", wanted, str(path))
                file.write(text)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "HardnessReport":
        """Read a file that `save` wrote. Nothing in the file is executed.

        Parameters
        ----------
        path : path
            The file, whose suffix is .json or .npz.

        Returns
        -------
        HardnessReport
            The report that was saved.

        Raises
        ------
        ValueError
            If the file does not exist, is damaged, or was not written by `save`.
        """
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
        try:  # figures and facts are consistent if the summary and the page can be made from them
            with np.errstate(all="ignore"):
                report.summary()
                page.render(figures, facts)
        except Exception as error:
            raise ValueError(f"{what} ({cause(error)})") from error
        return report


def require_kind(op: str, path: Any, name: str = "path") -> Path:
    """The path, after a check that its suffix is one of KINDS."""
    if not isinstance(path, (str, os.PathLike)) or Path(path).suffix not in KINDS:
        raise refuse(op, name, "a .json or .npz file", path if path is None else str(path))
    return Path(path)
