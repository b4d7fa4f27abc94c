"""Series -> inline SVG. Colours are CSS variables of the page, so one drawing serves the light and the dark theme."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

MOST_POINTS = 600  # drawn a line; longer series are thinned, keeping each bin's extremes
SMOOTHED_FROM = 40  # points from which a smoothed line is drawn over the raw one
SMOOTHING = 20  # the moving average spans 1 / SMOOTHING of the series
FEW_POINTS = 12  # up to here every point gets a mark

# matplotlib wants real colours: these sentinels leave it and become the page's variables.
INK, GRID, MAIN, HELD_OUT, THIRD, RULE, FOURTH, FIFTH, SIXTH = (f"#01020{place}" for place in range(1, 10))
VARIABLES = {INK: "--muted", GRID: "--grid", MAIN: "--ppo", HELD_OUT: "--eval", THIRD: "--third", RULE: "--rule"}
VARIABLES |= {FOURTH: "--fourth", FIFTH: "--fifth", SIXTH: "--sixth"}
COLOURS = {"main": MAIN, "held-out": HELD_OUT, "third": THIRD, "fourth": FOURTH, "fifth": FIFTH, "sixth": SIXTH, "rule": RULE}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.parse_math": False,
    "axes.linewidth": 0.6,
    "lines.solid_capstyle": "round",
    "path.simplify": False,
}


@dataclass(frozen=True)
class Line:
    """One series. role: its colour, one of COLOURS; "main" (training) is smoothed where it is long, others are evaluations: every point
    is marked. lows, highs: the ends of each point's interval, drawn as a bar. plain: a line without marks."""

    xs: Sequence[float]
    ys: Sequence[float]
    label: str
    role: str = "main"
    lows: Sequence[float] = ()
    highs: Sequence[float] = ()
    plain: bool = False


@dataclass(frozen=True)
class Mark:
    """A horizontal line of reference, such as chance level."""

    y: float
    label: str


def smooth(ys: Sequence[float], window: int) -> list[float]:
    """Centred moving average over up to `window` neighbours; ignores NaN, and is NaN where y is."""
    sums, counts = [0.0], [0]
    for y in ys:
        finite = math.isfinite(y)
        sums.append(sums[-1] + (y if finite else 0.0))
        counts.append(counts[-1] + finite)
    half, size = window // 2, len(ys)
    smoothed = []
    for i, y in enumerate(ys):
        low, high = max(0, i - half), min(size, i + half + 1)
        count = counts[high] - counts[low]
        smoothed.append((sums[high] - sums[low]) / count if count and math.isfinite(y) else math.nan)
    return smoothed


def thin(xs: Sequence[float], ys: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points: of each bin the lowest and the highest, in order, so that no spike is lost."""
    size = len(ys)
    if size <= most:
        return list(xs), list(ys)
    keep: list[int] = []
    bins = most // 2
    for index in range(bins):
        span = range(index * size // bins, (index + 1) * size // bins)
        finite = [i for i in span if math.isfinite(ys[i])] or [span[0]]
        keep.extend(sorted({min(finite, key=ys.__getitem__), max(finite, key=ys.__getitem__)}))
    return [xs[i] for i in keep], [ys[i] for i in keep]


def draw(name: str, lines: Sequence[Line], *, x_label: str, label: str, marks: Sequence[Mark] = (), share: bool = False) -> str:
    """An <svg> element. name: unique on the page, prefix of every id. label: what a screen reader says.

    share: the y axis in per cent.
    """

    def paint(axes: matplotlib.axes.Axes) -> None:
        for line in lines:
            draw_line(axes, line)
        for mark in marks:
            axes.axhline(mark.y, color=RULE, linewidth=0.9, dashes=(4, 3), zorder=1.5)
        dress(axes, x_label, lines, share)

    return paint_svg(name, label, paint)


def paint_svg(name: str, label: str, paint: Callable[[matplotlib.axes.Axes], None]) -> str:
    """An <svg> element of what `paint` draws; name and label as for `draw`."""
    name = _id(name)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.2, 2.25))
        FigureCanvasSVG(figure)
        paint(figure.add_axes((0.115, 0.175, 0.875, 0.775)))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name, label)


def _id(name: str) -> str:
    """A name may hold a key of the run folder, and the template does not escape drawings: letters, digits and dashes alone are left; a
    digest tells apart what would then be the same."""
    safe = re.sub(r"[^A-Za-z0-9-]", "-", name)
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def draw_line(axes: matplotlib.axes.Axes, line: Line) -> None:
    """A series with its intervals, if it has any."""
    colour, count = COLOURS[line.role], len(line.ys)
    if line.lows and count <= MOST_POINTS:
        axes.vlines(line.xs, line.lows, line.highs, color=colour, linewidth=1.0, alpha=0.45, zorder=2)
    if line.role == "main" and count >= SMOOTHED_FROM:
        axes.plot(*thin(line.xs, line.ys), color=colour, linewidth=0.8, alpha=0.28, zorder=2)
        average = smooth(line.ys, max(3, count // SMOOTHING))
        axes.plot(*thin(line.xs, average, MOST_POINTS // 2), color=colour, linewidth=1.7, zorder=3)
        return
    xs, ys = thin(line.xs, line.ys)
    marked = not line.plain and (count <= FEW_POINTS or (line.role != "main" and count <= 3 * FEW_POINTS))
    marker = "o" if marked else None
    axes.plot(xs, ys, color=colour, linewidth=1.5, marker=marker, markersize=3.2, markeredgewidth=0, zorder=4)


def dress(axes: matplotlib.axes.Axes, x_label: str, lines: Sequence[Line], share: bool) -> None:
    """Axes, grid and labels in the page's manner."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=INK, length=0, pad=4)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=2))
    for axis in (axes.xaxis, axes.yaxis):
        formatter = ScalarFormatter(useOffset=False)
        formatter.set_powerlimits((-3, 5))
        axis.set_major_formatter(formatter)
        axis.get_offset_text().set_color(INK)
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.margins(x=0.015, y=0.08)
    xs = [x for line in lines for x in line.xs]
    ys = [y for line in lines for y in line.ys if math.isfinite(y)]
    if xs and min(xs) == max(xs):
        axes.set_xlim(xs[0] - 1, xs[0] + 1)
        axes.set_xticks([xs[0]])
    if ys and min(ys) == max(ys) and not any(line.get_linestyle() == "--" for line in axes.lines):
        room = abs(ys[0]) * 0.1 or 0.1
        axes.set_ylim(ys[0] - room, ys[0] + room)
    below: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "top"}
    axes.annotate(x_label, (1, 0), (0, -18), color=INK, **below)


def _inline(svg: str, name: str, label: str) -> str:
    """Cut to the element, its ids prefixed, its style sheet out (it would govern the whole page), colours as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?<=[\s"(#])((?:xlink:)?href="#|id="|url\(#)', lambda found: found[0] + name + "-", svg)
    svg = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    view = re.search(r'viewBox="[^"]+"', svg)
    assert view is not None
    words = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = f'<svg {view[0]} role="img" aria-label="{words}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    body = re.sub(r"\s*\n\s*", "\n", svg[svg.index(">") + 1 :]).strip()
    return head + body
