"""What screening makes of a device's update: a reply to aggregate, or a rejection with its reason."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from lowssl_core.protocol.manifest import FloatArray
from lowssl_core.protocol.messages import Metrics

Reason = Literal[
    "message",  # not an update at all
    "sender",  # it says it is from another device
    "quarantined",
    "manifest",
    "from the future",
    "too old",
    "repeated",  # this very update has been counted
    "replayed",  # an id that was used for another one
    "answered twice",
    "weight",
    "payload",
    "variance",
    "norm",
    "direction",
    "statistics",
]

# These happen to honest devices: one that waits for a person, a slow one, one whose acknowledgement was lost.
_HARMLESS: tuple[Reason, ...] = ("quarantined", "too old", "repeated")

_BLOCK = 2**16


@dataclass(frozen=True, kw_only=True)
class Screened:
    """An update that is fit to be aggregated.

    Attributes:
        device: who sent it.
        update_id: its own id.
        weight: images trained on, capped.
        staleness: model versions that came out since the one it trained from.
        clip: factor, at most 1, that its delta is to be shortened by.
        remarks: what was done to it, in words.
        metrics: what the device tells about its training.
        flat: (size,) its delta, before clipping, and its statistics, as the manifest orders them.
    """

    device: str
    update_id: str
    weight: float
    staleness: int = 0
    clip: float = 1.0
    remarks: tuple[str, ...] = ()
    metrics: Metrics = field(default_factory=Metrics)
    flat: FloatArray = field(repr=False)

    @property
    def key(self) -> tuple[str, str]:
        """What tells replies apart: a device names its updates by itself, and may take another one's name."""
        return self.device, self.update_id

    @property
    def discount(self) -> float:
        """1 / sqrt(1 + staleness), FedBuff's weight of a late update (Nguyen et al. 2022)."""
        return 1 / math.sqrt(1 + self.staleness)


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """An update that is not aggregated, as it is recorded.

    Attributes:
        device: who sent it.
        update_id: its own id; None where the message could not be read.
        reason: which check refused it.
        detail: the figures, in one line.
    """

    device: str
    update_id: str | None
    reason: Reason
    detail: str

    @property
    def is_fault(self) -> bool:
        """Whether it counts toward the device's quarantine."""
        return self.reason not in _HARMLESS


Verdict = Screened | Rejected


def blocks(size: int, length: int = _BLOCK) -> Iterator[slice]:
    """The slices that cut `size` values into stretches of `length`: what is computed in one is small."""
    return (slice(start, min(start + length, size)) for start in range(0, size, length))
