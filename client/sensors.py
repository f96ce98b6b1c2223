"""What tells whether a device may work: one small provider each for power, temperature, load, network and so on."""

import datetime
import fnmatch
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Clock = Callable[[], datetime.datetime]


class Provider(Protocol):
    """One condition."""

    def reason(self) -> str:
        """Why work must wait, in plain English; "" if nothing speaks against it or nothing can be known.

        Raises:
            OSError: a sensor cannot be read.
            ValueError: a sensor says something odd.
        """
        ...


class _Hysteresis:
    """A limit that holds until the value has gone back to a second one: work shall not start and stop in turns."""

    def __init__(self, stop: float, resume: float) -> None:
        self._stop, self._resume = stop, resume
        self.holds = False

    def above(self, value: float) -> bool:
        """Whether a value that must not become large is, or was and has not come down to the second limit."""
        self.holds = value > (self._resume if self.holds else self._stop)
        return self.holds

    def below(self, value: float) -> bool:
        """Whether a value that must not become small is, or was and has not come up to the second limit."""
        self.holds = value < (self._resume if self.holds else self._stop)
        return self.holds


@dataclass(frozen=True, kw_only=True)
class PowerConfig:
    """Mains, or enough battery.

    Attributes:
        min_battery: percent below which a device that runs on its battery waits; 100 and more: mains only.
        resume_battery: percent from which it goes on.
    """

    min_battery: float = 50.0
    resume_battery: float = 60.0

    def __post_init__(self) -> None:
        _check_order("min_battery", self.min_battery, "resume_battery", self.resume_battery)

    def build(self, root: Path) -> Provider:
        """The provider, reading below `root`."""
        return _Power(self, root / "sys/class/power_supply")


