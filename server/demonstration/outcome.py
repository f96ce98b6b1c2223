"""What the demonstration came to: accuracies after each round, as a file, a table and words that follow them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from lowssl_core.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Figures:
    """K-NN accuracies on all places, through dirty lenses, 0 to 1.

    Attributes:
        start: of the model that all began with.
        shared: of the global model after each round.
        alone: by device, of its model after each round without the others.
        pooled: of a model that got all images, after each round.
        asked: how many held-out images they are shares of.
        half: the last round before the cameras were turned.
    """

    start: float
    shared: Sequence[float]
    alone: Mapping[str, Sequence[float]]
    pooled: Sequence[float]
    asked: int
    half: int

    @property
    def mean_alone(self) -> list[float]:
        """Mean over devices alone, after each round."""
        return [fmean(each) for each in zip(*self.alone.values(), strict=True)]

    @property
    def error(self) -> float:
        """Standard error of the last global accuracy: smaller differences are chance."""
        last = self.shared[-1]
        return math.sqrt(last * (1 - last) / self.asked)

    def table(self) -> str:
        """Accuracies at the start, before the cameras were turned, and at the end, in percent."""
        rows = {"global model": self.shared, "devices alone, mean": self.mean_alone}
        rows |= {f"  {name}": values for name, values in self.alone.items()}
        rows["all images in one place"] = self.pooled
        lines = [f"{'':<26}{'start':>7}{f'round {self.half}':>10}{f'round {len(self.shared)}':>10}"]
        for name, values in rows.items():
            cells = (self.start, values[self.half - 1], values[-1])
            lines.append(f"{name:<26}{100 * cells[0]:>7.1f}{100 * cells[1]:>10.1f}{100 * cells[2]:>10.1f}")
        return "\n".join(lines)

    def sentence(self) -> str:
        """What the federation reached, in words that follow the figures."""
        last, alone = self.shared[-1], self.mean_alone[-1]
        return (
            f"Through dirty lenses the global model names the photograph of {_of_100(last)} tiles, "
            f"{self._compared(self.start)} the start ({_of_100(self.start)}), "
            f"{self._compared(alone)} a device alone ({_of_100(alone)}) "
            f"and {self._compared(self.pooled[-1])} training on all images in one place "
            f"({_of_100(self.pooled[-1])}); below {100 * self.error:.1f} points it is chance."
        )

    def write(self, path: Path, **more: object) -> None:
        """Write them, the sentence and whatever else is given as JSON."""
        document = {**asdict(self), "sentence": self.sentence(), **more}
        write_atomically(path, lambda file: file.write(json.dumps(document, indent=1).encode()))

    def _compared(self, other: float) -> str:
        difference = self.shared[-1] - other
        if abs(difference) < self.error:
            return "level with"
        return "more than" if difference > 0 else "fewer than"


def _of_100(share: float) -> str:
    return f"{100 * share:.0f} of 100"
