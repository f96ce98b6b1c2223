"""Charts of runs side by side, losses and quality, as SVG for the inside of a page whose colors it takes."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from lowssl_core.comparison.run_folder import ComparedRun, Row, is_number
from lowssl_core.comparison.runs import MEASURES, Comparison
from lowssl_core.figures import FAINT, GLOBAL, GREEN, INK, LOCAL, PINK

# Of the runs: away from the blue and orange of global and local views. Runs also differ by their dashes and letters.
RUN_COLORS = (GREEN, "#7B4FB5", "#B07A00", PINK, "#7A4B3A", "#2F8FA8", "#6B7A00")
RUN_DASHES = ("-", (0, (6, 1.5)), (0, (3, 1.2)), (0, (7, 1.5, 1.5, 1.5)))
RULE, PAPER = "#E6E6E6", "#FFFFFF"
# What a page with a dark background shows in place of a color.
DARK = {
    GREEN: "#3CC99B",
    "#7B4FB5": "#B79AEA",
    "#B07A00": "#E3B341",
    PINK: "#E6A3C8",
    "#7A4B3A": "#CB9C88",
    "#2F8FA8": "#6CC6DC",
    "#6B7A00": "#B5C44A",
    GLOBAL: "#5AAEE6",
    LOCAL: "#FF8A4C",
    FAINT: "#8A9099",
    RULE: "#353B43",
    PAPER: "#1B1F24",
}
SIZE, INSIDE = (4.4, 2.9), (0.125, 0.17, 0.95, 0.97)
MOST_POINTS = 300


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart: an SVG element for the inside of a page, its title, and what it shows in words."""

    title: str
    svg: str
    alt: str


def css_name(color: str) -> str:
    """The custom property that holds a color on the page."""
    return f"--c-{color[1:].lower()}"


def color_of(run: ComparedRun) -> str:
    """The color of a run, by its letter."""
    return RUN_COLORS[(ord(run.key) - ord("A")) % len(RUN_COLORS)]


def loss_charts(comparison: Comparison) -> list[Chart]:
    """The loss and its two parts against the images seen; empty before there are any."""
    runs = [run for run in comparison.runs if run.training]
    charts = []
    names = {"loss": "Loss", "global_loss": "Loss of global pairs", "local_loss": "Loss of local pairs"}
    for name, title in names.items():
        lines = {run.key: _thin(run.training, name) for run in runs}
        # Without local views their loss is 0 throughout.
        if any(values.any() for _, values in lines.values()):
            charts.append(_line_chart(runs, lines, title))
    return charts


def quality_charts(comparison: Comparison) -> list[Chart]:
    """Each measure of quality against the images seen, raw pixels as levels, the teacher at the end."""
    charts = []
    for measure, name in MEASURES.items():
        rows = {run.key: [row for row in run.quality if is_number(row.get(measure))] for run in comparison.runs}
        runs = [run for run in comparison.runs if rows[run.key]]
        if runs:
            lines = {run.key: _columns(rows[run.key], measure) for run in runs}
            charts.append(_line_chart(runs, lines, name, measure))
    return charts


def _line_chart(
    runs: Sequence[ComparedRun],
    lines: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    title: str,
    measure: str | None = None,
) -> Chart:
    """A line a run with its letter at the end; with `measure`, its yardsticks too."""
    figure, axis = new_figure(SIZE, INSIDE)
    ends = []
    for run in runs:
        images, values = lines[run.key]
        color, dash = color_of(run), RUN_DASHES[(ord(run.key) - ord("A")) % len(RUN_DASHES)]
        marker = "o" if measure or len(values) == 1 else ""
        axis.plot(images, values, color=color, linestyle=dash, linewidth=1.7, marker=marker, markersize=3.5)
        ends.append((float(images[-1]), float(values[-1]), run.key, color))
        if measure and (teacher := run.result(measure, "teacher")) is not None:
            axis.plot(images[-1:], [teacher], "D", color=PAPER, markeredgecolor=color, markersize=5, zorder=4)
    if measure:
        _draw_levels(axis, runs, measure)
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel("images seen")
    axis.margins(x=0.04)
    clean(axis, "y")
    _label_ends(axis, ends)
    told = ", ".join(f"{key} ends at {value:.3f} after {images:,.0f}" for images, value, key, _ in ends)
    return to_chart(figure, title, f"{title} against images seen: {told}")


