"""The demonstration as a PNG: what the cameras see, beside the accuracy of each model after each round."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lowssl_core.figures import DASHES, FAINT, GLOBAL, INK, LOCAL, clean, label_ends, save
from server.demonstration.outcome import Figures
from server.demonstration.scenes import CAMERAS, Scenes

_TILES = 3


def draw(path: Path, figures: Figures, scenes: Scenes) -> None:
    """Draw what the cameras see before and after they are turned, and the curves."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    halves = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.25))[0]
    _draw_scenes(halves[0], scenes)
    _draw_curves(halves[1].subplots(), figures)
    save(figure, path)


def _draw_scenes(figure: SubFigure, scenes: Scenes) -> None:
    """A row for each camera: some tiles before it is turned, and some after."""
    axes = figure.subplots(len(CAMERAS), 2 * _TILES, squeeze=False)
    for row, camera in zip(axes, CAMERAS, strict=True):
        for part, places in enumerate(camera.places):
            shown = row[part * _TILES : (part + 1) * _TILES]
            for axis, index in zip(shown, scenes.streams[camera.name].parts[part], strict=False):
                axis.imshow(scenes.seen.read(int(index)))
            for axis in shown:
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set(color=FAINT, linewidth=0.6)
            shown[0].set_title(", ".join(places), loc="left", fontsize=10, color=INK)
        row[0].set_ylabel(camera.name, fontsize=10, color=INK)
    figure.suptitle("what each camera sees, before and after it is turned", x=0.01, ha="left", fontsize=11, color=INK)


def _draw_curves(axis: Axes, figures: Figures) -> None:
    rounds = range(len(figures.shared) + 1)
    for values in figures.alone.values():
        axis.plot(rounds, [figures.start, *values], color=LOCAL, linewidth=0.9, alpha=0.35)
    ends = [(figures.start, f"start {100 * figures.start:.1f} %", FAINT)]
    axis.axhline(figures.start, color=FAINT, linewidth=1.4, linestyle=DASHES[1])
    for name, values, color in (
        ("global model", figures.shared, GLOBAL),
        ("devices alone, mean", figures.mean_alone, LOCAL),
        ("all images in one place", figures.pooled, INK),
    ):
        axis.plot(rounds, [figures.start, *values], "o-", color=color, linewidth=2, markersize=4)
        ends.append((values[-1], f"{name} {100 * values[-1]:.1f} %", color))
    axis.axvline(figures.half, color=FAINT, linewidth=1, linestyle=DASHES[0], zorder=0)
    axis.annotate(
        "the cameras are turned",
        (figures.half, 1),
        (4, -2),
        xycoords=axis.get_xaxis_transform(),
        textcoords="offset points",
        va="top",
        fontsize=9,
        color=FAINT,
    )
    axis.set_title("k-NN accuracy, all places, dirty lenses", loc="left", fontsize=11, color=INK)
    axis.set_xlabel("round")
    axis.set_xlim(0, len(figures.shared))
    axis.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))  # whole percent
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axis.margins(y=0.12)
    label_ends(axis, ends)
    clean(axis)
