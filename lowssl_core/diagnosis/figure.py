"""A diagnosis as a PNG: each measure against the swept value, with seeds, marks and yardsticks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from lowssl_core.diagnosis.outcome import SHARES, Level, Outcome
from lowssl_core.figures import DASHES, FAINT, GLOBAL, GREEN, INK, LOCAL, PINK, clean, label_ends, save

TITLES = {
    "knn": "k-NN accuracy, k = 20",
    "retrieval": "retrieval, recall@1",
    "rankme": "RankMe: effective rank of features",
    "lidar": "LiDAR: rank of what tells images apart",
}
MARK_COLORS = {"recipe": LOCAL, "matched": GREEN, "default loss": GREEN}
YARDSTICK_COLORS = {"untrained": PINK, "raw pixels": FAINT}
# Yardsticks further from the curve's middle than so many times its height are named at the edge: they would flatten it.
FAR = 1.7
# The least height that a panel shows, as a share of its highest value: differences that are nothing look like it.
FLATTEST = 0.1


def diagnosis_figure(path: Path, outcome: Outcome) -> None:
    """Draw the finished trainings of `outcome`: shares of 0 to 1 as large panels, ranks as small ones beside them."""
    shares = [name for name in outcome.measures if name in SHARES]
    ranks = [name for name in outcome.measures if name not in SHARES]
    figure = Figure(figsize=(5.0 * len(shares) + 4.4, 5.2), layout="constrained")
    grid = figure.add_gridspec(len(ranks), len(shares) + 1, width_ratios=[1.25] * len(shares) + [1])
    for column, measure in enumerate(shares):
        axis = figure.add_subplot(grid[:, column])
        _draw(axis, outcome, measure, is_small=False)
        axis.set_xlabel(outcome.axis, fontsize=10, loc="left")
    for row, measure in enumerate(ranks):
        axis = figure.add_subplot(grid[row, len(shares)])
        _draw(axis, outcome, measure, is_small=True)
    axis.set_xlabel(outcome.axis.partition(":")[0], fontsize=10, loc="left")
    title = f"{outcome.title}\njudged on {outcome.judged}\n{_seeds_text(outcome)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    save(figure, path)


def _seeds_text(outcome: Outcome) -> str:
    seeds = outcome.seeds
    missing = sum(not level.trained for level in outcome.levels)
    text = (
        f"one seed ({seeds[0]}): no spread known"
        if len(seeds) == 1
        else f"lines: mean of {len(seeds)} seeds, dots: each seed"
    )
    return text + (f"; {missing} of {len(outcome.levels)} values not trained yet" if missing else "")


def _draw(axis: Axes, outcome: Outcome, measure: str, *, is_small: bool) -> None:
    levels = outcome.shown
    means = [outcome.mean(level, measure) for level in levels]
    dots = [(level.x, each.measures[measure]) for level in levels for each in level.trained.values()]
    axis.plot([level.x for level in levels], means, "-", color=GLOBAL, linewidth=2, zorder=3)
    several = len(dots) > len(levels)
    axis.plot(*zip(*dots, strict=True), "o", color=GLOBAL, alpha=0.35 if several else 1, markersize=5, zorder=5)
    for level, mean in zip(levels, means, strict=True):
        if level.is_own:
            axis.plot([level.x], [mean], "D", color=LOCAL, markersize=7 if is_small else 9, zorder=4)
    _scale_x(axis, outcome, is_small=is_small)
    _draw_yardsticks(axis, [value for _, value in dots], _levels_of(outcome, measure), measure)
    _draw_marks(axis, outcome.marks, with_names=not is_small)
    axis.set_title(TITLES[measure], loc="left", fontsize=10 if is_small else 11, color=INK, pad=8 if is_small else 22)
    clean(axis)


def _levels_of(outcome: Outcome, measure: str) -> dict[str, float]:
    """The yardsticks of a measure; ranks of features of another width, as pixels have, cannot be compared."""
    names = [name for name in outcome.yardsticks if measure in SHARES or name != "raw pixels"]
    return {name: outcome.yardsticks[name][measure] for name in names}


def _scale_x(axis: Axes, outcome: Outcome, *, is_small: bool) -> None:
    places = [*(level.x for level in outcome.levels), *outcome.marks.values()]
    if outcome.kind == "pixel-scale":
        axis.set_xscale("log")
        margin = (max(places) / min(places)) ** 0.06
        axis.set_xlim(min(places) / margin, max(places) * margin)
    else:
        margin = 0.06 * (max(places) - min(places)) or 0.1
        axis.set_xlim(min(places) - margin, max(places) + margin)
    ticks = _apart(axis, outcome.levels, 0.15 if is_small else 0.11)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    with_sizes = outcome.kind == "pixel-scale" and not is_small
    names = [f"{level.x:.2f}" if outcome.kind == "pixel-scale" else level.name for level in ticks]
    if with_sizes:
        names = [f"{name}\n{level.name}" for name, level in zip(names, ticks, strict=True)]
    axis.set_xticks([level.x for level in ticks], names)


def _apart(axis: Axes, levels: Sequence[Level], share: float) -> list[Level]:
    """The recipe's own value, and of the others those whose names have room: `share` of the axis between two."""
    to_axis = axis.transData + axis.transAxes.inverted()
    kept: dict[float, Level] = {}
    for level in sorted(levels, key=lambda level: not level.is_own):
        place = float(to_axis.transform((level.x, 0))[0])
        if all(abs(place - other) >= share for other in kept):
            kept[place] = level
    return list(kept.values())


