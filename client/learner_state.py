"""What a learner knows beside its tensors, as it is written with them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from client.rounds import Round


@dataclass
class LearnerState:
    """A learner's facts, all of them JSON.

    Attributes:
        round: the round that is open, or the last one.
        is_open: whether a round is open.
        is_finishing: whether its end has begun, and must be completed.
        starts_over: whether nothing of the device's own weights is worth keeping when a global model arrives.
        loss: sum over the round's steps so far.
        seconds: spent on them.
        scale: FedEMA's lambda, once it is set.
        local_size: of the local views in pixels, once it is measured.
    """

    round: Round | None = None
    is_open: bool = False
    is_finishing: bool = False
    starts_over: bool = True
    loss: float = 0.0
    seconds: float = 0.0
    scale: float | None = None
    local_size: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "LearnerState":
        """Read what `as_dict` gave."""
        return cls(**dict(tree) | {"round": None if tree["round"] is None else Round.from_dict(tree["round"])})
