"""What a diagnosis comes to: the figures of each swept value, their means, a table, and where the best value lies."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lowssl_core.diagnosis.plan import Kind
from lowssl_core.views import Measurement

# What is shown, with its name in tables; more is better for each.
MEASURES = {"knn": "k-NN", "retrieval": "retrieval", "rankme": "RankMe", "lidar": "LiDAR"}
# What the findings are about: the first of these that was measured, and retrieval.
SHARES = ("knn", "retrieval")
YARDSTICKS = ("untrained", "raw pixels")
VALUE_COLUMN = {"crop-scale": "s0", "pixel-scale": "local size", "alpha": "alpha"}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished training.

    Attributes:
        measures: figures of its student, by name.
        recipe_hash: tells its recipe from others.
        run: its folder, below that of the diagnosis.
        seconds: spent on steps.
    """

    measures: Mapping[str, float]
    recipe_hash: str
    run: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Level:
    """One swept value.

    Attributes:
        value: s0, the local size in pixels, or alpha.
        x: where it stands on the axis; for pixel scales the measured ratio.
        name: the value in a few characters.
        measurement: of its views.
        is_own: whether it is the recipe as the user gave it.
        trained: the finished trainings, by seed.
    """

    value: float
    x: float
    name: str
    measurement: Measurement
    is_own: bool
    trained: Mapping[int, Trained]

    def spread(self, measure: str, seeds: Sequence[int]) -> float:
        """How far apart the seeds lie: the largest less the smallest."""
        values = [self.trained[seed].measures[measure] for seed in seeds]
        return max(values) - min(values)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A diagnosis, finished or on its way.

    Attributes:
        kind: what was swept.
        axis: title of the axis.
        title: what was trained, on what.
        judged: the images it was judged on.
        levels: the swept values in the axis's order, those without any finished training as well.
        marks: places on the axis worth a line, by name.
        yardsticks: measures of what needs no training, by name.
    """

    kind: Kind
    axis: str
    title: str
    judged: str
    levels: Sequence[Level]
    marks: Mapping[str, float]
    yardsticks: Mapping[str, Mapping[str, float]]

    @property
    def shown(self) -> list[Level]:
        """The values that have a finished training."""
        return [level for level in self.levels if level.trained]

    @property
    def seeds(self) -> list[int]:
        """The seeds that all values shown have: means over others would compare one seed with another."""
        if not self.shown:
            return []
        return sorted(set.intersection(*(set(level.trained) for level in self.shown)))

    @property
    def measures(self) -> list[str]:
        """Those of `MEASURES` that were taken."""
        taken = [training.measures for level in self.shown for training in level.trained.values()]
        return [name for name in MEASURES if taken and all(name in measures for measures in taken)]

    def mean(self, level: Level, measure: str) -> float:
        """Mean over `seeds`."""
        return fmean(level.trained[seed].measures[measure] for seed in self.seeds)

    def table(self) -> str:
        """A row for each value, with half the range of its seeds behind each mean, and one for each yardstick."""
        rows = [[VALUE_COLUMN[self.kind], "local size", "ratio", *(MEASURES[name] for name in self.measures), ""]]
        for level in self.levels:
            views = level.measurement
            cells = [self._cell(level, measure) for measure in self.measures]
            note = "the recipe" if level.is_own else ""
            rows.append([level.name, f"{views.local_size} px", f"{views.ratio:.2f}", *cells, note])
        for name, values in self.yardsticks.items():
            rows.append([name, "", "", *(_number(values[measure], measure) for measure in self.measures), ""])
        if self.kind == "pixel-scale":  # the value is the size
            rows = [[row[0], *row[2:]] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                [f"{row[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        ]
        notes = [f"ratio: mean(PS_l / PS_g); mean of seeds {', '.join(map(str, self.seeds))}, +- half their range"]
        if len(self.seeds) == 1:
            notes = [f"ratio: mean(PS_l / PS_g); seed {self.seeds[0]}"]
        return "\n".join([*(line.rstrip() for line in lines), "", *notes])

    def findings(self) -> list[str]:
        """For each share a sentence: where it is highest, and whether that is more than seeds differ by."""
        return [self._finding(measure) for measure in SHARES if measure in self.measures]

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "kind": self.kind,
            "axis": self.axis,
            "marks": dict(self.marks),
            "levels": [
                {
                    "value": level.value,
                    "x": level.x,
                    "is_own": level.is_own,
                    "views": dataclasses.asdict(level.measurement),
                    "mean": {name: self.mean(level, name) for name in self.measures} if level.trained else {},
                    "trained": {str(seed): dataclasses.asdict(each) for seed, each in level.trained.items()},
                }
                for level in self.levels
            ],
            "mean_of_seeds": self.seeds,
            "yardsticks": {name: dict(values) for name, values in self.yardsticks.items()},
            "findings": self.findings(),
        }

    def _cell(self, level: Level, measure: str) -> str:
        if not level.trained:
            return "-"
        text = _number(self.mean(level, measure), measure)
        if len(self.seeds) < 2:
            return text
        return f"{text} +- {_number(level.spread(measure, self.seeds) / 2, measure)}"

    def _finding(self, measure: str) -> str:
        if len(self.shown) < 2:
            return f"{MEASURES[measure]}: only one value is trained so far"
        best, second = sorted(self.shown, key=lambda level: -self.mean(level, measure))[:2]
        own = next((level for level in self.shown if level.is_own), None)
        other = second if own is None or own is best else own
        where = f"{MEASURES[measure]} is highest at {self._place(best)}, {self.mean(best, measure):.3f}"
        difference = self.mean(best, measure) - self.mean(other, measure)
        if own is None:
            against = f"{difference:.3f} above the next, {self._place(other)} (the recipe's own value is not swept)"
        elif own is best:
            where += ", the recipe's own value"
            against = f"{difference:.3f} above the next, {self._place(other)}"
        else:
            against = f"{difference:.3f} above the recipe's own value, {self._place(other)}"
        if len(self.seeds) == 1:
            return f"{where}: {against}; one seed: no spread known"
        spread = max(level.spread(measure, self.seeds) for level in (best, other))
        compared = "more than" if difference > spread else "no more than"
        return f"{where}: {against}, {compared} the {spread:.3f} by which {len(self.seeds)} seeds of one value differ"

    def _place(self, level: Level) -> str:
        ratio = f" (ratio {level.x:.2f})" if self.kind == "pixel-scale" else ""
        return f"{VALUE_COLUMN[self.kind]} {level.name}{ratio}"


def _number(value: float, measure: str) -> str:
    return f"{value:.3f}" if measure in SHARES else f"{value:.1f}"
