"""A simulation as a PNG: accuracy after each round, on all classes and on those that each device has met so far."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lowssl_core.figures import DASHES, FAINT, GLOBAL, GREEN, INK, LOCAL, clean, label_ends, save
from server.simulation.outcome import NAMES, Accuracies, Rows
from server.simulation.stream import Stream, part_ends, place_of

_COLORS = {
    ("federated", "shared"): GLOBAL,
    ("federated", "own"): GREEN,
    ("alone", "own"): LOCAL,
    ("pooled", "shared"): INK,
}


@dataclass(frozen=True)
class Curve:
    """Accuracies of one model, or the mean of several, after some rounds.

    Attributes:
        rounds: after which it was judged.
        on_all: of all classes.
        on_met: of the classes that each device had met by then, mean over devices; one less, without the start.
    """

    rounds: list[int]
    on_all: list[float]
    on_met: list[float]


@dataclass(frozen=True)
class Curves:
    """What is drawn: curves by course and kind, the untrained network's accuracy, all rounds and the parts' ends."""

    curves: Mapping[tuple[str, str], Curve]
    untrained: float
    rounds: int
    ends: list[int]


def curves_of(journals: Mapping[str, Rows], streams: Mapping[str, Stream], shares: Accuracies, rounds: int) -> Curves:
    """What to draw of courses, finished or not; at least one has begun."""
    parts = len(next(iter(streams.values())).parts)
    curves: dict[tuple[str, str], Curve] = {}
    for course, kind in NAMES:
        judged = [row for row in journals.get(course, ())[1:] if row[kind] is not None]
        if judged:
            models = [
                {name: np.array(row[kind] if kind == "shared" else row[kind][name]) for name in streams}
                for row in judged
            ]
            met = [_met(streams, row["round"], rounds, parts) for row in judged]
            start = float(np.array(next(iter(journals.values()))[0]["start"]) @ shares)
            curves[course, kind] = Curve(
                rounds=[0, *(row["round"] for row in judged)],
                on_all=[start, *(float(np.mean([each @ shares for each in model.values()])) for model in models)],
                on_met=[
                    float(np.mean([model[name] @ weights[name] for name in streams]))
                    for model, weights in zip(models, met, strict=True)
                ],
            )
    untrained = float(np.array(next(iter(journals.values()))[0]["start"]) @ shares)
    return Curves(curves, untrained, rounds, part_ends(rounds, parts))


def _met(streams: Mapping[str, Stream], number: int, rounds: int, parts: int) -> dict[str, Accuracies]:
    """For each device (classes,) the shares of the classes in the parts up to that of a round, each part alike."""
    part, _, _ = place_of(number, rounds, parts)
    return {name: stream.shares[: part + 1].mean(axis=0) for name, stream in streams.items()}


def simulation_figure(path: Path, curves: Curves) -> None:
    """Draw accuracy over rounds, on all classes beside those met so far."""
    figure = Figure(figsize=(12.5, 4.8), layout="constrained")
    on_all, on_met = figure.subplots(1, 2, sharey=True)
    lowest = curves.untrained
    for axis, title, field in (
        (on_all, "k-NN accuracy, all classes", "on_all"),
        (on_met, "k-NN accuracy, classes that each device has met so far", "on_met"),
    ):
        ends = []
        for key, curve in curves.curves.items():
            values = getattr(curve, field)
            places = curve.rounds[-len(values) :]
            marker = "o" if key[1] == "own" else ""
            axis.plot(places, values, color=_COLORS[key], linewidth=2, marker=marker, markersize=4.5)
            ends.append((values[-1], f"{NAMES[key]} {100 * values[-1]:.1f} %", _COLORS[key]))
            lowest = min(lowest, *values)
        if field == "on_all":
            axis.axhline(curves.untrained, color=FAINT, linewidth=1.4, linestyle=DASHES[1])
            ends.append((curves.untrained, f"untrained {100 * curves.untrained:.1f} %", FAINT))
        _finish(axis, curves, title)
        axis.margins(y=0.08)
        label_ends(axis, ends)
    save(figure, path)


def _finish(axis: Axes, curves: Curves, title: str) -> None:
    for end in curves.ends[:-1]:
        axis.axvline(end, color="#DDDDDD", linewidth=1, zorder=0)
    axis.set_title(title, loc="left", fontsize=11, color=INK)
    axis.set_xlabel("round" if len(curves.ends) == 1 else "round; lines: the next part of each device's stream begins")
    axis.set_xlim(0, curves.rounds)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    clean(axis)