class _Power:
    def __init__(self, config: PowerConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._limit = _Hysteresis(config.min_battery, config.resume_battery)

    def reason(self) -> str:
        supplies = [path for path in sorted(self._folder.iterdir()) if _text(path / "scope", "System") != "Device"]
        if any(_text(path / "online", "0") == "1" for path in supplies if _text(path / "type", "") != "Battery"):
            return ""
        levels = [_number(path / "capacity") for path in supplies if _text(path / "type", "") == "Battery"]
        levels = [level for level in levels if math.isfinite(level)]
        if not levels:
            return ""
        level = sum(levels) / len(levels)
        if self._config.min_battery >= 100:
            return f"on battery ({level:.0f} %), and mains power is asked for"
        if not self._limit.below(level):
            return ""
        return f"battery at {level:.0f} %: waiting for mains power or {self._config.resume_battery:g} %"


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig:
    """Not too hot: above `max_celsius` at the hottest sensor a device waits until it is at `resume_celsius`."""

    max_celsius: float = 75.0
    resume_celsius: float = 65.0

    def __post_init__(self) -> None:
        _check_order("resume_celsius", self.resume_celsius, "max_celsius", self.max_celsius)

    def build(self, root: Path) -> Provider:
        """The provider, reading below `root`."""
        return _Temperature(self, root / "sys/class/thermal")


class _Temperature:
    def __init__(self, config: TemperatureConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._limit = _Hysteresis(config.max_celsius, config.resume_celsius)

    def reason(self) -> str:
        degrees = [_number(path) / 1000 for path in self._folder.glob("thermal_zone*/temp")]
        # Sensors that are switched off report absolute zero, or nothing.
        hottest = max((value for value in degrees if -50 < value < 200), default=-math.inf)
        if not self._limit.above(hottest):
            return ""
        return f"{hottest:.0f} °C: waiting for {self._config.resume_celsius:g} °C"


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Not in the way of other programs.

    The load average counts this program's own threads, about one a core while it trains; so it must go well below that
    before work starts again.

    Attributes:
        max_load: load average of one minute, for each core, above which a device waits.
        resume_load: to which it must have come down.
    """

    max_load: float = 1.5
    resume_load: float = 0.5

    def __post_init__(self) -> None:
        _check_order("resume_load", self.resume_load, "max_load", self.max_load)

    def build(self, root: Path) -> Provider:
        """The provider, reading below `root`."""
        return _Load(self, root / "proc/loadavg")


class _Load:
    def __init__(self, config: LoadConfig, path: Path) -> None:
        self._config, self._path = config, path
        self._limit = _Hysteresis(config.max_load, config.resume_load)

    def reason(self) -> str:
        load = float(self._path.read_text().split()[0]) / (os.cpu_count() or 1)
        if not self._limit.above(load):
            return ""
        return f"load of {load:.1f} a core: other programs are busy; waiting for {self._config.resume_load:g}"


@dataclass(frozen=True, kw_only=True)
class MemoryPressureConfig:
    """Enough memory for everyone, by the kernel's pressure stall information (PSI).

    Attributes:
        max_percent: share of the last ten seconds that some program waited for memory, in percent, above which a
            device waits.
        resume_percent: to which it must have come down.
    """

    max_percent: float = 10.0
    resume_percent: float = 1.0

    def __post_init__(self) -> None:
        _check_order("resume_percent", self.resume_percent, "max_percent", self.max_percent)

    def build(self, root: Path) -> Provider:
        """The provider, reading below `root`."""
        return _MemoryPressure(self, root / "proc/pressure/memory")


class _MemoryPressure:
    def __init__(self, config: MemoryPressureConfig, path: Path) -> None:
        self._config, self._path = config, path
        self._limit = _Hysteresis(config.max_percent, config.resume_percent)

    def reason(self) -> str:
        some = next(
            line for line in [*self._path.read_text().splitlines(), "some avg10=nan"] if line.startswith("some")
        )
        waited = float(dict(part.split("=") for part in some.split()[1:])["avg10"])
        if not self._limit.above(waited):
            return ""
        return (
            f"memory is short: programs wait {waited:.0f} % of the time; waiting for {self._config.resume_percent:g} %"
        )


@dataclass(frozen=True, kw_only=True)
class MeteredConfig:
    """No traffic that costs money.

    What is metered cannot be read from the kernel. The way to everywhere (the default route) counts as metered where
    its interface has such a name; and, whatever the interface, as long as the file exists, which a network manager's
    hook, or a person, makes and removes.

    Attributes:
        interfaces: patterns of names, as of mobile modems, with blanks between them.
        file: absolute path; empty: there is no such file.
    """

    interfaces: str = "wwan* ppp* rmnet*"
    file: str = "/run/lowssl/metered"

    def __post_init__(self) -> None:
        if self.file and not self.file.startswith("/"):
            raise ValueError(f"file is {self.file!r}; it is an absolute path, or empty")

    def build(self, root: Path) -> Provider:
        """The provider, reading below `root`."""
        return _Metered(self, root)


class _Metered:
    def __init__(self, config: MeteredConfig, root: Path) -> None:
        self._config = config
        self._file = root / config.file.lstrip("/")
        self._routes = root / "proc/net/route"

    def reason(self) -> str:
        if self._config.file and self._file.exists():
            return f"the network is metered ({self._config.file} exists)"
        interface = self._interface()
        if not any(fnmatch.fnmatch(interface, pattern) for pattern in self._config.interfaces.split()):
            return ""
        return f"the network is metered (the way out is {interface})"

    def _interface(self) -> str:
        """The interface of the default route with the lowest metric; "" without one."""
        rows = [line.split() for line in self._routes.read_text().splitlines()[1:]]
        found = [(int(row[6]), row[0]) for row in rows if row[1] == "00000000" and row[7] == "00000000"]
        return min(found)[1] if found else ""


@dataclass(frozen=True, kw_only=True)
class QuietHoursConfig:
    """Hours of local time in which a device stays quiet, "22:00" to "07:00"; they may pass midnight.

    Attributes:
        start: when they begin.
        end: when they end; the same time: there are none.
    """

    start: str = "00:00"
    end: str = "00:00"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            try:
                is_local = datetime.time.fromisoformat(getattr(self, name)).tzinfo is None
            except ValueError:
                is_local = False
            if not is_local:
                raise ValueError(f'{name} is {getattr(self, name)!r}; it is a local time of day, as "22:00"')

    def build(self, clock: Clock) -> Provider:
        """The provider, on a clock of local time."""
        return _QuietHours(self, clock)


class _QuietHours:
    def __init__(self, config: QuietHoursConfig, clock: Clock) -> None:
        self._clock = clock
        self._start, self._end = (datetime.time.fromisoformat(text) for text in (config.start, config.end))

    def reason(self) -> str:
        now, start, end = self._clock().time(), self._start, self._end
        is_quiet = start <= now < end if start <= end else now >= start or now < end
        return f"quiet hours until {end:%H:%M}" if is_quiet else ""


@dataclass(frozen=True, kw_only=True)
class DiskConfig:
    """Room on the disk that holds the state: below `min_free_bytes` a device waits."""

    min_free_bytes: int = 500_000_000

    def __post_init__(self) -> None:
        if self.min_free_bytes < 0:
            raise ValueError(f"min_free_bytes is {self.min_free_bytes}; it is a whole number from 0")

    def build(self, folder: Path) -> Provider:
        """The provider, for the disk that `folder` is on."""
        return _Disk(self, folder)


class _Disk:
    def __init__(self, config: DiskConfig, folder: Path) -> None:
        self._config, self._folder = config, folder

    def reason(self) -> str:
        free = shutil.disk_usage(self._folder).free
        wanted = self._config.min_free_bytes
        return f"{free / 1e6:,.0f} MB free on the disk; {wanted / 1e6:,.0f} MB are wanted" if free < wanted else ""


def _text(path: Path, missing: str) -> str:
    """A small file's text without blanks around it; `missing` where it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return missing


def _number(path: Path) -> float:
    """The number in a small file; NaN where there is none."""
    try:
        return float(_text(path, "nan"))
    except ValueError:
        return math.nan


def _check_order(lower_name: str, lower: float, upper_name: str, upper: float) -> None:
    if not (math.isfinite(lower) and math.isfinite(upper) and lower <= upper):
        raise ValueError(f"{lower_name} is {lower}; it is a number up to {upper_name}, {upper}")
