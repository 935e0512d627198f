"""Charts as HTML with inline SVG: lines over steps, and bars over ranges.

A chart's drawing stretches to the width it is given while its labels, which are HTML, keep their size: so it can be read
on a phone. Beside the drawing stands its data as JSON, from which the page's script shows numbers on pointing. Every
point drawn is one of the data: what is too much is left out, not averaged.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

POINTS = 800  # of a line; more than a screen can tell apart
OUTLIERS = 0.005  # share of values that may lie above the frame
SIDE = 1000  # units of the drawing, in both directions


@dataclass(frozen=True)
class Line:
    """Values `y` over `x`, both (N,), `x` rising. `look` is a CSS class: raw, main or other."""

    name: str
    look: str
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Bar:
    """A value (None: there is nothing to show) over the range from `low` to `high`, with a remark."""

    low: float
    high: float
    value: float | None
    note: str


@dataclass(frozen=True)
class Frame:
    """The values at the edges of a drawing."""

    left: float
    right: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        """From the left, in 0..1."""
        return (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        """From the top, in 0..1."""
        return (self.top - value) / (self.top - self.bottom)


def thin(values: np.ndarray, limit: int = POINTS) -> np.ndarray:
    """Indices of at most about `limit` of `values` (N,): of each equal stretch its smallest and largest, and both ends.

    Short peaks are therefore kept.
    """
    if len(values) <= limit:
        return np.arange(len(values))
    width = -(-len(values) // (limit // 2))
    stretches = np.pad(np.nan_to_num(values), (0, -len(values) % width), mode="edge").reshape(-1, width)
    starts = np.arange(0, len(values), width)
    ends = [0, len(values) - 1]
    kept = np.concatenate((starts + stretches.argmin(axis=1), starts + stretches.argmax(axis=1), ends))
    return np.unique(kept)


def ticks(low: float, high: float, count: int) -> list[float]:
    """At most about `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number as a person wants to read it."""
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def line_chart(title: str, lines: Sequence[Line], *, unit: str = "step") -> str:
    """Lines over a common axis. Those without a finite value are left out."""
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return _empty(title)
    frame = _frame(lines)
    drawing = "".join(_path(line, frame) for line in lines)
    data = {
        "unit": unit,
        "frame": [frame.left, frame.right, frame.bottom, frame.top],
        "series": [
            {"name": line.name, "look": line.look, "x": line.x.tolist(), "y": _numbers(line.y)}
            for line in lines
        ],
    }
    marks = [(value, f"{value:,.0f}") for value in ticks(frame.left, frame.right, 8) if value == round(value)]
    legend = "".join(f'<span class="key {line.look}">{escape(line.name)}</span>' for line in lines)
    return _figure(title, legend, _plot(drawing, frame, marks), data, "; ".join(map(_in_words, lines)))


def _frame(lines: Sequence[Line]) -> Frame:
    """Where the values lie, from 0 if that is near. The highest few raw ones may stick out."""
    left = float(min(line.x[0] for line in lines))
    right = float(max(line.x[-1] for line in lines))
    low = min(float(np.nanmin(line.y)) for line in lines)
    high = max(
        float(np.nanquantile(line.y, 1 - OUTLIERS) if line.look == "raw" else np.nanmax(line.y))
        for line in lines
    )
    near = low >= 0 and (low < 0.6 * high or low >= high)
    bottom = 0.0 if near else low - 0.05 * (high - low)
    top = high + 0.06 * (high - bottom)
    return Frame(left, right if right > left else left + 1, bottom, top if top > bottom else bottom + 1)


def _path(line: Line, frame: Frame) -> str:
    """The line, broken where values are missing."""
    words, pen = [], "M"
    for x, y in zip(line.x.tolist(), line.y.tolist(), strict=True):
        if math.isfinite(y):
            words.append(f"{pen}{SIDE * frame.x(x):.1f} {SIDE * frame.y(y):.1f}")
        pen = "L" if math.isfinite(y) else "M"
    if len(words) == 1:  # a path of one point is not drawn: make it a dot
        words.append("h0.01")
    return f'<path class="line {line.look}" d="{"".join(words)}"/>'


def _in_words(line: Line) -> str:
    finite = line.y[np.isfinite(line.y)]
    return f"{line.name}: first {short(finite[0])}, last {short(finite[-1])}, lowest {short(finite.min())}"


def bar_chart(
    title: str, bars: Sequence[Bar], *, legend: str, unit: str, value_name: str, labelled: bool = False
) -> str:
    """Bars from 0. labelled: with their values above them. The page's script shows value and note on pointing."""
    values = [bar.value or 0.0 for bar in bars]
    if not any(values):
        return _empty(title)
    frame = Frame(bars[0].low, bars[-1].high, 0.0, max(values) * (1.15 if labelled else 1.06))
    drawing = "".join(_rect(bar, frame, unit, value_name) for bar in bars if bar.value is not None)
    labels = "".join(_label(bar, frame) for bar in bars if bar.value is not None) if labelled else ""
    centres = [round((bar.low + bar.high) / 2, 6) for bar in bars]
    heights = [None if bar.value is None else _rounded(bar.value) for bar in bars]
    data = {
        "unit": unit,
        "frame": [frame.left, frame.right, frame.bottom, frame.top],
        "heads": [f"{unit} {bar.low:.3g} to {bar.high:.3g}" for bar in bars],
        "notes": [bar.note for bar in bars],
        "series": [{"name": value_name, "look": "bar", "x": centres, "y": heights}],
    }
    marks = [(value, f"{value:g}") for value in ticks(frame.left, frame.right, 5)]
    words = ", ".join(
        f"{bar.low:.3g} to {bar.high:.3g}: {short(v)}" for bar, v in zip(bars, values, strict=True)
    )
    return _figure(
        title, legend, _plot(drawing, frame, marks, labels), data, f"{value_name} by {unit}: {words}"
    )


def _rect(bar: Bar, frame: Frame, unit: str, value_name: str) -> str:
    assert bar.value is not None
    left, right, top = SIDE * frame.x(bar.low), SIDE * frame.x(bar.high), SIDE * frame.y(bar.value)
    gap = 0.08 * (right - left)
    title = f"{unit} {bar.low:.3g} to {bar.high:.3g}: {value_name} {short(bar.value)}, {bar.note}"
    return (
        f'<rect class="bar" x="{left + gap:.1f}" y="{top:.1f}" width="{right - left - 2 * gap:.1f}" '
        f'height="{SIDE - top:.1f}"><title>{escape(title)}</title></rect>'
    )


def _label(bar: Bar, frame: Frame) -> str:
    assert bar.value is not None
    left, top = 100 * frame.x((bar.low + bar.high) / 2), 100 * frame.y(bar.value)
    words = f"{bar.value:#.2g}" if bar.value < 10 else short(bar.value)
    return f'<span class="value" style="left:{left:.2f}%;top:{top:.2f}%">{words}</span>'


def _plot(drawing: str, frame: Frame, marks: Sequence[tuple[float, str]], labels: str = "") -> str:
    """The drawing in its frame: `marks` are the values and words below it; those at the left are chosen here."""
    levels = ticks(frame.bottom, frame.top, 4)
    grid = "".join(f'<path class="grid" d="M0 {SIDE * frame.y(v):.1f}H{SIDE}"/>' for v in levels)
    left = "".join(f'<span class="y" style="top:{100 * frame.y(v):.2f}%">{short(v)}</span>' for v in levels)
    below = "".join(
        f'<span class="x{" spare" * (i % 2 and len(marks) > 6)}" style="left:{100 * frame.x(v):.2f}%">{escape(word)}</span>'
        for i, (v, word) in enumerate(marks)
    )
    svg = f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">{grid}{drawing}</svg>'
    return f'<div class="plot">{svg}{left}{below}{labels}</div>'


def _figure(title: str, legend: str, plot: str, data: object, words: str) -> str:
    """words: what the chart shows, for those who cannot see it."""
    encoded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure class="chart" tabindex="0" role="group" aria-label="{escape(f"{title}. {words}")}">'
        f'<figcaption><h3>{escape(title)}</h3><div class="legend">{legend}</div></figcaption>{plot}'
        f'<script type="application/json">{encoded}</script></figure>\n'
    )


def _empty(title: str) -> str:
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3></figcaption>'
        '<p class="none">Nothing recorded yet.</p></figure>\n'
    )


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_rounded(value) if math.isfinite(value) else None for value in values.tolist()]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
