"""How a federation stands, its devices and its rounds, as plain values for the terminal and for JSON."""

import contextlib
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from server.federation import orders
from server.federation.federation import is_running
from server.federation.history import History
from server.federation.joins import Device
from server.federation.operation import Operation
from server.federation.versions import rounds_made
from server.registry.version import Version

MOST_ROUNDS = 100
TROUBLE_FILE = "versions.json"
"""Why the last round that should have become a version has not."""

_TROUBLE = ("ended:", "failed:", "cannot")


def has_begun(folder: Path) -> bool:
    """Whether `lowssl federation start` has begun a federation in this folder."""
    return Operation.load(folder) is not None


def order_rounds(folder: Path, count: int) -> int:
    """Ask for so many rounds more, and go on if it was stopped; returns the round that will then be the last."""
    pending = 0 if orders.is_stopped(folder) else orders.ordered(folder)
    until = max(pending, History(folder).newest()) + count
    orders.order(folder, until)
    return until


def status_of(folder: Path, devices: Iterable[Device]) -> dict[str, Any]:
    """Where a federation stands: what it does, its rounds, and what is in quarantine and why."""
    joined = len(list(devices))
    operation = Operation.load(folder)
    if operation is None:
        return {"phase": "not begun", "devices": joined}
    history, told, ordered = History(folder), orders.told(folder), orders.ordered(folder)
    newest = history.newest()
    status: dict[str, Any] = {
        "phase": _phase(folder, str(told.get("phase", "")), is_due=ordered > newest),
        "run": history.run,
        "source": operation.start.source,
        "round": newest,
        "ordered": max(ordered, newest),
        "devices": joined,
        "quarantine": told.get("quarantine", {}),
        "schedule": {
            "every_hours": operation.schedule.every_hours,
            "devices": operation.schedule.devices,
            "new_images": operation.schedule.new_images,
        },
    }
    with contextlib.suppress(FileNotFoundError, ValueError):
        status["trouble"] = json.loads((folder / TROUBLE_FILE).read_text())
    if is_running(folder):
        status["current"] = {key: told[key] for key in ("asked", "answered", "accepted", "failed") if key in told}
    return status


def device_rows(devices: Iterable[Device], online: Mapping[int, str] | None, folder: Path) -> list[dict[str, Any]]:
    """The devices that have joined.

    Args:
        devices: in the order of the rows.
        online: what Flower says of each of its ids; None: it cannot be asked.
        folder: of the federation.
    """
    held, devices = orders.told(folder).get("quarantine", {}), list(devices)
    last = _last_rounds(folder, {device.id for device in devices})
    rows = []
    for device in devices:
        status = "unknown" if online is None or device.node is None else online.get(device.node, "removed")
        rows.append(
            {
                "device": device.id,
                "name": device.name,
                "status": status,
                "joined": _iso(device.joined),
                "last_round": last.get(device.id),
                "new_images": device.new_images,
                "told": _iso(device.told),
                "quarantine": held.get(device.id),
            }
        )
    return rows


def round_rows(folder: Path, versions: Iterable[Version]) -> list[dict[str, Any]]:
    """The last rounds, the newest first, each with the version that it became."""
    if not has_begun(folder):
        return []
    history = History(folder)
    made = rounds_made(versions, history.run)
    rows = []
    for record in reversed(history.records(MOST_ROUNDS)):
        if record.version == 0:  # what it began with
            continue
        version = made.get(record.version)
        rows.append(
            {
                "round": record.version,
                "started": record.started,
                "seconds": record.seconds,
                "asked": len(record.asked),
                "accepted": len(record.accepted),
                "rejected": [{key: row.get(key) for key in ("device", "reason", "detail")} for row in record.rejected],
                "failed": dict(record.failed),
                "bytes_down": record.bytes_down,
                "bytes_up": record.bytes_up,
                "epsilon": record.epsilon,
                "version": None if version is None else version.name,
                "state": None if version is None else version.state,
            }
        )
    return rows


def _last_rounds(folder: Path, devices: set[str]) -> dict[str, int]:
    """By device, the last round that it counted in, if it ever did."""
    last: dict[str, int] = {}
    if not has_begun(folder):
        return last
    history = History(folder)
    for version in range(history.newest(), 0, -1):
        if last.keys() >= devices:  # mostly after a few, of rounds that may be thousands
            break
        record = history.record(version)
        for row in () if record is None else record.accepted:
            last.setdefault(str(row["device"]), version)
    return last


def _phase(folder: Path, told: str, *, is_due: bool) -> str:
    if is_running(folder):
        return told or "starting"
    if told.startswith(_TROUBLE) and (is_due or orders.is_stopped(folder)):
        return told
    if orders.is_stopped(folder):
        return "stopped"
    return "starting" if is_due else "idle"


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="seconds")
