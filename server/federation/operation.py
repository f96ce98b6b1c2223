"""What a server does with a federation by itself: when it orders rounds, and which of them become versions."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically

_FILE = "operation.json"
_YEAR_HOURS = 24 * 366


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """When rounds are ordered without a person; nothing given: never.

    Attributes:
        every_hours: one, so long after the last one was completed; a year at most.
        devices: one, when so many devices have told of enough new images since.
        new_images: how many are enough.
    """

    every_hours: float | None = None
    devices: int | None = None
    new_images: int = 100

    def __post_init__(self) -> None:
        if self.every_hours is not None and not 0 < self.every_hours <= _YEAR_HOURS:
            raise ValueError(f"every_hours is {self.every_hours}; it is a number above 0, up to {_YEAR_HOURS}")
        for name in ("devices", "new_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it is a whole number from 1")


@dataclass(frozen=True, kw_only=True)
class VersionsConfig:
    """Which rounds become versions of the encoder, and what becomes of these.

    Attributes:
        every: each so many rounds, and the last of those ordered.
        promote: whether the gate judges each, and the one that passes serves.
    """

    every: int = 1
    promote: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it is a whole number from 1")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a federation began with.

    Attributes:
        source: in words, as it was given: a version, a file, or "untrained".
        parent: the version that it was, by name; None for anything else.
        resize: short side of an image before the centre square is cut.
        licence: of its weights.
        images_seen: in its training.
    """

    source: str = "untrained"
    parent: str | None = None
    resize: int
    licence: str = ""
    images_seen: int = 0


@dataclass(frozen=True, kw_only=True)
class Operation:
    """All that the server needs to know of a federation beside its `Plan`."""

    start: Start
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    versions: VersionsConfig = field(default_factory=VersionsConfig)

    def save(self, folder: Path) -> None:
        """Write it into the federation's folder."""
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        write_atomically(folder / _FILE, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, folder: Path) -> "Operation | None":
        """What `save` wrote; None if it has not been.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            tree = json.loads((folder / _FILE).read_text())
            return cls(
                start=Start(**tree["start"]),
                schedule=ScheduleConfig(**tree["schedule"]),
                versions=VersionsConfig(**tree["versions"]),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / _FILE} cannot be read: {error}") from None
