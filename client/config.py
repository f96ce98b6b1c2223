"""A device's settings: what counts as an image, how it learns, when it may work, how much it may take; strict TOML."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from client.arrivals import ArrivalsConfig
from client.conditions import ConditionsConfig
from client.learner_config import LearnerConfig
from client.throttle import MIN_BYTES_PER_SECOND
from lowssl_core.errors import UserError
from lowssl_core.recipe import build_dataclass


@dataclass(frozen=True, kw_only=True)
class CapsConfig:
    """How much of the machine the agent may take.

    Attributes:
        threads: that compute at a time; absent: half of the processors, at least one.
        memory_bytes: that it may allocate, with its libraries (about 1 GB before any training); absent: no limit. The
            kernel holds it to that: a step beyond it fails, the round is given up, the agent stays.
        niceness: 0 to 19, how far other programs go first.
        bytes_per_second: that go to the server, and as many that come from it, with TLS; absent: no limit.
    """

    threads: int | None = None
    memory_bytes: int | None = None
    niceness: int = 10
    bytes_per_second: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it is a whole number from 1")
        if self.memory_bytes is not None and self.memory_bytes < 2**20:
            raise ValueError(f"memory_bytes is {self.memory_bytes}; it is a whole number from {2**20:,}")
        if not 0 <= self.niceness <= 19:
            raise ValueError(f"niceness is {self.niceness}; it is a whole number from 0 to 19")
        if self.bytes_per_second is not None and self.bytes_per_second < MIN_BYTES_PER_SECOND:
            raise ValueError(
                f"bytes_per_second is {self.bytes_per_second}; it is a whole number from {MIN_BYTES_PER_SECOND:,}"
            )


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """All of a device's settings.

    Attributes:
        images: what is taken as an image.
        learner: how it learns.
        conditions: when it may work.
        caps: how much it may take.
        rescan_seconds: between two looks at the folder of images while there is nothing else to do.
    """

    images: ArrivalsConfig = field(default_factory=ArrivalsConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    conditions: ConditionsConfig = field(default_factory=ConditionsConfig)
    caps: CapsConfig = field(default_factory=CapsConfig)
    rescan_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.rescan_seconds <= 86_400:
            raise ValueError(f"rescan_seconds is {self.rescan_seconds}; it is a number above 0, up to 86,400 (a day)")


def load_config(path: Path | None) -> DeviceConfig:
    """Read a device's settings; None: as they are by default.

    Raises:
        UserError: no such file, bad TOML, an unknown key, a wrong type, or a value out of range; it names the key.
    """
    if path is None:
        return DeviceConfig()
    try:
        tree = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not TOML: {error}") from None
    try:
        return build_dataclass(DeviceConfig, tree)
    except UserError as error:
        # Recipes are read by the same function.
        said = str(error).removeprefix("recipe: ").replace("; the recipe has ", "; the file has ")
        raise UserError(f"--config {path}: {said}") from None
