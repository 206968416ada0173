"""Charts as SVG and a little CSS: lines that stretch with the page, text that does not, no script.

A picture has a sentence that says what it shows; the figures behind it stand in a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from distft.report.formatting import short
from distft.report.html import Html, h

_WIDE, _HIGH = 1000, 400
MOST_POINTS = 400
"""A line of more is averaged over neighbours: no screen shows them."""
_NOISY = 40
"""Points from which a line is drawn pale, with a running mean over it."""
STYLES = 6
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line. Told from others by colour and by dashes, or by being dots."""

    name: str
    points: Points
    style: int = 1
    """1 to `STYLES`: colour and dashes."""
    kind: str = "line"
    """line | noisy (a pale line with its running mean) | dots | level (a horizontal rule)."""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    says: str,
    unit: str = "",
    wide: bool = False,
    from_zero: bool = False,
    logarithmic: bool = False,
) -> Html | None:
    """Return a figure; None when no series has a point. `says`: its text alternative for screen readers."""
    drawn = [curve for curve in series if curve.points]
    if not drawn:
        return None
    xs = [x for curve in drawn for x, _ in curve.points if curve.kind != "level"] or [0.0, 1.0]
    ys = [y for curve in drawn for _, y in curve.points]
    x_ticks = [tick for tick in ticks(min(xs), max(xs), 5) if min(xs) <= tick <= max(xs)]
    spread = decades if logarithmic else ticks
    y_ticks = spread(min([0.0, *ys] if from_zero else ys), max(ys), 4)
    frame = _Frame(min(xs), max(xs), y_ticks[0], y_ticks[-1], logarithmic)
    unit = ", ".join(filter(None, [unit, "logarithmic" if logarithmic else ""]))
    svg = h(
        "svg",
        [h("line", x1=0, x2=_WIDE, y1=frame.y(tick), y2=frame.y(tick), class_="grid") for tick in y_ticks[1:]],
        h("line", x1=0, x2=_WIDE, y1=_HIGH, y2=_HIGH, class_="axis"),
        [_drawn(curve, frame) for curve in drawn],
        viewBox=f"0 0 {_WIDE} {_HIGH}",
        preserveAspectRatio="none",
        aria_hidden="true",
        focusable="false",
    )
    area = h("div", svg, _labels(frame, x_ticks, y_ticks), class_="area")
    heading = h("figcaption", h("h3", title, h("span", f" {unit}", class_="soft") if unit else None), _legends(drawn))
    plot = h("div", area, class_="plot", role="img", aria_label=f"{title}: {says}")
    return h("figure", heading, plot, class_="wide" if wide else None)


