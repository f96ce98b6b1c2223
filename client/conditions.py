"""When a device may work: all conditions together, and why it waits."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client.sensors import (
    Clock,
    DiskConfig,
    LoadConfig,
    MemoryPressureConfig,
    MeteredConfig,
    PowerConfig,
    Provider,
    QuietHoursConfig,
    TemperatureConfig,
)


class Conditions:
    """All conditions together; looking at them takes well below a millisecond, so it can be done between two steps.

    A sensor that is missing or broken never keeps a device from working.
    """

    def __init__(self, providers: Sequence[Provider]) -> None:
        self._providers = tuple(providers)

    def waiting(self) -> list[str]:
        """Every reason why work must wait; empty: it may go on."""
        return [reason for provider in self._providers if (reason := _reason(provider))]


def _reason(provider: Provider) -> str:
    try:
        return provider.reason()
    except (OSError, ValueError):
        return ""


@dataclass(frozen=True, kw_only=True)
class ConditionsConfig:
    """When a device may work."""

    power: PowerConfig = field(default_factory=PowerConfig)
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    memory: MemoryPressureConfig = field(default_factory=MemoryPressureConfig)
    metered: MeteredConfig = field(default_factory=MeteredConfig)
    quiet_hours: QuietHoursConfig = field(default_factory=QuietHoursConfig)
    disk: DiskConfig = field(default_factory=DiskConfig)

    def build(self, state_dir: Path, *, root: Path = Path("/"), clock: Clock = datetime.datetime.now) -> Conditions:
        """The conditions of a device.

        Args:
            state_dir: the folder of the device's state, for free disk.
            root: where the system's files are read.
            clock: the local time.
        """
        sensed = (self.power, self.temperature, self.load, self.memory, self.metered)
        providers = [config.build(root) for config in sensed]
        return Conditions([*providers, self.quiet_hours.build(clock), self.disk.build(state_dir)])
