"""What a federation does: how a round runs, how replies are screened and aggregated, and what devices are to train."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowssl_core.errors import UserError
from lowssl_core.protocol.codec import CODECS, Codec
from server.aggregation import AGGREGATORS, AggregatorConfig
from server.aggregation.comparison import ComparisonConfig
from server.aggregation.means import FedAvgConfig
from server.aggregation.privacy import PrivateMeanConfig, check_private
from server.aggregation.screening import ScreeningConfig


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """How a round runs.

    Attributes:
        seconds: its deadline, from when devices are asked.
        quorum: it closes earlier, once this share of the devices asked has sent what may count.
        min_devices: it begins when so many devices are online, and moves the model if so many replies count.
        max_devices: so many are asked, drawn by chance; None: all.
        down: codec of the model sent to devices.
        up: codec of the updates they send.
        share: of the values that top-k keeps.
        proximal: mu of FedProx, 0 for none.
    """

    seconds: float = 3600.0
    quorum: float = 1.0
    min_devices: int = 2
    max_devices: int | None = None
    down: Codec = "fp16"
    up: Codec = "int8"
    share: float = 0.05
    proximal: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds is {self.seconds}; it is a number above 0")
        if not 0 < self.quorum <= 1:
            raise ValueError(f"quorum is {self.quorum}; it is above 0 up to 1")
        if self.min_devices < 1:
            raise ValueError(f"min_devices is {self.min_devices}; it is a whole number from 1")
        if self.max_devices is not None and self.max_devices < self.min_devices:
            raise ValueError(f"max_devices is {self.max_devices}; it is at least min_devices, {self.min_devices}")
        if self.down not in CODECS[:2]:
            raise ValueError(f"down is {self.down!r}; a whole model is sent as fp32 or fp16")
        if self.up not in CODECS or not 0 < self.share <= 1:
            raise ValueError(f"up is {self.up!r}, share {self.share}; one of {', '.join(CODECS)}, and above 0 up to 1")
        if not 0 <= self.proximal < math.inf:
            raise ValueError(f"proximal is {self.proximal}; it is a number from 0")


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """The budget of differential privacy, where the aggregator is `private_mean`.

    Attributes:
        sampling_rate: with which each device is drawn for a round.
        delta: well below one over the number of devices.
        max_epsilon: the budget; training stops before it is passed.
    """

    sampling_rate: float
    delta: float
    max_epsilon: float

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate is {self.sampling_rate}; it is above 0 up to 1")
        if not 0 < self.delta < 1 or not 0 < self.max_epsilon < math.inf:
            raise ValueError(f"delta is {self.delta}, max_epsilon {self.max_epsilon}; from 0 to 1, and above 0")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides a federation's course.

    Attributes:
        recipe: what devices train by, as plain values; the server does not read it.
        rounds: how a round runs.
        screening: what a reply must be.
        aggregator: how replies become the next model.
        privacy: where the aggregator is `private_mean`, its budget.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    screening: ScreeningConfig = field(default_factory=ScreeningConfig)
    aggregator: AggregatorConfig = field(default_factory=FedAvgConfig)
    privacy: PrivacyConfig | None = None

    def __post_init__(self) -> None:
        if isinstance(self.aggregator, PrivateMeanConfig) != (self.privacy is not None):
            raise ValueError("privacy is given exactly where the aggregator is private_mean")
        if self.privacy is not None:
            check_private(self.screening)
            if self.rounds.max_devices is not None:
                raise ValueError("rounds.max_devices is absent with private_mean: privacy.sampling_rate draws devices")

    def to_json(self) -> str:
        """The plan as JSON, for `from_json`."""
        tree = dataclasses.asdict(self)
        tree["aggregator"] = {"name": self.aggregator.name, **tree["aggregator"]}
        return json.dumps(tree, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote.

        Raises:
            UserError: not such a plan.
        """
        try:
            tree = json.loads(text)
            aggregator = AGGREGATORS[tree["aggregator"].pop("name")](**tree["aggregator"])
            comparison, privacy = tree["screening"].pop("comparison"), tree["privacy"]
            screening = ScreeningConfig(
                comparison=None if comparison is None else ComparisonConfig(**comparison), **tree["screening"]
            )
            return cls(
                recipe=tree["recipe"],
                rounds=RoundsConfig(**tree["rounds"]),
                screening=screening,
                aggregator=aggregator,
                privacy=None if privacy is None else PrivacyConfig(**privacy),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the federation's plan cannot be read: {error}") from None
