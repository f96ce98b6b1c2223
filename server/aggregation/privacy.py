"""Differential privacy of whole devices: a noisy mean of clipped deltas, and an accountant that stops in time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lowssl_core.errors import UserError
from lowssl_core.protocol.manifest import FloatArray
from server.aggregation.aggregator import Aggregator, DeltaSum
from server.aggregation.means import check_momentum, step_with_momentum
from server.aggregation.reply import Screened, blocks

if TYPE_CHECKING:
    from server.aggregation.screening import ScreeningConfig


@dataclass(frozen=True, kw_only=True)
class PrivateMeanConfig:
    """DP-FedAvg (McMahan et al. 2018): (sum of deltas clipped to C + N(0, (z C)^2)) / n, then server momentum.

    Attributes:
        clip: C, the norm that no device's delta exceeds.
        noise_multiplier: z.
        expected_replies: n, the sampling rate times the number of devices; the true number would tell who takes part.
        momentum: of the server; it works on what is private already.
        rate: the server's learning rate.
    """

    name: ClassVar[str] = "private_mean"
    clip: float = 1.0
    noise_multiplier: float = 1.0
    expected_replies: float = 50.0
    momentum: float = 0.0
    rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("clip", "noise_multiplier", "expected_replies"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it is a number above 0")
        check_momentum(self.momentum, self.rate)

    def build(self, folder: Path) -> "PrivateMean":
        """The aggregator; it keeps nothing in `folder`."""
        return PrivateMean(self)


class PrivateMean(Aggregator):
    """The mean of deltas with noise, from the system's entropy; each device counts the same.

    BatchNorm statistics are values of images: they are not used, and the model keeps those it has. Noise on them would
    make variances negative. A round without replies has noise as well: that nobody came must not show.
    """

    def __init__(self, config: PrivateMeanConfig) -> None:
        super().__init__()
        self.config = config

    def _start(self) -> None:
        self._sum = DeltaSum(self._manifest.trained_size)

    def _take(self, reply: Screened) -> None:
        length = float(np.sqrt(sum(_square(reply.flat[block]) for block in blocks(self._manifest.trained_size))))
        factor = min(1.0, self.config.clip / length) if length > 0 else 1.0
        self._sum.add(reply.flat, factor, 1.0)

    def _move(self, new: FloatArray) -> None:
        config, generator = self.config, np.random.default_rng()
        for block in blocks(self._manifest.trained_size):
            noise = generator.normal(0, config.noise_multiplier * config.clip, block.stop - block.start)
            self._sum.values[block] = (self._sum.values[block] + noise) / config.expected_replies
        self.carried = step_with_momentum(new, self._sum, self.carried, config.momentum, config.rate)


def check_private(screening: "ScreeningConfig") -> None:
    """Refuse a screening under which one device's images change how another's count.

    Raises:
        UserError: replies are compared with each other, or late ones are let in.
    """
    if screening.comparison is not None:
        raise UserError("recipe: with private_mean replies are not compared with each other: comparison is absent")
    if screening.max_staleness:
        raise UserError(
            f"recipe: with private_mean max_staleness is 0, not {screening.max_staleness}: "
            "a device counts in the round it was drawn for"
        )


def poisson_sample(devices: Sequence[str], rate: float) -> list[str]:
    """Draw each device for itself with probability `rate`, from the system's entropy; maybe none, maybe all."""
    drawn = np.random.default_rng().random(len(devices)) < rate
    return [device for device, is_drawn in zip(devices, drawn, strict=True) if is_drawn]


class BudgetSpent(UserError):  # noqa: N818 - a verdict
    """One more round would pass the budget."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Rounds of one kind.

    Attributes:
        noise_multiplier: z of their noise.
        sampling_rate: with which devices were drawn by `poisson_sample`; None: not at random, nothing is amplified.
        count: how many.
    """

    noise_multiplier: float
    sampling_rate: float | None
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier < float("inf") or self.count < 1:
            raise ValueError(f"noise_multiplier is {self.noise_multiplier}, count {self.count}; above 0, and from 1")
        if self.sampling_rate is not None and not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate is {self.sampling_rate}; it is above 0 up to 1, or absent")


@dataclass
class Accountant:
    """What a run has spent so far: epsilon at `delta`, for adding or removing one device, by Renyi's divergence.

    `charge` before a round begins, and save `to_json` before its model is published: a round that dies has been paid,
    never the other way round.

    Attributes:
        delta: well below one over the number of devices.
        max_epsilon: the budget.
        rounds: what has been charged.
    """

    delta: float
    max_epsilon: float
    rounds: list[Rounds] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1 or not 0 < self.max_epsilon < float("inf"):
            raise ValueError(f"delta is {self.delta}, max_epsilon {self.max_epsilon}; from 0 to 1, and above 0")

    @property
    def epsilon(self) -> float:
        """What has been spent; 0 before the first round."""
        return epsilon(self.rounds, self.delta)

    def charge(self, noise_multiplier: float, sampling_rate: float | None) -> float:
        """Pay for one round; returns what has been spent with it.

        Raises:
            BudgetSpent: it would be more than the budget; nothing is charged.
        """
        rounds = list(self.rounds)
        last = rounds[-1] if rounds else None
        if last and (last.noise_multiplier, last.sampling_rate) == (noise_multiplier, sampling_rate):
            rounds[-1] = Rounds(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, count=last.count + 1)
        else:
            rounds.append(Rounds(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate))
        spent = epsilon(rounds, self.delta)
        if spent > self.max_epsilon:
            raise BudgetSpent(
                f"privacy: one more round would bring epsilon to {spent:.3g}; max_epsilon is {self.max_epsilon:g}"
            )
        self.rounds = rounds
        return spent

    def to_json(self) -> str:
        """What has been charged, for `restore`."""
        return json.dumps([[each.noise_multiplier, each.sampling_rate, each.count] for each in self.rounds])

    def restore(self, text: str) -> None:
        """Take over what `to_json` gave."""
        self.rounds = [
            Rounds(noise_multiplier=noise, sampling_rate=rate, count=count) for noise, rate, count in json.loads(text)
        ]


def epsilon(rounds: Sequence[Rounds], delta: float) -> float:
    """Epsilon at `delta` of all `rounds` together (Mironov 2017; Mironov, Talwar and Zhang 2019 for sampled ones)."""
    if not rounds:
        return 0.0
    import dp_accounting  # a second

    accountant = dp_accounting.rdp.RdpAccountant()
    for each in rounds:
        event = dp_accounting.GaussianDpEvent(each.noise_multiplier)
        if each.sampling_rate is not None:
            event = dp_accounting.PoissonSampledDpEvent(each.sampling_rate, event)
        accountant.compose(event, each.count)
    return float(accountant.get_epsilon(delta))


def _square(values: FloatArray) -> float:
    wide = values.astype(np.float64)
    return float(wide @ wide)
