"""What a method is: views in, pair losses out, two hooks, and a state of which some parts stay private."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowssl_core.backbones import BackboneConfig, build_backbone
from lowssl_core.losses import PairLosses
from lowssl_core.methods.heads import Network
from lowssl_core.schedules import Progress
from lowssl_core.spectra import feature_deviation
from lowssl_core.views import Views


class Method(nn.Module, ABC):
    """A self-supervised method: it owns the trained network and whatever makes its targets.

    Attributes:
        online: the trained backbone and head.
        teacher: the moving average of the online network, where the method has one (MoCo's key network).
        chance_loss: the loss of predictions that say nothing, ln of the number of answers to choose from.
        synchronised: the networks whose BatchNorm statistics are shared by all ranks of a distributed run.
        private: prefixes of the state's names that never leave a device in a federation.
    """

    online: Network
    teacher: Network | None
    chance_loss: float
    synchronised: ClassVar[tuple[str, ...]]
    private: ClassVar[tuple[str, ...]]

    @abstractmethod
    def forward(self, views: Views, progress: Progress) -> PairLosses:
        """The losses of all pairs of different views.

        Args:
            views: two global views, each (B, 3, G, G), and any number of local ones, each (B, 3, L, L).
            progress: the run's clock before this step.
        """

    def after_backward(self, progress: Progress) -> None:
        """Touch up gradients, between the backward pass and the optimizer's step."""

    def after_step(self, progress: Progress) -> None:
        """Bring targets up to date, after the optimizer's step."""

    def federated_state(self) -> dict[str, Tensor]:
        """The state that devices share: all of it but what is private."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(self.private)}


def check_ranges(
    config: object, *, counts: Sequence[str] = (), positives: Sequence[str] = (), shares: Sequence[str] = ()
) -> None:
    """Refuse a method's values that cannot be: `counts` are from 1, `positives` above 0, `shares` from 0 to 1.

    Raises:
        ValueError: the first field out of its range.
    """
    for name in counts:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it is a whole number from 1")
    for name in positives:
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"{name} is {getattr(config, name)}; it is a number above 0")
    for name in shares:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it is a number from 0 to 1")


def teacher_of(online: Network, backbone: BackboneConfig, head: nn.Module) -> Network:
    """A network with the weights of `online` that no gradient reaches and that has no stochastic depth.

    `head` is a head like the online one; its weights are overwritten.
    """
    module, width = build_backbone(backbone.name)
    teacher = Network(module, width, head)
    teacher.load_state_dict(online.state_dict())
    return teacher.requires_grad_(False)


@torch.no_grad()
def feature_signals(features: Tensor) -> dict[str, Tensor]:
    """How much features (V, B, width) of a batch differ, by its first view (`feature_deviation`)."""
    return {"feature_std": feature_deviation(features[0].detach())}


@torch.no_grad()
def target_signals(targets: Tensor) -> dict[str, Tensor]:
    """What target probabilities (T, B, K) say of collapse.

    Returns:
        `target_entropy`: mean entropy of a target, in units of ln K (0: one-hot, 1: uniform).
        `prototypes_used`: the share of the outputs that can be used (at most one for each row) that some row prefers.
    """
    rows = targets.flatten(0, 1)
    num_rows, num_outputs = rows.shape
    entropy = torch.special.entr(rows).sum(dim=1).mean() / torch.log(torch.tensor(float(num_outputs)))
    used = torch.zeros(num_outputs, device=rows.device).index_fill_(0, rows.argmax(dim=1), 1.0).sum()
    return {"target_entropy": entropy, "prototypes_used": used / min(num_rows, num_outputs)}
