"""The demonstration's settings: how much is trained, and the files for server and devices that say so."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Conditions that would keep a device waiting are off: the machine of a demonstration may be busy, warm or on battery.
_DEVICE = """\
rescan_seconds = 600  # each round looks for new images by itself

[images]
settle_seconds = 0  # they are moved into the folder, whole

[learner.budget]
steps = {steps}

[learner.memory]
max_bytes = 16_000_000

[conditions]
power = {{ min_battery = 0, resume_battery = 0 }}
temperature = {{ max_celsius = 1000, resume_celsius = 1000 }}
load = {{ max_load = 1000, resume_load = 1000 }}
memory = {{ max_percent = 100, resume_percent = 100 }}
metered = {{ interfaces = "" }}
disk = {{ min_free_bytes = 0 }}

[caps]
threads = 1
memory_bytes = 3_000_000_000
niceness = 0  # somebody waits for it
"""
_PLAN = """\
[rounds]
seconds = {seconds}
min_devices = {devices}

[aggregator]
name = "fedavg"

[versions]
every = {every}
promote = true
"""
_ROUND_SECONDS = 900


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked of the demonstration.

    Attributes:
        checkpoint: of the run that the federation goes on with.
        server: the server's folder, which has the run's encoder.
        out: folder of the devices, the logs and the figures, made anew.
        picture: the PNG to write.
        rounds: how many; the cameras are turned after half of them.
        steps: that a device trains in a round.
        images: that a camera sees before it is turned, and after, at most.
    """

    checkpoint: Path
    server: Path
    out: Path
    picture: Path
    rounds: int
    steps: int
    images: int

    @property
    def half(self) -> int:
        """The last round before the cameras are turned."""
        return self.rounds // 2

    def device_file(self) -> str:
        """The devices' settings, TOML."""
        return _DEVICE.format(steps=self.steps)

    def plan_file(self, devices: int) -> str:
        """The server's plan, TOML: a version half-way and one at the end, as an export and its judging take long."""
        return _PLAN.format(seconds=_ROUND_SECONDS, devices=devices, every=self.half)

    def learner(self) -> Mapping[str, Any]:
        """The part of the devices' settings that says how they learn."""
        table: Mapping[str, Any] = tomllib.loads(self.device_file())["learner"]
        return table
