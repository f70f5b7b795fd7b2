"""Draw plots as inline SVG, without a plotting package. The CSS of frame.py sets the colours, for light and dark pages.

curve       mean and standard error by bin of difficulty, with the chance level
histogram   number of rows by count, and the expectation of a binomial distribution, on a log scale
bars        one share per name, with the chance level
"""

import html
import math
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 500, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 14, 48
ROUND = (1.0, 2.0, 2.5, 5.0, 10.0)  # steps of an axis


def number(value: float) -> str:
    """A number with at most three digits, separators for thousands, and no trailing zeros."""
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.0e}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers in [low, high], at most `most` + 1 of them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in ROUND if power * nice >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


class Plot:
    """A plot with axes. The methods x and y convert values to coordinates."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], label: str, logarithmic: bool = False) -> None:
        self.x_range, self.y_range, self.logarithmic = x, y, logarithmic
        self.parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">']

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = (math.log10(v) for v in self.y_range) if self.logarithmic else self.y_range
        at = math.log10(max(value, self.y_range[0])) if self.logarithmic else value
        return HEIGHT - BOTTOM - (at - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def add(self, tag: str, kind: str, text: str = "", **attributes: float | str) -> None:
        written = "".join(
            f' {name.replace("_", "-")}="{value:.1f}"'
            if isinstance(value, float)
            else f' {name.replace("_", "-")}="{value}"'
            for name, value in attributes.items()
        )
        self.parts.append(f'<{tag} class="{kind}"{written}>{text}</{tag}>')

    def line(self, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
        self.add("line", kind, x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2))

    def text(self, x: float, y: float, text: str, kind: str = "tick", anchor: str = "middle") -> None:
        self.add("text", kind, html.escape(text), x=float(x), y=float(y), text_anchor=anchor)

    def path(self, kind: str, points: Sequence[tuple[float, float]], closed: bool = False) -> None:
        if points:
            steps = " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
            self.add("path", kind, d=f"M{steps}{'Z' if closed else ''}")

    def y_axis(self, values: Sequence[float], name: str) -> None:
        for value in values:
            self.line("grid", LEFT, self.y(value), WIDTH - RIGHT, self.y(value))
            self.text(LEFT - 7, self.y(value) + 4, name.format(value) if "{" in name else number(value), anchor="end")

    def done(self) -> str:
        return "".join([*self.parts, "</svg>"])


def _linear_range(values: np.ndarray, from_zero: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    low, high = (min(low, 0.0), max(high, 0.0)) if from_zero else (low, high)
    pad = 0.06 * (high - low) or 0.05 * (abs(high) or 1.0)
    return (low - pad if low < 0 or not from_zero else low), high + pad


def curve(edges: np.ndarray, mean: np.ndarray, error: np.ndarray, chance: float, label: str) -> str:
    """A curve over bins of equal width, hardest on the left. The ticks are the bounds of the bins."""
    known = np.flatnonzero(np.isfinite(mean))
    if not len(known):
        return ""
    error = np.nan_to_num(error)
    first, last = int(known[0]), int(known[-1]) + 1
    spread = np.concatenate([mean[known] - 2 * error[known], mean[known] + 2 * error[known]])
    spread = spread if math.isnan(chance) else np.append(spread, chance)
    plot = Plot((first, last), _linear_range(spread, True), label)
    plot.y_axis(ticks(*plot.y_range), "")
    for i in range(first, last + 1):
        plot.line("grid", plot.x(i), TOP, plot.x(i), HEIGHT - BOTTOM)
        plot.text(plot.x(i), HEIGHT - BOTTOM + 16, f"{100 * edges[i]:.4g}", anchor="end" if i == last else "middle")
    plot.text(LEFT, HEIGHT - 8, "← hardest", "name", "start")
    plot.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "difficulty, % of a query's negatives", "name")
    plot.text(WIDTH - RIGHT, HEIGHT - 8, "easiest →", "name", "end")
    if not math.isnan(chance):
        plot.line("chance", plot.x(first), plot.y(chance), plot.x(last), plot.y(chance))
    points = [(plot.x(i + 0.5), plot.y(mean[i])) for i in known]
    plot.path("curve", points)
    for (x, y), i in zip(points, known.tolist(), strict=True):
        plot.line("error", x, plot.y(mean[i] - 2 * error[i]), x, plot.y(mean[i] + 2 * error[i]))
        plot.add("circle", "dot", f"<title>{number(mean[i])} ± {number(2 * error[i])}</title>", cx=x, cy=y, r=4.0)
    return plot.done()


def _stairs(plot: Plot, values: np.ndarray) -> list[tuple[float, float]]:
    """The outline of a histogram. Values below 0.1 are drawn at 0.1."""
    points = []
    for i, value in enumerate(values):
        points += [(plot.x(i), plot.y(float(value))), (plot.x(i + 1), plot.y(float(value)))]
    return points


def histogram(observed: np.ndarray, expected: np.ndarray, label: str, x_name: str) -> str:
    """observed, expected (counts,): the number of rows that were counted 0, 1, 2, ... times."""
    plot = Plot((0, len(observed)), (0.1, 1.6 * float(max(observed.max(), expected.max(), 1.0))), label, True)
    plot.y_axis([10.0**power for power in range(0, math.floor(math.log10(plot.y_range[1])) + 1)], "{:,.0f}")
    for at in ticks(0, max(len(observed) - 1, 1), 8):
        if at == int(at):
            plot.text(plot.x(at + 0.5), HEIGHT - BOTTOM + 16, number(at))
    plot.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_name, "name")
    base = HEIGHT - BOTTOM
    plot.path("area", [(plot.x(0), base), *_stairs(plot, observed), (plot.x(len(observed)), base)], closed=True)
    plot.path("chance", _stairs(plot, expected))
    plot.line("axis", LEFT, base, WIDTH - RIGHT, base)
    return plot.done()


def bars(names: Sequence[str], shares: Sequence[float], chance: Sequence[float], label: str) -> str:
    """shares in [0, 1], one bar per name. chance: the position of a mark across each bar; NaN for no mark."""
    plot = Plot((0, len(names)), (0, max(1e-9, 1.12 * max(shares))), label)
    plot.y_axis(ticks(*plot.y_range), "{:.0%}")
    for i, (name, share, mark) in enumerate(zip(names, shares, chance, strict=True)):
        left, right = plot.x(i + 0.2), plot.x(i + 0.8)
        plot.add("rect", "bar", x=left, y=plot.y(share), width=right - left, height=plot.y(0) - plot.y(share), rx=3.0)
        plot.text((left + right) / 2, plot.y(share) - 6, f"{share:.1%}", "value")
        plot.text((left + right) / 2, HEIGHT - BOTTOM + 18, name)
        if not math.isnan(mark):
            plot.line("chance", left - 8, plot.y(mark), right + 8, plot.y(mark))
    plot.line("axis", LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM)
    return plot.done()
