"""Curves as SVG that take any width, and the HTML they are made of."""

import html
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

POINTS = 400  # of a curve; of more steps, each point is of several
DOTS = 150  # of the held-out loss; and places along a curve that tell their values
Metrics = Sequence[Mapping[str, Any]]  # the rows of metrics.jsonl


class Markup(str):
    """HTML. Any other text is escaped where it comes into a `tag`."""


def tag(name: str, *inside: Any, **attributes: Any) -> Markup:
    """An element; `class_` and `stroke_width` stand for `class` and `stroke-width`."""
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{named}>{joined(inside)}</{name}>")


def joined(parts: Iterable[Any]) -> Markup:
    return Markup(
        "".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in parts)
    )


# ------------------------------------------------------------------------- numbers


def finite(value: Any) -> float | None:
    """`value`, if it is a number; metrics.jsonl has null for NaN and infinity."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None


def short(value: float, digits: int = 3) -> str:
    """Such as 0.0121, 11.4k or 5e-4."""
    size = abs(value)
    if size == math.inf:
        return "∞"
    if value and not 1e-3 <= size < 1e15:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    for unit, power in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= power:
            return f"{value / power:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def shorts(values: Sequence[float]) -> list[str]:
    """Ticks with as many digits as it takes to tell them apart."""
    for digits in range(3, 17):
        texts = [short(value, digits) for value in values]
        if len(set(texts)) == len(texts):
            break
    return texts


class Point(NamedTuple):
    """One or several steps that follow each other."""

    first: int
    last: int
    mean: float | None  # of the finite values; None where there is none
    low: float
    high: float
    broken: bool  # a value is not finite

    @property
    def step(self) -> float:
        return (self.first + self.last) / 2

    @property
    def steps(self) -> str:
        alone = self.first == self.last
        return f"step {self.first}" if alone else f"steps {self.first} to {self.last}"


def series(metrics: Metrics, name: str, most: int) -> list[Point]:
    """The values called `name`, as at most `most` points of equally many steps."""
    values = [(row["step"], finite(row[name])) for row in metrics if name in row]
    size = -(-len(values) // most) or 1
    points = []
    for start in range(0, len(values), size):
        part = values[start : start + size]
        good = [value for _, value in part if value is not None]
        mean = math.fsum(good) / len(good) if good else None
        least, greatest = min(good, default=0), max(good, default=0)
        points.append(Point(part[0][0], part[-1][0], mean, least, greatest, len(good) < len(part)))
    return points


# ------------------------------------------------------------------------- curves


class Axis(NamedTuple):
    low: float
    high: float
    ticks: list[float]

    def percent(self, value: float) -> float:
        """Where it lies, from the low end."""
        return round((value - self.low) / (self.high - self.low) * 100, 2)

    def down(self, value: float) -> float:
        """Where it lies in per cent, from the high end."""
        return round(100 - self.percent(value), 2)


def axis(low: float, high: float, *, most: int = 6, whole: bool = False) -> Axis:
    """Ticks at 1, 2 or 5 times a power of ten; their ends are the axis', unless `whole`."""
    if high <= low:
        high = low + (abs(low) or 1)
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10, 20) if power * m >= raw * (1 - 1e-9))
    if whole:  # of steps
        step = max(1, step)
        return Axis(low, high, [step * k for k in range(math.floor(high / step + 1e-9) + 1)])
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, [step * k for k in range(first, last + 1)])


def chart(metrics: Metrics, name: str, title: str, what: str, held_out: str = "") -> Markup:
    """A plot of the metric `name` over the steps, and of the metric `held_out`; "" without values.

    Labels and dots lie at percentages, and the lines in a box that is stretched: so the plot takes
    any width, and its text stays as large as it is.
    """
    points, dots = series(metrics, name, POINTS), series(metrics, held_out, DOTS)
    known = [point for point in points + dots if point.mean is not None]
    if not known:
        return Markup()
    x = axis(0, max(1, *(point.last for point in points + dots)), whole=True)
    low, high = min(point.low for point in known), max(point.high for point in known)
    y = axis(0 if 0 <= low < 0.7 * high or low == high > 0 else low, high)
    lines = [
        tag("path", d=path, class_=class_)
        for path, class_ in (
            (_band(points, x, y), "band"),
            (_line(points, x, y), "line"),
            (_line(dots, x, y) if len(dots) > 2 else "", "line held"),
        )
        if path
    ]
    stretched = tag("svg", *lines, viewBox="0 0 1000 1000", preserveAspectRatio="none",
                    width="100%", height="100%")  # fmt: skip
    drawing = tag(
        "svg", *_grid(x, y), stretched, *_alone(points, x, y), *_broken(points, x),
        *_told(series(metrics, name, DOTS), what, x), *_dots(dots, f"held-out {what}", x, y),
        role="img", aria_label=f"{title}. {_summary(points, what)}",
    )  # fmt: skip
    legend = [tag("span", "training", class_="key")] if dots else []
    legend += [tag("span", "held out", class_="key held")] if dots else []
    if any(point.broken for point in points):
        legend.append(tag("span", "not finite", class_="key broken"))
    caption = tag("figcaption", tag("h3", title), *legend)
    return tag("figure", caption, tag("div", drawing, class_="plot"), class_=f"chart {name}")


