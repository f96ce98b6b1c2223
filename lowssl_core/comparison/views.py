"""The views of runs side by side, drawn from their recipes alone or on an image: scales, boxes, sizes in proportion."""

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from numpy.typing import NDArray

from lowssl_core.comparison.charts import PAPER, RULE, Chart, clean, new_figure, to_chart
from lowssl_core.comparison.run_folder import ComparedRun
from lowssl_core.comparison.runs import Comparison
from lowssl_core.figures import FAINT, GLOBAL, LOCAL
from lowssl_core.preview import preview
from lowssl_core.sources import Source
from lowssl_core.views import NUM_GLOBALS, ViewsConfig, sample_boxes, sample_parameters

SAMPLED_BOXES = 20_000
# Lines across an image that show how its views stretch it.
GRID = 8
WHOLE = (0.005, 0.005, 0.995, 0.995)


def views_groups(comparison: Comparison, *, with_colors: bool = False) -> list[list[ComparedRun]]:
    """The runs whose views are known, those with the same boxes and sizes (and color changes) together."""
    groups: dict[object, list[ComparedRun]] = {}
    for run in comparison.runs:
        if run.recipe and run.views:
            views = run.recipe.views
            local = (views.num_locals, run.views.local_size, views.local_scale) if views.num_locals else None
            colors = views.photometric if with_colors else None
            key = views.global_size, views.global_scale, local, image_side(run), colors
            groups.setdefault(key, []).append(run)
    return list(groups.values())


def image_side(run: ComparedRun) -> int:
    """Side in pixels of a square as large as the images that a run measured: their shapes it does not record."""
    assert run.recipe is not None
    assert run.views is not None
    # A ratio of means in place of a mean of ratios: exact where images are of one size.
    return round(run.recipe.views.global_size * math.sqrt(run.views.global_pixel_scale / run.views.global_crop_scale))