def _draw_levels(axis: Axes, runs: Sequence[ComparedRun], measure: str) -> None:
    """Raw pixels: a level for all, or in each run's color where runs were measured on different images."""
    levels: dict[float, list[ComparedRun]] = {}
    for run in runs:
        if (value := run.result(measure, "pixels")) is not None:
            levels.setdefault(round(value, 4), []).append(run)
    for value, of in levels.items():
        is_shared = len(of) == len(runs)
        color = FAINT if is_shared else color_of(of[0])
        name = "raw pixels" if is_shared else f"raw pixels of {', '.join(run.key for run in of)}"
        axis.axhline(value, color=color, linewidth=1.2, linestyle=(0, (1, 2)))
        place = axis.get_yaxis_transform()
        axis.annotate(name, (0.01, value), (0, 3), xycoords=place, textcoords="offset points", fontsize=8, color=color)


def _label_ends(axis: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each run's letter beside its line's end; letters that would cover each other move apart."""
    space = 0.075 * float(np.ptp(axis.get_ylim()))
    near = 0.06 * float(np.ptp(axis.get_xlim()))
    stacks: list[list[tuple[float, float, str, str]]] = []
    for end in sorted(ends, key=lambda end: end[1]):
        stack = [end]
        while (other := next((each for each in stacks if _collide(each, stack, near, space)), None)) is not None:
            stacks.remove(other)
            stack = sorted(other + stack, key=lambda end: end[1])
        stacks.append(stack)
    for stack in stacks:
        for (images, _, key, color), place in zip(stack, _spread(stack, space), strict=True):
            axis.annotate(
                key,
                (images, place),
                (6, 0),
                textcoords="offset points",
                va="center",
                color=color,
                fontsize=10,
                weight="bold",
                annotation_clip=False,
            )


def _spread(stack: Sequence[tuple[float, float, str, str]], space: float) -> NDArray[np.float64]:
    """Heights of a stack's letters: `space` apart, around the mean of where their lines end."""
    middle = np.mean([value for _, value, _, _ in stack])
    return np.asarray(middle + space * (np.arange(len(stack)) - (len(stack) - 1) / 2), float)


def _collide(
    one: Sequence[tuple[float, float, str, str]],
    other: Sequence[tuple[float, float, str, str]],
    near: float,
    space: float,
) -> bool:
    are_near = any(abs(a[0] - b[0]) < near for a in one for b in other)
    low, high = sorted((_spread(one, space), _spread(other, space)), key=lambda places: float(places[0]))
    return are_near and bool(low[-1] + 0.99 * space > high[0])


def _thin(rows: Sequence[Row], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Images and values of at most `MOST_POINTS` points: means over neighbours, the last at the last image."""
    images, values = _columns(rows, name)
    parts = min(len(rows), MOST_POINTS)
    ends = np.array([part[-1] for part in np.array_split(images, parts)])
    return ends, np.array([part.mean() for part in np.array_split(values, parts)])


def _columns(rows: Sequence[Row], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.array([row["images"] for row in rows], float), np.array([row[name] for row in rows], float)


def new_figure(
    size: tuple[float, float], inside: tuple[float, float, float, float] | None = None
) -> tuple[Figure, Axes]:
    """A figure of `size` in inches with one axis, nothing behind them.

    `inside` is the axis's left, bottom, right and top as shares of the figure; None: found from its labels, which
    takes twice as long to draw.
    """
    figure = Figure(figsize=size, layout=None if inside else "constrained", facecolor="none")
    places = dict(zip(("left", "bottom", "right", "top"), inside, strict=True)) if inside else None
    axis = figure.subplots(gridspec_kw=places)
    axis.set_facecolor("none")
    return figure, axis


def clean(axis: Axes, grid: Literal["x", "y"]) -> None:
    """The look of all charts: two spines, and a grid across the values."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["bottom", "left"]].set_color(FAINT)
    axis.grid(axis=grid, color=RULE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", color=FAINT, labelcolor=INK, labelsize=9)
    axis.xaxis.label.set_color(INK)


def to_chart(figure: Figure, title: str, alt: str) -> Chart:
    """A figure as a chart; `alt`, what it shows in words, tells it from others on its page."""
    # Text stays text: sharp, in the page's font, and found by the browser's search.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return Chart(title=title, svg=_inline(buffer.getvalue()), alt=alt)


def _inline(svg: str) -> str:
    """The SVG of a file as an element of a page: no prolog, metadata, fixed size or fonts; colors are the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head = svg[: svg.index(">") + 1]
    box = re.search(r'viewBox="([^"]*)"', head)
    assert box is not None
    svg = f'<svg viewBox="{box[1]}" aria-hidden="true" focusable="false">' + svg[len(head) :]
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg)  # of everything on the page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg).replace("xlink:href", "href")
    for color in (*DARK, INK):
        target = "currentColor" if color == INK else f"var({css_name(color)})"
        svg = re.sub(re.escape(color), target, svg, flags=re.IGNORECASE)
    return svg
