"""Versions and events as trees of plain values, for JSON."""

from dataclasses import asdict
from typing import Any

from server.registry.version import Event, Version


def version_tree(version: Version) -> dict[str, Any]:
    """A version, its time in ISO 8601."""
    tree = {"name": version.name, **asdict(version)}
    return tree | {"created": version.created.isoformat()}


def event_tree(event: Event) -> dict[str, Any]:
    """An event with its report, if there is one; its time in ISO 8601."""
    report = None if event.report is None else event.report.as_dict()
    return asdict(event) | {"time": event.time.isoformat(), "report": report}
