"""Peak memory and CPU time of the programs that were started, by what they are, short-lived ones too; for Linux."""

import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# What a command line has to hold, in the order in which it is asked: a warden's names its program as well.
ROLES: Mapping[str, str] = {
    "lowssl_core.processes": "warden",
    "flower-superlink": "SuperLink",
    "flower-superexec": "SuperExec",
    "flower-supernode": "SuperNode",
    "flwr-serverapp": "ServerApp",
    "flwr-clientapp": "ClientApp",
    "server.main": "server",
    "client.main": "agent",
    "/flwr ": "flwr command",
}
_SECONDS = 0.5
_TICKS = os.sysconf("SC_CLK_TCK")
_LOOKS_PER_SHARE = 10  # the proportional set size is a walk through page tables


@dataclass
class _Peak:
    """Of one process: its role, the most it has had, in bytes, and its CPU seconds, before the watch and by now."""

    side: str
    role: str
    cpu_before: float
    cpu: float = 0.0
    resident: int = 0
    proportional: int = 0


@dataclass
class ProcessWatch:
    """Looks at programs and their descendants twice a second, until the end of a block.

    Resident memory is the kernel's own peak (VmHWM), as it was at the last look; it counts pages shared with others
    whole. The proportional set size (PSS) divides them; it is looked at every five seconds. CPU time is that
    during the block.

    Args:
        sides: process ids of the programs that are told apart, each with its descendants, by name.
    """

    sides: Mapping[str, int]
    _peaks: dict[tuple[int, str], _Peak] = field(default_factory=dict)
    _most: dict[str, int] = field(default_factory=dict)
    _is_over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def rows(self) -> list[dict[str, Any]]:
        """For each side and role: processes seen, the most that one has had, in MiB, CPU seconds; the largest first.

        Devices are one side: the most that one process of any device has had, and the CPU time of all of them.
        """
        groups: dict[tuple[str, str], list[_Peak]] = {}
        for peak in self._peaks.values():
            groups.setdefault((_kind(peak.side), peak.role), []).append(peak)
        rows = [
            {
                "side": side,
                "role": role,
                "processes": len(peaks),
                "cpu_seconds": sum(peak.cpu - peak.cpu_before for peak in peaks),
                "resident_mib": max(peak.resident for peak in peaks) / 2**20,
                "proportional_mib": max(peak.proportional for peak in peaks) / 2**20,
            }
            for (side, role), peaks in groups.items()
        ]
        return sorted(rows, key=lambda row: (row["side"] == "device", -row["resident_mib"]))

    def totals(self) -> dict[str, float]:
        """The most PSS that all processes of the server, and of one device, had at one look, in MiB."""
        totals: dict[str, float] = {}
        for side, most in self._most.items():
            totals[_kind(side)] = max(totals.get(_kind(side), 0.0), most / 2**20)
        return totals

    def _watch(self) -> None:
        looks = 0
        while not self._is_over.wait(_SECONDS if looks else 0):
            self._look(is_first=looks == 0, with_shares=looks % _LOOKS_PER_SHARE == 0)
            looks += 1

    def _look(self, *, is_first: bool, with_shares: bool) -> None:
        children = _children()
        for side, root in self.sides.items():
            total = 0
            found = [root]
            for pid in found:  # grows as it goes
                found += children.get(pid, [])
                with suppress(OSError, IndexError, KeyError):  # it has just ended
                    role, (start, cpu) = _role(pid), _started_and_cpu(pid)
                    if role is None:
                        continue
                    before = cpu if is_first else 0.0
                    peak = self._peaks.setdefault((pid, start), _Peak(side, role, before))
                    peak.side, peak.role, peak.cpu = side, role, cpu  # between fork and exec it looks like its parent
                    peak.resident = max(peak.resident, _bytes(pid, "status", "VmHWM:"))
                    if with_shares:
                        share = _bytes(pid, "smaps_rollup", "Pss:")
                        peak.proportional, total = max(peak.proportional, share), total + share
            self._most[side] = max(self._most.get(side, 0), total)


def _kind(side: str) -> str:
    """A side's name without its number."""
    return side.rstrip("0123456789-")


def _children() -> dict[int, list[int]]:
    """The children of every process, by one walk through /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError, IndexError):
                parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    return children


def _role(pid: int) -> str | None:
    """What a process is by its command line; None for one that has none any more."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    if words == [b""]:
        return None
    line = b" ".join(words).decode(errors="replace")
    return next((role for part, role in ROLES.items() if part in line), "other")


def _started_and_cpu(pid: int) -> tuple[str, float]:
    """When a process began, in the kernel's ticks, as process ids are used again, and its CPU seconds so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[19], (int(fields[11]) + int(fields[12])) / _TICKS


def _bytes(pid: int, file: str, key: str) -> int:
    """A value of a table below /proc, in bytes."""
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise KeyError(key)
