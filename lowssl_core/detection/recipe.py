"""Detection recipes: everything that decides a fine-tuned detector, read strictly from TOML."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch.optim import SGD, Optimizer

from lowssl_core.detection.network import NetworkConfig, decay_groups
from lowssl_core.recipe import build_dataclass, plain, read_tree, recipe_names
from lowssl_core.schedules import Progress

PACKAGE = "lowssl_core.detection"


@dataclass(frozen=True, kw_only=True)
class DetectionOptimConfig:
    """SGD and its step schedule.

    Attributes:
        lr: learning rate for the recipe's batch.
        momentum: of SGD.
        weight_decay: of all parameters but those of normalization layers.
        warmup_iterations: length of the linear warm-up, from a thousandth of `lr`.
        steps: the two iterations from which on the learning rate is a tenth of what it was.
    """

    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_iterations: int = 1000
    steps: tuple[int, int] = (60_000, 80_000)

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup_iterations"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a number from 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it is a number from 0 to below 1")
        if not 0 < self.steps[0] <= self.steps[1]:
            raise ValueError(f"steps is {list(self.steps)}; it is two iterations, the earlier first")

    def build(self, detector: Any) -> Optimizer:
        """SGD over the detector's trainable parameters."""
        return SGD(decay_groups(detector, self.weight_decay), lr=0.0, momentum=self.momentum, foreach=True)

    def learning_rate(self, progress: Progress) -> float:
        """Of the step about to be taken."""
        warmed = 1.0
        if progress.step < self.warmup_iterations:
            done = progress.step / self.warmup_iterations
            warmed = 0.001 * (1 - done) + done
        return self.lr * warmed * 0.1 ** sum(progress.step >= step for step in self.steps)


@dataclass(frozen=True, kw_only=True)
class DetectionMonitorConfig:
    """How often a run looks at itself.

    Attributes:
        log_every: iterations between two rows of the loss curve.
        checkpoint_every: iterations between two checkpoints.
        evaluate_every: iterations between two measurements of AP on the way; absent: only at the end.
    """

    log_every: int = 50
    checkpoint_every: int = 1000
    evaluate_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "evaluate_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a whole number from 1")


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe:
    """A whole fine-tuning but for where it happens. The defaults are the paper's: COCO, 1x.

    Attributes:
        iterations: how many batches are seen.
        batch_size: images in a batch, over all ranks.
        seed: of the new layers, the order of images, their mirroring, and the samples of regions.
        max_bad_fraction: which share of the training images may turn out unusable; others take their places.
        network: the detector around the backbone.
        optim: optimizer and schedule.
        monitor: curves and checkpoints.
    """

    iterations: int = 90_000
    batch_size: int = 16
    seed: int = 0
    max_bad_fraction: float = 0.01
    network: NetworkConfig = field(default_factory=NetworkConfig)
    optim: DetectionOptimConfig = field(default_factory=DetectionOptimConfig)
    monitor: DetectionMonitorConfig = field(default_factory=DetectionMonitorConfig)

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a whole number from 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it is a whole number from 0 to {2**32 - 1}")
        if not 0 <= self.max_bad_fraction < 1:
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction}; it is a number from 0 to below 1")

    def as_dict(self) -> dict[str, Any]:
        """The recipe as a tree of plain values, absent ones left out; `detection_recipe_from_dict` reads it back."""
        return cast(dict[str, Any], plain(self))


def detection_recipe_names() -> list[str]:
    """The names of the detection recipes that come with the package."""
    return recipe_names(PACKAGE)


def load_detection_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> DetectionRecipe:
    """Read a recipe: a name of `detection_recipe_names()` or a TOML file, with "key.path=value" overrides.

    Raises:
        UserError: no such recipe, bad TOML, an unknown key, a wrong type, or a value out of range.
    """
    return detection_recipe_from_dict(read_tree(name_or_path, overrides, package=PACKAGE))


def detection_recipe_from_dict(tree: Mapping[str, Any]) -> DetectionRecipe:
    """Build a recipe from a tree of plain values, strictly; UserError with the key's full path."""
    return build_dataclass(DetectionRecipe, tree)
