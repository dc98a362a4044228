"""Curves as SVG that scales to any width."""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lora_jax.training.report import formatting, run_files
from lora_jax.training.report.markup import Markup, tag

POINTS = 400  # at most, of a curve; in a longer run each point averages several steps
DOTS = 150  # at most, of the held-out loss; also the places that show their value on hover


class Point(NamedTuple):
    """One step, or the mean of several consecutive ones."""

    first: int
    last: int
    mean: float | None  # of the finite values; None if there are none
    low: float
    high: float
    has_nonfinite: bool

    @property
    def step(self) -> float:
        return (self.first + self.last) / 2

    @property
    def steps(self) -> str:
        alone = self.first == self.last
        return f"step {self.first}" if alone else f"steps {self.first} to {self.last}"


def series(metrics: run_files.Metrics, name: str, most: int) -> list[Point]:
    """The metric `name` as at most `most` points, each of the same number of steps."""
    values = [(row["step"], formatting.finite(row[name])) for row in metrics if name in row]
    size = -(-len(values) // most) or 1
    points = []
    for start in range(0, len(values), size):
        part = values[start : start + size]
        good = [value for _, value in part if value is not None]
        mean = math.fsum(good) / len(good) if good else None
        least, greatest = min(good, default=0), max(good, default=0)
        points.append(Point(part[0][0], part[-1][0], mean, least, greatest, len(good) < len(part)))
    return points


class Axis(NamedTuple):
    """A range of values, and where its ticks are."""

    low: float
    high: float
    ticks: list[float]

    def percent(self, value: float) -> float:
        """The distance of `value` from the low end, in per cent."""
        return round((value - self.low) / (self.high - self.low) * 100, 2)

    def down(self, value: float) -> float:
        """The distance of `value` from the high end, in per cent."""
        return round(100 - self.percent(value), 2)


def axis(low: float, high: float, *, whole: bool = False) -> Axis:
    """An axis with ticks at multiples of 1, 2 or 5 times a power of ten.

    It ends at its outer ticks. whole: it counts steps: it ends at `high`, its ticks are integers.
    """
    if high <= low:
        high = low + (abs(low) or 1)
    raw = (high - low) / 6  # the step if there were the most ticks
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10, 20) if power * m >= raw * (1 - 1e-9))
    if whole:
        step = max(1, step)
        return Axis(low, high, [step * k for k in range(math.floor(high / step + 1e-9) + 1)])
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, [step * k for k in range(first, last + 1)])


def chart(
    metrics: run_files.Metrics, name: str, title: str, what: str, held_out: str = ""
) -> Markup:
    """A plot of the metrics `name` and `held_out` over the steps; "" if they have no values.

    Labels and dots are placed at percentages, and the curves are drawn in a stretched box. So the
    plot scales to any width while its text keeps its size.
    """
    points, dots = series(metrics, name, POINTS), series(metrics, held_out, DOTS)
    known = [point for point in points + dots if point.mean is not None]
    if not known:
        return Markup()
    x = axis(0, max(1, *(point.last for point in points + dots)), whole=True)
    y = _value_axis(min(point.low for point in known), max(point.high for point in known))
    lines = [
        tag("path", d=path, class_=class_)
        for path, class_ in (
            (_band(points, x, y), "band"),
            (_line(points, x, y), "line"),
            (_line(dots, x, y) if len(dots) > 2 else "", "line held"),
        )
        if path
    ]
    drawing = tag(
        "svg", *_grid(x, y), _stretched(lines),
        *_single_points(points, x, y), *_not_finite(points, x),
        *_hover_values(series(metrics, name, DOTS), what, x),
        *_dots(dots, f"held-out {what}", x, y),
        role="img", aria_label=f"{title}. {_summary(points, what)}",
    )  # fmt: skip
    legend = [tag("span", "training", class_="key")] if dots else []
    legend += [tag("span", "held out", class_="key held")] if dots else []
    if any(point.has_nonfinite for point in points):
        legend.append(tag("span", "not finite", class_="key broken"))
    return _figure(title, legend, drawing, name)


def compared(metrics: run_files.Metrics, names: Mapping[str, str], title: str, what: str) -> Markup:
    """A plot of several metrics, {metric: label in the plot}; "" if they have no values."""
    found = {shown: series(metrics, name, POINTS) for name, shown in names.items()}
    known = [point for points in found.values() for point in points if point.mean is not None]
    if not known:
        return Markup()
    x = axis(0, max(1, *(point.last for point in known)), whole=True)
    means = [point.mean for point in known]
    y = _value_axis(min(means), max(means))
    lines, singles, legend, summaries = [], [], [], []
    for index, (shown, points) in enumerate(found.items()):
        colour = f"color: {hue(index)}"
        lines.append(tag("path", d=_line(points, x, y), class_="line own", style=colour))
        singles.append(tag("g", *_single_points(points, x, y), class_="own", style=colour))
        legend.append(tag("span", shown, class_="key own", style=colour))
        summaries.append(f"{shown}: {_summary(points, what)}")
    drawing = tag("svg", *_grid(x, y), _stretched(lines), *singles, role="img",
                  aria_label=f"{title}. {'; '.join(summaries)}")  # fmt: skip
    return _figure(title, legend, drawing, "several")


