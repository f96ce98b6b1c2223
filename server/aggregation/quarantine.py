"""Devices whose updates are refused unread after several faults, until a person releases them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Quarantine:
    """Which devices have sent faulty updates, and which are in quarantine for it.

    Attributes:
        limit: faults within the window that put a device into quarantine.
        window: model versions after which a fault is forgotten; a device in quarantine stays there all the same.
        faults: versions at which each device's last faults happened, each version once: a round that is done again
            gets the same reply again.
        held: devices in quarantine, with the reason of the last fault.
    """

    limit: int = 3
    window: int = 20
    faults: dict[str, list[int]] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)

    def __contains__(self, device: str) -> bool:
        return device in self.held

    def record(self, device: str, version: int, reason: str) -> bool:
        """Note a fault; returns whether the device is in quarantine now."""
        recent = [past for past in self.faults.get(device, []) if version - self.window < past < version]
        self.faults[device] = [*recent, version]
        if len(self.faults[device]) >= self.limit:
            self.held[device] = reason
        return device in self.held

    def release(self, device: str) -> bool:
        """Take a device out, its faults forgotten; returns whether it was in quarantine."""
        self.faults.pop(device, None)
        return self.held.pop(device, None) is not None

    def as_dict(self) -> dict[str, Any]:
        """The faults and the devices held, as plain values."""
        faults = {device: list(versions) for device, versions in self.faults.items()}
        return {"faults": faults, "held": dict(self.held)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `as_dict` gave."""
        self.faults = {device: list(versions) for device, versions in state["faults"].items()}
        self.held = dict(state["held"])
