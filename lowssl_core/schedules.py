"""The one clock of a training run, and the schedules that are pure functions of it."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: `step` optimizer steps are done, of `total_steps`, `steps_per_epoch` to an epoch.

    Raises:
        ValueError: a count is out of range.
    """

    step: int
    total_steps: int
    steps_per_epoch: int

    def __post_init__(self) -> None:
        if not (0 <= self.step <= self.total_steps and self.steps_per_epoch >= 1):
            raise ValueError(
                f"progress at step {self.step} of {self.total_steps} with {self.steps_per_epoch} steps an epoch: "
                "wanted 0 <= step <= total_steps and steps_per_epoch >= 1"
            )

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch

    @property
    def is_done(self) -> bool:
        """Whether no step is left."""
        return self.step == self.total_steps

    def advanced(self) -> "Progress":
        """The clock one step later."""
        return Progress(step=self.step + 1, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch)


def cosine(
    step: int,
    total_steps: int,
    start: float,
    end: float,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
) -> float:
    """Value at `step`: linear from `warmup_start` to `start` over `warmup_steps`, then half a cosine to `end`.

    Step 0 has `warmup_start` (or `start` without a warm-up); `end` is approached as step nears `total_steps`
    and kept from there on. All schedules of the paper's recipes are per step (section 5, implementation details).
    """
    if step < warmup_steps:
        return warmup_start + (start - warmup_start) * step / warmup_steps
    if step >= total_steps:
        return end
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def epoch_ramp(epoch: int, start: float, end: float, epochs: int) -> float:
    """Value in `epoch`: `epochs` equal steps from `start` (epoch 0) to `end` (epoch `epochs` - 1), constant afterwards.

    DINO's teacher temperature warms up so: once per epoch, not per step. `epochs` of 0 or 1 gives `end` at once.
    """
    if epoch >= epochs - 1:
        return end
    return start + (end - start) * epoch / (epochs - 1)
