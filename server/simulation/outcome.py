"""What an experiment came to: each model's accuracy and transfer over the stream, traffic and compute, as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.simulation.stream import Stream, part_ends
from server.simulation.transfer import average_accuracy, backward_transfer, forgetting, forward_transfer

Rows = Sequence[Mapping[str, Any]]
Accuracies = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """How good one model is, or the mean of several: k-NN accuracies from 0 to 1, and their differences.

    Attributes:
        accuracy: on all classes, after the last round.
        own_classes: on each device's classes in their shares, after the last round; mean over devices.
        average_accuracy: see `transfer.average_accuracy`; as the next ones of each device's parts, mean over devices.
        forgetting: see `transfer.forgetting`; None with one part, as the next two.
        backward_transfer: see `transfer.backward_transfer`.
        forward_transfer: see `transfer.forward_transfer`.
    """

    accuracy: float
    own_classes: float
    average_accuracy: float
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None


@dataclass(frozen=True, kw_only=True)
class CourseFigures:
    """What a finished course came to.

    Attributes:
        shared: the one model for all; None where there is none.
        own: mean of the devices' own models; None where there are none.
        bytes_down: of all tasks to devices.
        bytes_up: of all their updates.
        steps: optimizer steps of all devices.
        views: that were trained on, steps x batch x views of each image.
        seconds: of training and aggregating, without judging.
        rejected: replies that screening refused.
    """

    shared: ModelFigures | None
    own: ModelFigures | None
    bytes_down: int
    bytes_up: int
    steps: int
    views: int
    seconds: float
    rejected: int

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def course_figures(rows: Rows, streams: Mapping[str, Stream], shares: Accuracies, rounds: int) -> CourseFigures:
    """Sum up a finished course.

    Args:
        rows: its journal, from round 0 (the start) to the last.
        streams: the devices'.
        shares: (classes,) of the judged images.
        rounds: how many.
    """
    parts = len(next(iter(streams.values())).parts)
    at = [rows[0], *(rows[end] for end in part_ends(rounds, parts))]
    has_shared, has_own = (at[-1][kind] is not None for kind in ("shared", "own"))
    shared = {name: [np.array(row["shared"]) for row in at] for name in streams} if has_shared else None
    start = np.array(rows[0]["start"])
    own = {name: [start, *(np.array(row["own"][name]) for row in at[1:])] for name in streams} if has_own else None
    return CourseFigures(
        shared=None if shared is None else _mean(shared, streams, shares),
        own=None if own is None else _mean(own, streams, shares),
        rejected=sum(len(row.get("rejected", ())) for row in rows),
        **{key: sum(row[key] for row in rows[1:]) for key in ("bytes_down", "bytes_up", "steps", "views", "seconds")},
    )


def _mean(
    judged: Mapping[str, Sequence[Accuracies]], streams: Mapping[str, Stream], shares: Accuracies
) -> ModelFigures:
    """Mean over devices of what their models, judged at the start and after each part, came to."""
    each = [_figures(accuracies, streams[name], shares) for name, accuracies in judged.items()]
    means: dict[str, Any] = {}
    for key in ModelFigures.__dataclass_fields__:
        values = [value for figures in each if (value := getattr(figures, key)) is not None]
        means[key] = fmean(values) if values else None
    return ModelFigures(**means)


def _figures(judged: Sequence[Accuracies], stream: Stream, shares: Accuracies) -> ModelFigures:
    """One model's figures.

    Args:
        judged: (classes,) accuracies at the start, then after each part.
        stream: the device's, whose parts they are judged on.
        shares: (classes,) of the judged images.
    """
    start, *after = judged
    matrix = np.stack(after) @ stream.shares.T
    return ModelFigures(
        accuracy=float(after[-1] @ shares),
        own_classes=float(after[-1] @ stream.own_shares),
        average_accuracy=average_accuracy(matrix),
        forgetting=forgetting(matrix),
        backward_transfer=backward_transfer(matrix),
        forward_transfer=forward_transfer(matrix, stream.shares @ start),
    )


MEASURES = {
    "accuracy": "k-NN",
    "own_classes": "own classes",
    "average_accuracy": "ACC",
    "forgetting": "forgetting",
    "backward_transfer": "BWT",
    "forward_transfer": "FWT",
}
NAMES = {
    ("federated", "shared"): "federated: global model",
    ("federated", "own"): "federated: devices' own",
    ("alone", "own"): "devices alone",
    ("pooled", "shared"): "pooled",
}


def table(figures: Mapping[str, CourseFigures]) -> str:
    """Finished courses by name as text: accuracies in percent, differences in points, then traffic and compute."""
    rows = [["", *MEASURES.values()]]
    for (course, kind), title in NAMES.items():
        if course in figures and (model := getattr(figures[course], kind)) is not None:
            rows.append([title, *(_percent(getattr(model, key), key) for key in MEASURES)])
    costs = [["", "down", "up", "steps", "views", "seconds", "refused"]]
    for course, each in figures.items():
        traffic = [f"{count / 1e6:,.1f} MB" for count in (each.bytes_down, each.bytes_up)]
        counts = [f"{each.steps:,}", f"{each.views:,}", f"{each.seconds:,.0f}", str(each.rejected)]
        costs.append([course, *traffic, *counts])
    return "\n".join([*_aligned(rows), "", *_aligned(costs)])


def _percent(value: float | None, key: str) -> str:
    if value is None:
        return "-"
    is_difference = key in ("forgetting", "backward_transfer", "forward_transfer")
    return f"{100 * value:{'+' if is_difference else ''}.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
