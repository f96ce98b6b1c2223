"""What is known of a round while it goes on: who was asked, who answered, who will not."""

import dataclasses
import time
from datetime import UTC, datetime
from typing import Any

from server.aggregation.reply import Rejected, Screened
from server.federation.history import Record

_TRIES = 3  # that one device is sent one task
_LOST_SECONDS = 120.0  # that a round waits for a device that lost its task


class OpenRound:
    """A round that starts from the model of `version`.

    Attributes:
        task: what devices are sent.
        tries: how often each device was sent it; 0: in an earlier try of this round.
        answered: devices that sent something in answer to it that may count.
        late: how many answers to earlier rounds' tasks came.
        lost: devices that lost the task, and since when; they may be sent it again.
        failed: devices that send nothing, and why.
        accepted: replies that count, as they are recorded.
        rejected: replies that do not.
    """

    def __init__(self, version: int) -> None:
        self.version = version
        self.task = b""
        self.tries: dict[str, int] = {}
        self.answered: set[str] = set()
        self.late = 0
        self.lost: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.accepted: list[dict[str, Any]] = []
        self.rejected: list[dict[str, Any]] = []
        self._bytes_down = self._bytes_up = 0
        self._started, self._began = now(), time.monotonic()

    def expected(self) -> set[str]:
        """Devices that were asked and may still answer."""
        recently = time.monotonic() - _LOST_SECONDS
        hopeless = {device for device in self.failed if self.lost.get(device, recently) <= recently}
        return self.tries.keys() - self.answered - hopeless - {row["device"] for row in self.rejected}

    def expect(self, device: str) -> None:
        """Note that a device was sent the task in an earlier try of this round, which it answers in this one."""
        self.tries.setdefault(device, 0)

    def sent(self, device: str) -> None:
        """Note that a device was sent the task."""
        self.tries[device] = self.tries.get(device, 0) + 1
        self.lost.pop(device, None)
        self.failed.pop(device, None)
        self._bytes_down += len(self.task)

    def arrived(self, device: str, length: int, *, is_late: bool) -> None:
        """Note that a device sent so many bytes, in answer to this round's task or an earlier one's."""
        self._bytes_up += length
        if is_late:
            self.late += 1
            return
        self.answered.add(device)
        self.lost.pop(device, None)
        self.failed.pop(device, None)

    def fail(self, device: str, why: str, *, is_lost: bool) -> None:
        """Note that a device sends nothing, and whether only because it lost the task."""
        self.answered.discard(device)
        self.failed[device] = why
        if is_lost and self.tries.get(device, _TRIES) < _TRIES:
            self.lost[device] = time.monotonic()

    def accept(self, reply: Screened) -> None:
        """Note a reply that counts."""
        row = {field.name: getattr(reply, field.name) for field in dataclasses.fields(reply) if field.name != "flat"}
        self.accepted.append(row | {"remarks": list(reply.remarks), "metrics": dataclasses.asdict(reply.metrics)})

    def reject(self, verdict: Rejected) -> None:
        """Note a reply that does not."""
        if verdict.reason != "repeated":  # the same update sent twice does not undo the first
            self.answered.discard(verdict.device)
        self.rejected.append(dataclasses.asdict(verdict))

    def record(self, version: int, epsilon: float | None) -> Record:
        """What is kept of it."""
        return Record(
            version=version,
            started=self._started,
            seconds=round(time.monotonic() - self._began, 3),
            asked=tuple(sorted(self.tries)),
            accepted=tuple(self.accepted),
            rejected=tuple(self.rejected),
            failed=self.failed,
            bytes_down=self._bytes_down,
            bytes_up=self._bytes_up,
            epsilon=epsilon,
        )

    def as_dict(self) -> dict[str, Any]:
        """What is told while it goes on."""
        return {
            "started": self._started,
            "asked": sorted(self.tries),
            "answered": sorted(self.answered),
            "accepted": len(self.accepted),
            "rejected": self.rejected,
            "failed": self.failed,
        }


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