def _draw_yardsticks(axis: Axes, values: Sequence[float], levels: Mapping[str, float], measure: str) -> None:
    low, high = min(values), max(values)
    height = max(high - low, FLATTEST * high) or FLATTEST
    middle = (low + high) / 2
    near = [level for level in levels.values() if abs(level - middle) <= FAR * height]
    bottom, top = min([middle - height / 2, *near]), max([middle + height / 2, *near])
    margin = 0.1 * (top - bottom)
    axis.set_ylim(max(0, bottom - margin), top + margin)
    axis.yaxis.set_major_locator(MaxNLocator(6))
    ends = []
    for index, (name, level) in enumerate(levels.items()):
        color = YARDSTICK_COLORS[name]
        text = f"{name} {level:.2f}" if measure in SHARES else f"{name} {level:.0f}"
        bottom, top = axis.get_ylim()
        if bottom <= level <= top:
            axis.axhline(level, color=color, linewidth=1.5, linestyle=DASHES[index], zorder=1)
        else:
            text += " \u2193" if level < bottom else " \u2191"
        ends.append((float(np.clip(level, bottom, top)), text, color))
    label_ends(axis, ends)


def _draw_marks(axis: Axes, marks: Mapping[str, float], *, with_names: bool) -> None:
    """Draw lines across the panel: two that fall on one as one, and the names of two that are close side by side."""
    to_axis = axis.transData + axis.transAxes.inverted()
    places = {name: float(to_axis.transform((x, 0))[0]) for name, x in marks.items()}
    gap = max(places.values()) - min(places.values()) if places else 0.0
    if len(marks) == 2 and gap < 0.02:
        marks = {" = ".join(marks): marks["recipe"]}
    alignments = ("right", "left") if len(marks) == 2 and gap < 0.3 else ("center", "center")
    for (name, x), alignment in zip(sorted(marks.items(), key=lambda mark: mark[1]), alignments, strict=False):
        color = MARK_COLORS.get(name, LOCAL)
        axis.axvline(x, color=color, linewidth=1.2, linestyle=(0, (2, 2)), zorder=1)
        if with_names:
            place: dict[str, Any] = {
                "xycoords": axis.get_xaxis_transform(),
                "textcoords": "offset points",
                "annotation_clip": False,
            }
            axis.annotate(name, (x, 1.0), (0, 4), ha=alignment, va="bottom", fontsize=9, color=color, **place)