def scale_chart(groups: Sequence[Sequence[ComparedRun]]) -> Chart:
    """The pixel scales of sampled global and local views, a row for each group of runs with the same views."""
    figure, axis = new_figure((6.0, 0.8 + 0.6 * len(groups)))
    told = []
    for place, group in enumerate(groups):
        name = ", ".join(run.key for run in group)
        for offset, color, label, scales in _pixel_scales(group[0]):
            low, first, third, high = np.percentile(scales, (5, 25, 75, 95))
            y = place + offset
            axis.plot([low, high], [y, y], color=color, linewidth=1.4, solid_capstyle="butt")
            axis.plot([first, third], [y, y], color=color, linewidth=6, solid_capstyle="butt")
            axis.plot([scales.mean()], [y], "o", color=PAPER, markeredgecolor=color, markersize=5.5, zorder=3)
            axis.annotate(label, (high, y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=color)
            told.append(f"{name} {label}: mean {scales.mean():.2f}, 90 % within {low:.2f} to {high:.2f}")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_major_locator(FixedLocator([step * 10.0**power for power in range(-3, 6) for step in (1, 2, 5)]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_yticks(range(len(groups)), [", ".join(run.key for run in group) for group in groups], weight="bold")
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.set_xlabel("source pixels per pixel of the view")
    axis.margins(x=0.08)
    clean(axis, "x")
    return to_chart(figure, "Pixel scales", "; ".join(told))


def geometry_charts(run: ComparedRun, seed: int = 0) -> list[Chart]:
    """An image of the data's mean area with the boxes of one draw of views, and these views at true relative size."""
    assert run.recipe is not None
    assert run.views is not None
    config, side, local_size = run.recipe.views, image_side(run), run.views.local_size
    views = sample_parameters(config, local_size, side, side, np.random.default_rng(seed))
    figure, axis = new_figure((3.4, 3.4), WHOLE)
    _draw_grid(axis, (0, 0, side, side), side, (0, 0), side)
    for index, view in enumerate(views):
        top, left, height, width = view.box
        _outline(axis, index, (left, top), width, height)
    _frame(axis, side, side)
    boxes = to_chart(
        figure, f"Boxes in an image of {side} x {side} px", f"{run.key}: an image with the boxes of {len(views)} views"
    )
    corners, extent = _places(config, local_size)
    # Always as wide as the globals: pages then show a pixel of any run at one size, where globals are of one size.
    figure, axis = new_figure((3.4, 3.4 * extent[1] / extent[0]), WHOLE)
    for index, (view, corner) in enumerate(zip(views, corners, strict=True)):
        _draw_grid(axis, view.box, side, corner, view.size)
        _outline(axis, index, corner, view.size, view.size)
    _frame(axis, *extent)
    locals_ = f"{config.num_locals} local {local_size} px" if config.num_locals else "no local views"
    title = f"{NUM_GLOBALS} global {config.global_size} px, {locals_}"
    return [boxes, to_chart(figure, title, f"{run.key}: the views at true relative size, {title}")]


def picture(run: ComparedRun, source: Source) -> bytes:
    """A PNG of the run's views of one image of `source` (`views_figure`), at the local size that the run has.

    Raises:
        UserError: no readable image.
    """
    assert run.recipe is not None
    assert run.views is not None
    views = dataclasses.replace(run.recipe.views, local_size=run.views.local_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "views.png"
        preview(path, dataclasses.replace(run.recipe, views=views), source)
        return path.read_bytes()


def _pixel_scales(run: ComparedRun) -> list[tuple[float, str, str, NDArray[np.float64]]]:
    """Place in its row, color, name and sampled pixel scales of a run's global and local views."""
    assert run.recipe is not None
    assert run.views is not None
    config, rng = run.recipe.views, np.random.default_rng(0)
    sizes = np.full((SAMPLED_BOXES, 2), image_side(run))
    kinds = [(-0.17, GLOBAL, "global", config.global_scale, config.global_size)]
    if config.num_locals:
        kinds.append((0.17, LOCAL, "local", config.local_scale, run.views.local_size))
    return [
        (offset, color, label, sample_boxes(sizes, scale, rng)[:, 2:].prod(1) / size**2)
        for offset, color, label, scale, size in kinds
    ]


def _places(config: ViewsConfig, local_size: int) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """The views' top left corners, globals in a row and locals in rows below, and width and height of it all."""
    size, gap = config.global_size, 0.07 * config.global_size
    width = NUM_GLOBALS * (size + gap) - gap
    columns = max(1, int((width + gap) // (local_size + gap)))
    rows = math.ceil(config.num_locals / columns)
    corners = [(index * (size + gap), 0.0) for index in range(NUM_GLOBALS)]
    corners += [
        (index % columns * (local_size + gap), size + gap + index // columns * (local_size + gap))
        for index in range(config.num_locals)
    ]
    return corners, (max(width, local_size), size + rows * (local_size + gap))


def _draw_grid(axis: Axes, box: tuple[int, int, int, int], side: int, corner: tuple[float, float], size: float) -> None:
    """The lines of an image's grid that cross `box`, as a view of `size` at `corner` shows them."""
    top, left, height, width = box
    x, y = corner
    axis.add_patch(Rectangle(corner, size, size, facecolor=RULE, alpha=0.35, edgecolor="none"))
    lines = np.arange(1, GRID) * side / GRID
    for at in (lines[(lines > left) & (lines < left + width)] - left) / width * size:
        axis.plot([x + at, x + at], [y, y + size], color=FAINT, linewidth=0.7, alpha=0.6)
    for at in (lines[(lines > top) & (lines < top + height)] - top) / height * size:
        axis.plot([x, x + size], [y + at, y + at], color=FAINT, linewidth=0.7, alpha=0.6)


def _outline(axis: Axes, index: int, corner: tuple[float, float], width: float, height: float) -> None:
    """A view's rectangle and name: globals' at the top left, locals' at the bottom right, out of each other's way."""
    color, name = (GLOBAL, f"G{index + 1}") if index < NUM_GLOBALS else (LOCAL, f"L{index - NUM_GLOBALS + 1}")
    axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=color, linewidth=1.8))
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "weight": "bold", "color": color}
    style["bbox"] = {"boxstyle": "square,pad=0.1", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.8}
    if index < NUM_GLOBALS:
        axis.annotate(name, corner, (3.5, -3.5), va="top", **style)
    else:
        axis.annotate(name, (corner[0] + width, corner[1] + height), (-3.5, 3.5), ha="right", **style)


def _frame(axis: Axes, width: float, height: float) -> None:
    margin = 0.012 * max(width, height)
    axis.set_xlim(-margin, width + margin)
    axis.set_ylim(height + margin, -margin)
    axis.set_aspect("equal")
    axis.set_anchor("N")
    axis.set_axis_off()
