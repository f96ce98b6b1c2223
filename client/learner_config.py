"""What a device adds to a recipe: how much a round trains, what is remembered, and how global models are taken in."""

from dataclasses import dataclass, field

from client.continual import ContinualConfig
from client.drift import DriftConfig
from client.memory import MemoryConfig
from client.rounds import Budget


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How a device learns.

    Attributes:
        budget: how much a round trains, and on what.
        memory: the replay memory.
        continual: what is added to the recipe's method.
        drift: when new images are called different.
        tau: FedEMA's: the share of its own weights that a device keeps at its first blend with a global model; 0 takes
            models as they are.
        steps_per_epoch: what the recipe's epochs (warm-up, frozen last layer, teacher temperature) mean here.
        save_every_steps: how much a power cut may cost.
        refresh_images: how many features of the memory a round takes anew at most.
    """

    budget: Budget = field(default_factory=Budget)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    continual: ContinualConfig = field(default_factory=ContinualConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    tau: float = 0.0
    steps_per_epoch: int = 100
    save_every_steps: int = 50
    refresh_images: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps_per_epoch", "save_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a whole number from 1")
        if self.refresh_images < 0:
            raise ValueError(f"refresh_images is {self.refresh_images}; it is a whole number from 0")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau is {self.tau}; it is a number from 0 to 1")
