"""What training with labels needs to know, whatever is trained."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import nn
from torch.optim import Optimizer

from lowssl_core.optim import LARS, parameter_groups


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What training with labels needs to know; `LinearConfig` and `SemiConfig` have the paper's values.

    Attributes:
        optimizer: "lars" or "sgd".
        nesterov: whether SGD looks ahead.
        momentum: of either; there is no weight decay.
        base_lr: learning rate for a batch of 256; scaled linearly with the batch.
        final_lr: where the cosine ends; not scaled. The rate is constant within an epoch.
        batch_size: in images; lowered to all of them where there are fewer.
        epochs: how often every image is seen; an epoch's last partial batch is left out.
        crop_scale: bounds of a crop's area as a share of the image's.
        test_every_epochs: how often the test images are looked at; the end always.
        seed: of new weights, the order of images and their crops.
    """

    optimizer: Literal["lars", "sgd"]
    nesterov: bool = False
    momentum: float = 0.9
    base_lr: float
    final_lr: float = 1e-6
    batch_size: int
    epochs: int
    crop_scale: tuple[float, float] = (0.08, 1.0)
    test_every_epochs: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "test_every_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a whole number from 1")
        for name in ("base_lr", "final_lr"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it is a number from 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it is a number from 0 to below 1")
        smallest, largest = self.crop_scale
        if not 0 < smallest <= largest <= 1:
            raise ValueError(f"crop_scale is ({smallest}, {largest}); it takes 0 < smallest <= largest <= 1")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("nesterov goes with the optimizer sgd and a momentum above 0")

    @property
    def learning_rate(self) -> float:
        """The rate of the first epoch."""
        return self.base_lr * self.batch_size / 256

    def fitted(self, num_images: int) -> Self:
        """The same with a batch that so many images can fill, and so with a lower rate if the batch is lower."""
        return dataclasses.replace(self, batch_size=min(self.batch_size, num_images))

    def build(self, module: nn.Module) -> Optimizer:
        """The optimizer over the module's parameters."""
        groups = parameter_groups(module)
        if self.optimizer == "lars":
            return LARS(groups, lr=0.0, momentum=self.momentum)
        return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum, nesterov=self.nesterov, foreach=True)
