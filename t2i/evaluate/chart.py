"""A line chart as inline SVG: axes, labels, and the values under the pointer, without a script."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 232
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 34
FLOOR, END = HEIGHT - BOTTOM, WIDTH - RIGHT
MAX_POINTS = 120  # a longer series is drawn as the mean of so many stretches
FEW_POINTS = 24  # a series of no more has a dot at each
LOG_SPAN = 30  # values that span more than this ratio are drawn on a logarithmic scale

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], *, x_label: str, y_label: str) -> str:
    """SVG of one or several series of (x, y) over common axes; colours come from the page, as classes `s0`, `s1`, ...

    Points that are not finite numbers are left out. Returns an empty string where nothing is left.
    """
    finite = {name: [point for point in points if all(map(math.isfinite, point))] for name, points in series.items()}
    xs = [x for points in finite.values() for x, _ in points]
    if not xs:
        return ""
    low, high = _widen(min(xs), max(xs))
    lines = {name: _thin(points, low, (high - low) / MAX_POINTS) for name, points in finite.items()}
    axes = _axes(low, high, [y for points in lines.values() for y in points.values()])
    spoken = "; ".join(_spoken(name or y_label, points) for name, points in lines.items() if points)
    label = escape(spoken + ("; logarithmic scale" if axes.log else ""))
    body = "".join([*_frame(axes, x_label), *_polylines(lines, axes), *_pointers(lines, axes, x_label)])
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{body}</svg>'


def number(value: float, digits: int = 3) -> str:
    """A short figure for an axis or a tooltip: 0.05, 1500, 15k, 2.5M."""
    if abs(value) >= 1_000_000:
        return f"{value / 1_000_000:.{digits}g}M"
    if abs(value) >= 10_000:
        return f"{value / 1000:.{digits}g}k"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def labels(ticks: Sequence[float]) -> list[str]:
    """The figures of an axis, with as many digits as tell them apart."""
    told = ([number(tick, digits) for tick in ticks] for digits in range(3, 10))
    return next((each for each in told if len(set(each)) == len(ticks)), [number(tick) for tick in ticks])


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about so many."""
    step = _nice_step(low, high, about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


@dataclass(frozen=True)
class _Axes:
    """Where a value lies on the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    y_ticks: list[float]
    log: bool

    def across(self, x: float) -> float:
        low, high = self.x
        return LEFT + (x - low) / (high - low) * (END - LEFT)

    def down(self, y: float) -> float:
        low, high = self.y
        share = math.log(y / low) / math.log(high / low) if self.log else (y - low) / (high - low)
        return FLOOR - share * (FLOOR - TOP)


def _axes(low_x: float, high_x: float, values: list[float]) -> _Axes:
    """Round ends for the vertical axis; a linear one starts at zero where that wastes less than half of it."""
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_SPAN:
        ticks = _log_ticks(low, high)
        return _Axes((low_x, high_x), (min(low, *ticks), max(high, *ticks)), ticks, True)
    low, high = _widen(low, high)
    low = 0.0 if 0 < low < high / 2 else low
    step = _nice_step(low, high, 4)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return _Axes((low_x, high_x), (low, high), nice_ticks(low, high, 4), False)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low * 0.6 <= tick <= high * 1.3]
        if len(ticks) > 3:
            break
    return ticks


def _nice_step(low: float, high: float, about: int) -> float:
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)


def _widen(low: float, high: float) -> tuple[float, float]:
    """A range of some width, where all values are one."""
    pad = max(abs(low) * 0.05, 1e-6)
    return (low, high) if high - low > 1e-9 * max(1.0, abs(high)) else (low - pad, high + pad)


def _thin(points: Points, low: float, width: float) -> dict[float, float]:
    """Means over equal stretches of x, so that a long series stays light and its noise does not hide its course."""
    stretches: dict[int, list[tuple[float, float]]] = {}
    for x, y in sorted(points):
        stretches.setdefault(int((x - low) / width), []).append((x, y))
    return {group[-1][0]: sum(y for _, y in group) / len(group) for group in stretches.values()}


def _frame(axes: _Axes, x_label: str) -> list[str]:
    parts = []
    for tick, label in zip(axes.y_ticks, labels(axes.y_ticks), strict=True):
        y = axes.down(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{END}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 7, y + 4, "end", label))
    across = nice_ticks(*axes.x, 5)
    parts += [
        _text(axes.across(tick), FLOOR + 16, "middle", label)
        for tick, label in zip(across, labels(across), strict=True)
    ]
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{END}" y1="{FLOOR}" y2="{FLOOR}"/>')
    parts.append(_text((LEFT + END) / 2, HEIGHT - 3, "middle", x_label))
    return parts


def _polylines(lines: Mapping[str, Mapping[float, float]], axes: _Axes) -> list[str]:
    parts = []
    for index, points in enumerate(lines.values()):
        places = [(f"{axes.across(x):.1f}", f"{axes.down(y):.1f}") for x, y in points.items()]
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline class="line s{index % 6}" points="{path}"/>')
        if len(places) <= FEW_POINTS:
            parts += [f'<circle class="s{index % 6}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in places]
    return parts


def _pointers(lines: Mapping[str, Mapping[float, float]], axes: _Axes, x_label: str) -> list[str]:
    """One invisible column an x, which shows its values while the pointer rests on it."""
    xs = sorted({x for points in lines.values() for x in points})
    middles = [axes.across((a + b) / 2) for a, b in itertools.pairwise(xs)]
    parts = []
    for x, start, end in zip(xs, [LEFT, *middles], [*middles, END], strict=True):
        here = [(index, name, points[x]) for index, (name, points) in enumerate(lines.items()) if x in points]
        said = f"{number(x)}: " + ", ".join(f"{name} {number(y)}".strip() for _, name, y in here)
        at = axes.across(x)
        dots = "".join(f'<circle class="s{i % 6}" cx="{at:.1f}" cy="{axes.down(y):.1f}" r="3.5"/>' for i, _, y in here)
        left = at > WIDTH / 2
        # The value is drawn in the page too, not only in a title: a title shows late, and never on a touch screen.
        parts.append(
            f'<g class="at"><title>{escape(f"{x_label} {said}")}</title>'
            f'<rect x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" height="{FLOOR - TOP}"/>'
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{FLOOR}"/>{dots}'
            f"{_text(at - 6 if left else at + 6, TOP + 10, 'end' if left else 'start', said)}</g>"
        )
    return parts


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _spoken(name: str, points: Mapping[float, float]) -> str:
    ys = list(points.values())
    return f"{name} from {number(ys[0])} to {number(ys[-1])}"