def _value_axis(low: float, high: float) -> Axis:
    """From zero, unless that would leave most of the plot empty."""
    return axis(0 if 0 <= low < 0.7 * high or low == high > 0 else low, high)


def _stretched(lines: Iterable[Markup]) -> Markup:
    return tag("svg", *lines, viewBox="0 0 1000 1000", preserveAspectRatio="none",
               width="100%", height="100%")  # fmt: skip


def _figure(title: str, legend: Iterable[Markup], drawing: Markup, kind: str) -> Markup:
    caption = tag("figcaption", tag("h3", title), *legend)
    return tag("figure", caption, tag("div", drawing, class_="plot"), class_=f"chart {kind}")


def hue(index: int) -> str:
    """The colour of one of several curves; neighbors are easy to tell apart on both schemes."""
    return f"hsl({(215 + 137 * index) % 360} 65% 50%)"


def _summary(points: list[Point], what: str) -> str:
    known = [point for point in points if point.mean is not None]
    if not known:
        return ""
    first, last = known[0], known[-1]
    begin, end = formatting.short(first.mean), formatting.short(last.mean)
    return f"{what} {begin} at {first.steps}, {end} at {last.steps}"


def _grid(x: Axis, y: Axis) -> Iterable[Markup]:
    for value, text in zip(y.ticks, formatting.ticks(y.ticks), strict=True):
        at = f"{y.down(value)}%"
        yield tag("line", x1=0, x2="100%", y1=at, y2=at, class_="grid")
        yield tag("text", text, x=0, y=at, dx=-8, dy="0.32em", text_anchor="end")
    for value, text in zip(x.ticks, formatting.ticks(x.ticks), strict=True):
        at = f"{x.percent(value)}%"
        yield tag("line", x1=at, x2=at, y1="100%", y2="100%", class_="tick")
        yield tag("text", text, x=at, y="100%", dy="1.7em", text_anchor="middle")
    yield tag("text", "step", x="100%", y="100%", dy="3.1em", text_anchor="end")


def _position(step: float, value: float, x: Axis, y: Axis) -> str:
    return f"{10 * x.percent(step):.5g} {10 * y.down(value):.5g}"


def _segments(points: list[Point]) -> Iterable[list[Point]]:
    """The parts of a curve between points that have no value."""
    run: list[Point] = []
    for point in points:
        if point.mean is not None:
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _line(points: list[Point], x: Axis, y: Axis) -> str:
    parts = ["L".join(_position(p.step, p.mean, x, y) for p in run) for run in _segments(points)]
    return "".join(f"M{part}" for part in parts)


def _band(points: list[Point], x: Axis, y: Axis) -> str:
    shapes = []
    for run in _segments(points):
        if any(p.high > p.low for p in run):
            edge = [_position(p.step, p.high, x, y) for p in run]
            edge += [_position(p.step, p.low, x, y) for p in reversed(run)]
            shapes.append(f"M{'L'.join(edge)}Z")
    return "".join(shapes)


def _single_points(points: list[Point], x: Axis, y: Axis) -> Iterable[Markup]:
    """Dots for points without a neighbor, which a line would not show."""
    for run in _segments(points):
        if len(run) == 1:
            at = {"cx": f"{x.percent(run[0].step)}%", "cy": f"{y.down(run[0].mean)}%"}
            yield tag("circle", **at, r=3, class_="alone")


def _not_finite(points: list[Point], x: Axis) -> Iterable[Markup]:
    for point in points:
        if point.has_nonfinite:
            at = f"{x.percent(point.step)}%"
            yield tag("line", x1=at, x2=at, y1=0, y2="100%", class_="broken")


def _hover_values(points: list[Point], what: str, x: Axis) -> Iterable[Markup]:
    """Columns over the whole plot, each with its value as a tooltip."""
    places = [x.percent(point.step) for point in points]
    edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(places)), 100.0]
    for point, (left, right) in zip(points, itertools.pairwise(edges), strict=False):
        value = "not finite" if point.mean is None else formatting.short(point.mean)
        text = tag("title", f"{point.steps}: {what} {value}")
        width = f"{right - left:.2f}%"
        yield tag("rect", text, x=f"{left:.2f}%", width=width, height="100%", class_="told")


def _dots(points: list[Point], what: str, x: Axis, y: Axis) -> Iterable[Markup]:
    radius = 4 if len(points) <= 40 else 3
    for point in points:
        if point.mean is not None:
            text = tag("title", f"{point.steps}: {what} {formatting.short(point.mean)}")
            at = {"cx": f"{x.percent(point.step)}%", "cy": f"{y.down(point.mean)}%"}
            yield tag("circle", text, **at, r=radius, class_="held")