def compared(metrics: Metrics, names: Mapping[str, str], title: str, what: str) -> Markup:
    """A plot of several metrics, {name in the metrics: name in the plot}; "" without values."""
    found = {shown: series(metrics, name, POINTS) for name, shown in names.items()}
    known = [point for points in found.values() for point in points if point.mean is not None]
    if not known:
        return Markup()
    x = axis(0, max(1, *(point.last for point in known)), whole=True)
    low, high = min(point.mean for point in known), max(point.mean for point in known)
    y = axis(0 if 0 <= low < 0.7 * high or low == high > 0 else low, high)
    lines, alone, legend, told = [], [], [], []
    for index, (shown, points) in enumerate(found.items()):
        colour = f"color: {hue(index)}"
        lines.append(tag("path", d=_line(points, x, y), class_="line own", style=colour))
        alone.append(tag("g", *_alone(points, x, y), class_="own", style=colour))
        legend.append(tag("span", shown, class_="key own", style=colour))
        told.append(f"{shown}: {_summary(points, what)}")
    stretched = tag("svg", *lines, viewBox="0 0 1000 1000", preserveAspectRatio="none",
                    width="100%", height="100%")  # fmt: skip
    drawing = tag("svg", *_grid(x, y), stretched, *alone, role="img",
                  aria_label=f"{title}. {'; '.join(told)}")  # fmt: skip
    caption = tag("figcaption", tag("h3", title), *legend)
    return tag("figure", caption, tag("div", drawing, class_="plot"), class_="chart several")


def hue(index: int) -> str:
    """A colour for each of several curves: neighbours are far apart, on light and on dark."""
    return f"hsl({(215 + 137 * index) % 360} 65% 50%)"


def _summary(points: list[Point], what: str) -> str:
    known = [point for point in points if point.mean is not None]
    if not known:
        return ""
    first, last = known[0], known[-1]
    return f"{what} {short(first.mean)} at {first.steps}, {short(last.mean)} at {last.steps}"


def _grid(x: Axis, y: Axis) -> Iterable[Markup]:
    for value, text in zip(y.ticks, shorts(y.ticks), strict=True):
        at = f"{y.down(value)}%"
        yield tag("line", x1=0, x2="100%", y1=at, y2=at, class_="grid")
        yield tag("text", text, x=0, y=at, dx=-8, dy="0.32em", text_anchor="end")
    for value, text in zip(x.ticks, shorts(x.ticks), strict=True):
        at = f"{x.percent(value)}%"
        yield tag("line", x1=at, x2=at, y1="100%", y2="100%", class_="tick")
        yield tag("text", text, x=at, y="100%", dy="1.7em", text_anchor="middle")
    yield tag("text", "step", x="100%", y="100%", dy="3.1em", text_anchor="end")


def _place(step: float, value: float, x: Axis, y: Axis) -> str:
    return f"{10 * x.percent(step):.5g} {10 * y.down(value):.5g}"


def _runs(points: list[Point]) -> Iterable[list[Point]]:
    """The parts of a curve between points without a value."""
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
    parts = ["L".join(_place(p.step, p.mean, x, y) for p in run) for run in _runs(points)]
    return "".join(f"M{part}" for part in parts)


def _band(points: list[Point], x: Axis, y: Axis) -> str:
    shapes = []
    for run in _runs(points):
        if any(p.high > p.low for p in run):
            edge = [_place(p.step, p.high, x, y) for p in run]
            edge += [_place(p.step, p.low, x, y) for p in reversed(run)]
            shapes.append(f"M{'L'.join(edge)}Z")
    return "".join(shapes)


def _alone(points: list[Point], x: Axis, y: Axis) -> Iterable[Markup]:
    """A point with none beside it makes no line."""
    for run in _runs(points):
        if len(run) == 1:
            at = {"cx": f"{x.percent(run[0].step)}%", "cy": f"{y.down(run[0].mean)}%"}
            yield tag("circle", **at, r=3, class_="alone")


def _broken(points: list[Point], x: Axis) -> Iterable[Markup]:
    for point in points:
        if point.broken:
            at = f"{x.percent(point.step)}%"
            yield tag("line", x1=at, x2=at, y1=0, y2="100%", class_="broken")


def _told(points: list[Point], what: str, x: Axis) -> Iterable[Markup]:
    """Columns over the whole plot that tell their values under the pointer."""
    places = [x.percent(point.step) for point in points]
    edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(places)), 100.0]
    for point, (left, right) in zip(points, itertools.pairwise(edges), strict=False):
        value = "not finite" if point.mean is None else short(point.mean)
        text = tag("title", f"{point.steps}: {what} {value}")
        width = f"{right - left:.2f}%"
        yield tag("rect", text, x=f"{left:.2f}%", width=width, height="100%", class_="told")


def _dots(points: list[Point], what: str, x: Axis, y: Axis) -> Iterable[Markup]:
    radius = 4 if len(points) <= 40 else 3
    for point in points:
        if point.mean is not None:
            text = tag("title", f"{point.steps}: {what} {short(point.mean)}")
            at = {"cx": f"{x.percent(point.step)}%", "cy": f"{y.down(point.mean)}%"}
            yield tag("circle", text, **at, r=radius, class_="held")