def _labels(frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> Html:
    """Return the ticks' texts in a picture of their own, which keeps their shape when the lines are stretched.

    Their places are attributes, no styles: a page whose policy forbids styles in its markup shows them too.
    """
    return h(
        "svg",
        [
            h("text", short(tick), x=0, y=f"{frame.y(tick) / _HIGH * 100:.2f}%", dx="-.6em", dy=".32em", class_="y")
            for tick in y_ticks
        ],
        [
            h("text", short(tick), x=f"{frame.x(tick) / _WIDE * 100:.2f}%", y="100%", dy="1.4em", class_="x")
            for tick in x_ticks
        ],
        aria_hidden="true",
        focusable="false",
    )


def scatter(
    title: str, dots: Sequence[tuple[str, float, float]], *, says: str, across: str, up: str, wide: bool = False
) -> Html:
    """Draw named dots (name, x, y), each of its own shape and colour."""
    xs, ys = [x for _, x, _ in dots], [y for _, _, y in dots]
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs) * 1.08, 4), ticks(min(ys), max(ys), 4)
    frame = _Frame(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    svg = h(
        "svg",
        [h("line", x1=0, x2=_WIDE, y1=frame.y(tick), y2=frame.y(tick), class_="grid") for tick in y_ticks[1:]],
        [h("line", x1=frame.x(tick), x2=frame.x(tick), y1=0, y2=_HIGH, class_="grid") for tick in x_ticks[1:]],
        h("line", x1=0, x2=_WIDE, y1=_HIGH, y2=_HIGH, class_="axis"),
        viewBox=f"0 0 {_WIDE} {_HIGH}",
        preserveAspectRatio="none",
        aria_hidden="true",
        focusable="false",
    )
    marks = [
        h(
            "span",
            sign(number),
            class_="dot",
            style=f"left:{frame.x(x) / _WIDE * 100:.2f}%;bottom:{100 - frame.y(y) / _HIGH * 100:.2f}%",
        )
        for number, (_, x, y) in enumerate(dots, start=1)
    ]
    area = h(
        "div",
        svg,
        [
            h("span", short(tick), class_="y", style=f"bottom:{100 - frame.y(tick) / _HIGH * 100:.2f}%")
            for tick in y_ticks
        ],
        [h("span", short(tick), class_="x", style=f"left:{frame.x(tick) / _WIDE * 100:.2f}%") for tick in x_ticks],
        marks,
        class_="area",
    )
    names = [h("span", sign(position), name, class_="legend") for position, (name, _, _) in enumerate(dots, start=1)]
    heading = h("figcaption", h("h3", title), h("span", f"{up}, over {across}", class_="over"), names)
    plot = h("div", area, class_="plot", role="img", aria_label=f"{title}: {says}")
    return h("figure", heading, plot, class_="wide" if wide else None)


def whisker(low: float, high: float, marks: Sequence[tuple[float, float, float, int]]) -> Html:
    """Draw intervals one below another, from low to high: (value, low, high, style); style 0 is a base model's."""
    width, left = 176.0, 6.0

    def x_of(value: float) -> float:
        share = 0.5 if high <= low else (value - low) / (high - low)
        return round(left + min(1.0, max(0.0, share)) * (width - 2 * left), 1)

    rows = []
    for number, (value, below, above, style) in enumerate(marks):
        y = 16.0 if len(marks) == 1 else 9.0 + 14.0 * number
        rows += [
            h("line", x1=x_of(below), x2=x_of(above), y1=y, y2=y, class_=f"c{style}" if style else "c6 dashed"),
            h("circle", cx=x_of(value), cy=y, r=4, class_=f"full c{style}" if style else "hollow"),
        ]
    rule = h("line", x1=left, x2=width - left, y1=31, y2=31, class_="scale")
    return h("svg", rule, rows, viewBox=f"0 0 {width:.0f} 32", class_="whisker", aria_hidden="true", focusable="false")


def meter(share: float, style: int = 1) -> Html:
    """Return a bar of a table's cell, beside the figure that it stands for."""
    width = f"width:{100 * min(1.0, max(0.0, share)):.1f}%;background:var(--s{style})"
    return h("span", class_="meter", style=width, aria_hidden="true")


def sign(style: int) -> Html:
    """Return the shape that goes with a colour."""
    return h("span", "●■▲◆▼★"[(style - 1) % 6], class_=f"c{(style - 1) % 6 + 1}", aria_hidden="true")


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers, equally far apart, the first at or below `low` and the last at or above `high`."""
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-300):  # the same, but for digits that floats do not hold
        pad = abs(low) * 0.1 if abs(low) > 1e-300 else 1.0
        low, high = low - pad if low else 0.0, high + pad
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * times for times in (1, 2, 2.5, 5, 10) if (high - low) / (step * times) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    places = max(0, 3 - math.floor(math.log10(step)))  # of the step's own digits, however small it is
    return [round(index * step, places) for index in range(first, last + 1)]


def decades(low: float, high: float, most: int) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten around `low` to `high`; powers alone when these are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    times = (1, 2, 5) if last - first <= most else (1,)
    every = [round(10.0**power * by, 12) for power in range(first, last + 1) for by in times]
    begin = max(index for index, value in enumerate(every) if value <= low * (1 + 1e-9))
    end = min(index for index, value in enumerate(every) if value >= high * (1 - 1e-9))
    return every[begin : end + 1]


@dataclass(frozen=True)
class _Frame:
    low_x: float
    high_x: float
    low_y: float
    high_y: float
    logarithmic: bool = False

    def x(self, value: float) -> float:
        return _round(_WIDE * (value - self.low_x) / ((self.high_x - self.low_x) or 1))

    def y(self, value: float) -> float:
        value, low, high = (
            math.log(bound) if self.logarithmic else bound for bound in (value, self.low_y, self.high_y)
        )
        return _round(_HIGH * (1 - (value - low) / ((high - low) or 1)))


def _drawn(curve: Series, frame: _Frame) -> Iterator[Html]:
    style = f"c{(curve.style - 1) % 6 + 1} d{(curve.style - 1) % 6 + 1}"
    match curve.kind:
        case "level":
            y = frame.y(curve.points[0][1])
            yield h("line", x1=0, x2=_WIDE, y1=y, y2=y, class_=f"trend {style}")
        case "dots":
            yield h(
                "path",
                d=" ".join(f"M{frame.x(x)} {frame.y(y)}h0" for x, y in curve.points),
                class_=f"mark c{curve.style}",
            )
        case "noisy" if len(curve.points) > _NOISY:
            yield h("path", d=_path(thin(curve.points), frame), class_=f"raw c{curve.style}")
            yield h("path", d=_path(thin(running_mean(curve.points)), frame), class_=f"trend {style}")
        case _:
            yield h("path", d=_path(thin(curve.points), frame), class_=f"trend {style}")


def _path(points: Points, frame: _Frame) -> str:
    if len(points) == 1:
        return f"M{frame.x(points[0][0])} {frame.y(points[0][1])}h6"
    return "M" + "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in points)


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """Return at most `most` points: of each run of neighbours the mean."""
    if len(points) <= most:
        return points
    edges = [round(index * len(points) / most) for index in range(most + 1)]
    parts = [points[begin:end] for begin, end in pairwise(edges)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def running_mean(points: Points) -> Points:
    """Return means over a fortieth of the line on both sides, less at its ends so that these are not bent."""
    reach = max(1, len(points) // 40)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smooth = []
    for index, (x, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        smooth.append((x, (sums[index + near + 1] - sums[index - near]) / (2 * near + 1)))
    return smooth


def _legends(series: Sequence[Series]) -> list[Html]:
    return [h("span", _swatch(curve), curve.name, class_="legend") for curve in series] if len(series) > 1 else []


def _swatch(curve: Series) -> Html:
    number = (curve.style - 1) % 6 + 1
    if curve.kind == "dots":
        inside = h("path", d="M16 7h0", class_=f"mark c{number}")
    else:
        inside = h("line", x1=0, x2=32, y1=7, y2=7, class_=f"trend c{number} d{number}")
    return h("svg", inside, viewBox="0 0 32 14", aria_hidden="true", focusable="false")


def _round(value: float) -> float:
    return round(value, 1)
