"""Drift without labels: how many new images are far from the memory, and when that stops being chance."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class DriftConfig:
    """When new images count as far, and when many of them count as drift.

    Attributes:
        window: how many of the last distances are remembered.
        percentile: of those, in percent; an image farther from the memory is far.
        fewest: distances that must be remembered before anything is said.
        tolerance: Page-Hinkley's delta, how much more than the mean is taken as nothing.
        threshold: Page-Hinkley's lambda, the sum of excesses that raises an alarm. Of lots of 20 new images chance
            alone raises one about every 700 times, of 50 images every 20,000 times; a share of .3 in place of .05 is
            told from it after two lots.
    """

    window: int = 1000
    percentile: float = 95.0
    fewest: int = 100
    tolerance: float = 0.02
    threshold: float = 0.3

    def __post_init__(self) -> None:
        if not 1 <= self.fewest <= self.window:
            raise ValueError(f"fewest is {self.fewest}; it is a whole number from 1 to window, {self.window}")
        if not 0 < self.percentile < 100:
            raise ValueError(f"percentile is {self.percentile}; it is a number between 0 and 100")
        for name in ("tolerance", "threshold"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a number from 0")


@dataclass(frozen=True, kw_only=True)
class DriftReading:
    """What one lot of new images showed.

    Attributes:
        share: of the images that are far; None as long as too few distances are known, or without new images.
        limit: the distance beyond which they are; None likewise.
        alarm: whether the shares have risen by more than chance.
    """

    share: float | None = None
    limit: float | None = None
    alarm: bool = False


class PageHinkley:
    """The Page-Hinkley test for a rise of a mean (Page 1954; Gama et al. 2014, "A survey on concept drift adaptation").

    m_T = sum over t <= T of (x_t - mean(x_1 .. x_t) - delta); an alarm where m_T - min m > lambda, after which it
    starts anew.

    Args:
        tolerance: delta.
        threshold: lambda.
        state: what `state` gave, to go on from.
    """

    def __init__(self, tolerance: float, threshold: float, state: Mapping[str, float] | None = None) -> None:
        self._tolerance, self._threshold = tolerance, threshold
        self.state: dict[str, float] = {"count": 0, "mean": 0.0, "sum": 0.0, "lowest": 0.0, **(state or {})}

    def update(self, value: float) -> bool:
        """Take in the next value; returns whether it raises an alarm."""
        state = self.state
        state["count"] += 1
        state["mean"] += (value - state["mean"]) / state["count"]
        state["sum"] += value - state["mean"] - self._tolerance
        state["lowest"] = min(state["lowest"], state["sum"])
        alarm = state["sum"] - state["lowest"] > self._threshold
        if alarm:
            state.update(count=0, mean=0.0, sum=0.0, lowest=0.0)
        return alarm


class Drift:
    """How the new images of a device stand to its memory, over time.

    Args:
        config: when images are far and shares are drift.
        state: what `state` gave, to go on from.
    """

    def __init__(self, config: DriftConfig | None = None, state: Mapping[str, Any] | None = None) -> None:
        self.config = config or DriftConfig()
        known = state or {"distances": [], "test": {}}
        self._distances = np.array(known["distances"], dtype=np.float32)
        self._test = PageHinkley(self.config.tolerance, self.config.threshold, known["test"])

    def state(self) -> dict[str, Any]:
        """All that it knows, as JSON."""
        return {"distances": self._distances.tolist(), "test": dict(self._test.state)}

    def update(self, distances: NDArray[np.float32]) -> DriftReading:
        """Take in the distances (N,) of new images from their nearest memories, 1 - cosine."""
        reading = self._read(distances) if len(distances) else DriftReading()
        self._distances = np.concatenate([self._distances, distances.astype(np.float32)])[-self.config.window :]
        return reading

    def _read(self, distances: NDArray[np.float32]) -> DriftReading:
        if len(self._distances) < self.config.fewest:
            return DriftReading()
        limit = float(np.percentile(self._distances, self.config.percentile))
        share = float((distances > limit).mean())
        return DriftReading(share=share, limit=limit, alarm=self._test.update(share))
