"""Figures as PNG: one image's views with the matched local size, a run's curves beside baselines, nearest neighbors."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from lowssl_core.files import write_atomically
from lowssl_core.views import NUM_GLOBALS, CpuViews, Measurement, ViewParameters, ViewsConfig, sample_parameters

Pixels = NDArray[np.uint8]

# Okabe and Ito's colours, which people with any kind of colour blindness can tell apart.
GLOBAL, LOCAL, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
INK, FAINT = "#333333", "#999999"
BASELINES = (FAINT, PINK, GREEN)
# Baselines also differ by their dashes: gray and colours alike fade on paper.
DASHES = ((0, (1, 1.5)), (0, (4, 2)), (0, (6, 2, 1, 2)))
# Width over height of the panel that the views are drawn in.
PANEL_ASPECT = 1.15


def views_figure(path: Path, image: Pixels, config: ViewsConfig, measurement: Measurement, *, seed: int = 0) -> None:
    """Draw an image with the boxes of its views, the views at true relative size, and the ratio over local sizes.

    Args:
        path: the PNG to write.
        image: (H, W, 3) uint8.
        config: the recipe's views.
        measurement: of `config` on the data that `image` is from.
        seed: of the views drawn.
    """
    height, width = image.shape[:2]
    parameters = sample_parameters(config, measurement.local_size, height, width, np.random.default_rng(seed))
    globals_, locals_ = CpuViews(config, measurement.local_size).render(image, parameters)
    figure = Figure(figsize=(13.5, 4.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1.25, 1))
    _draw_boxes(left, image, parameters)
    _draw_views(middle, [*globals_], [*locals_])
    _draw_ratio(right, config, measurement)
    save(figure, path)


def curves_figure(
    path: Path,
    training: Sequence[Mapping[str, float]],
    quality: Sequence[Mapping[str, float]],
    baselines: Mapping[str, Mapping[str, float]],
    *,
    title: str,
) -> None:
    """Draw a run's loss and its quality against the images seen, with baselines as horizontal lines.

    Args:
        path: the PNG to write.
        training: rows with "images", "loss", "global_loss" and "local_loss".
        quality: rows with "images", "retrieval" and, where there are labels, "knn"; 0 to 1.
        baselines: by name, the same measures of what the run is compared with.
        title: of the whole figure.
    """
    measures = {"retrieval": "retrieval, recall@1", "knn": "k-NN accuracy"}
    shown = [name for name in measures if any(name in row for row in quality)]
    figure = Figure(figsize=(4.6 * (1 + len(shown)), 4.2), layout="constrained")
    axes = figure.subplots(1, 1 + len(shown), squeeze=False)[0]
    _draw_loss(axes[0], training)
    for axis, name in zip(axes[1:], shown, strict=True):
        levels = {baseline: values[name] for baseline, values in baselines.items() if name in values}
        _draw_quality(axis, [row for row in quality if name in row], name, levels)
        axis.set_title(measures[name], loc="left", fontsize=11, color=INK)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    save(figure, path)


def neighbors_figure(
    path: Path,
    images: Sequence[Pixels],
    queries: Sequence[int],
    neighbors: NDArray[np.int64],
    cosines: NDArray[np.float32],
) -> None:
    """Draw images, each above its nearest others with their cosines, the nearest first.

    Args:
        path: the PNG to write.
        images: (H, W, 3) uint8 each.
        queries: which of the images are shown, a column each.
        neighbors: (N, k), the nearest images to each image.
        cosines: (N, k), to them.
    """
    rows = 1 + neighbors.shape[1]
    figure = Figure(figsize=(1.25 * len(queries), 1.45 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, len(queries), squeeze=False)
    for column, query in enumerate(queries):
        for row, index in enumerate([query, *neighbors[query]]):
            axis = axes[row][column]
            axis.imshow(images[index])
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color=GLOBAL if row == 0 else FAINT, linewidth=2.4 if row == 0 else 0.6)
            if row > 0:
                axis.set_xlabel(f"{cosines[query][row - 1]:.2f}", fontsize=8, color=INK, labelpad=2)
    axes[0][0].set_ylabel("asked", fontsize=9, color=GLOBAL)
    axes[1][0].set_ylabel("nearest", fontsize=9, color=INK)
    figure.suptitle("Tiles and the tiles nearest to them, by cosine", x=0.01, ha="left", fontsize=12, color=INK)
    save(figure, path)


def _draw_boxes(axis: Axes, image: Pixels, parameters: Sequence[ViewParameters]) -> None:
    axis.imshow(image)
    height, width = image.shape[:2]
    for index, view in enumerate(parameters):
        top, left, rows, columns = view.box
        color, name = _style(index)
        box = Rectangle((left - 0.5, top - 0.5), columns, rows, fill=False, edgecolor=color, linewidth=1.6)
        box.set_path_effects([patheffects.withStroke(linewidth=2.8, foreground="white")])
        axis.add_patch(box)
        _tag(axis, name, (left, top), color)
    axis.set_title(f"an image of {width} x {height} px and its boxes", loc="left", fontsize=11, color=INK)
    axis.set_axis_off()
    axis.set_anchor("N")


def _draw_views(axis: Axes, globals_: Sequence[Pixels], locals_: Sequence[Pixels]) -> None:
    """Draw the views at one scale: globals in the first row, locals in rows below."""
    global_size = globals_[0].shape[0]
    gap = max(2.0, 0.06 * global_size)
    local_size = locals_[0].shape[0] if locals_ else 0
    top = NUM_GLOBALS * (global_size + gap) - gap

    def extent(columns: int) -> tuple[float, float]:
        rows = math.ceil(len(locals_) / columns)
        return max(top, columns * (local_size + gap) - gap), global_size + rows * (local_size + gap)

    # As many locals in a row as let the whole fill the panel best.
    columns = min(range(1, len(locals_) + 2), key=lambda n: max(extent(n)[0], PANEL_ASPECT * extent(n)[1]))
    places = [(index * (global_size + gap), 0.0) for index in range(len(globals_))]
    places += [
        (index % columns * (local_size + gap), global_size + gap + index // columns * (local_size + gap))
        for index in range(len(locals_))
    ]
    for index, (view, (x, y)) in enumerate(zip([*globals_, *locals_], places, strict=True)):
        size = view.shape[0]
        color, name = _style(index)
        axis.imshow(view, extent=(x, x + size, y + size, y))
        axis.add_patch(Rectangle((x, y), size, size, fill=False, edgecolor=color, linewidth=2))
        _tag(axis, name, (x, y), color)
    width, height = extent(columns)
    margin = 0.01 * width
    axis.set_xlim(-margin, width + margin)
    axis.set_ylim(height + margin, -margin)
    locals_text = f"{len(locals_)} local {local_size} px" if locals_ else "no local views"
    axis.set_title(f"{len(globals_)} global views {global_size} px, {locals_text}", loc="left", fontsize=11, color=INK)
    axis.set_axis_off()
    axis.set_anchor("N")


def _draw_ratio(axis: Axes, config: ViewsConfig, measurement: Measurement) -> None:
    # The ratio falls with the square of the local size, boxes staying as they are.
    constant = measurement.ratio * measurement.local_size**2
    matched, used = measurement.matched_size, measurement.local_size
    largest = max(config.global_size, used)
    sizes = np.linspace(min(0.55 * matched, 0.8 * used), largest, 200)
    axis.plot(sizes, constant / sizes**2, color=INK, linewidth=1.8)
    axis.axhline(1, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    # The curve falls: above it to the right and below it to the left there is room for words.
    axis.plot([matched], [constant / matched**2], "o", color=GREEN, markersize=10, zorder=3)
    below: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 10}
    axis.annotate(f"matched: {matched} px", (matched, constant / matched**2), (-8, -9), color=GREEN, **below)
    axis.plot([used], [measurement.ratio], "D", color=LOCAL, markersize=5.5, zorder=4)
    above: dict[str, Any] = {"textcoords": "offset points", "ha": "left", "va": "bottom", "fontsize": 10}
    axis.annotate(
        f"recipe: {used} px, {measurement.ratio:.2f}", (used, measurement.ratio), (8, 6), color=LOCAL, **above
    )
    axis.set_title("pixel scale of locals over globals, mean", loc="left", fontsize=11, color=INK)
    axis.set_xlabel("local size in px")
    axis.set_ylim(bottom=0)
    clean(axis)


def _draw_loss(axis: Axes, training: Sequence[Mapping[str, float]]) -> None:
    images = [row["images"] for row in training]
    ends = []
    for name, label, color, width in (
        ("global_loss", "global pairs", GLOBAL, 1.3),
        ("local_loss", "local pairs", LOCAL, 1.3),
        ("loss", "loss", INK, 2.0),
    ):
        values = [row[name] for row in training]
        axis.plot(images, values, color=color, linewidth=width)
        ends.append((values[-1], label, color))
    label_ends(axis, ends)
    axis.set_title("training loss", loc="left", fontsize=11, color=INK)
    _count_images(axis)
    clean(axis)


def _draw_quality(axis: Axes, rows: Sequence[Mapping[str, float]], name: str, levels: Mapping[str, float]) -> None:
    values = [row[name] for row in rows]
    axis.plot([row["images"] for row in rows], values, "o-", color=GLOBAL, linewidth=2, markersize=4)
    ends = [(values[-1], f"this run {values[-1]:.2f}", GLOBAL)]
    for index, (baseline, level) in enumerate(levels.items()):
        color = BASELINES[index % len(BASELINES)]
        axis.axhline(level, color=color, linewidth=1.6, linestyle=DASHES[index % len(DASHES)])
        ends.append((level, f"{baseline} {level:.2f}", color))
    axis.set_ylim(0, min(1.0, 1.15 * max(*values, *levels.values(), 0.05)))
    _count_images(axis)
    label_ends(axis, ends)
    clean(axis)


def label_ends(axis: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write each line's name at its right end, far enough from each other to be read."""
    low, high = axis.get_ylim()
    space = 0.055 * (high - low)
    lowest = -np.inf
    for value, label, color in sorted(ends):
        lowest = max(value, lowest + space)
        axis.annotate(
            label,
            (1.0, lowest),
            (4, 0),
            xycoords=axis.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
            annotation_clip=False,
        )


def _style(index: int) -> tuple[str, str]:
    """Color and name of view `index`, globals first."""
    return (GLOBAL, f"G{index + 1}") if index < NUM_GLOBALS else (LOCAL, f"L{index - NUM_GLOBALS + 1}")


def _tag(axis: Axes, name: str, corner: tuple[float, float], color: str) -> None:
    """Write a view's name into the top left corner of its box."""
    frame = {"boxstyle": "round,pad=0.2", "facecolor": color, "edgecolor": "white", "linewidth": 0.6}
    axis.annotate(name, corner, (4, -4), textcoords="offset points", va="top", fontsize=8, color="white", bbox=frame)


def _count_images(axis: Axes) -> None:
    axis.set_xlabel("images seen")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def clean(axis: Axes) -> None:
    """Take away what an axis need not show, and draw the rest in gray."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=9)
    axis.xaxis.label.set_color(INK)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, atomically."""
    write_atomically(path, partial(figure.savefig, format="png", dpi=130))
