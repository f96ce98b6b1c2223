"""When the next round is due without a person: after so many hours, or when enough devices have something new."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from server.federation.history import Record
from server.federation.joins import Device
from server.federation.operation import ScheduleConfig


def is_round_due(schedule: ScheduleConfig, last: Record, devices: Sequence[Device], now: datetime) -> bool:
    """Whether a round is to be ordered.

    Args:
        schedule: of the federation.
        last: its last completed round.
        devices: all that have joined.
        now: the time, aware.
    """
    # What a device told before the last round began is learned from by now.
    began = datetime.fromisoformat(last.started) if last.started else None
    if schedule.every_hours is not None:
        ended = None if began is None else began + timedelta(seconds=last.seconds)
        if ended is None or now - ended >= timedelta(hours=schedule.every_hours):
            return True
    if schedule.devices is None:
        return False
    ready = [
        device
        for device in devices
        if device.told is not None
        and (began is None or device.told > began)
        and device.new_images >= schedule.new_images
    ]
    return len(ready) >= schedule.devices
