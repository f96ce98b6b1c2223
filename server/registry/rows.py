"""The rows behind the registry's versions and events: found, recorded, and turned into what callers see."""

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import cast

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from lowssl_core.errors import UserError
from lowssl_core.export.description import Description
from server.database.tables import EventRow, VersionRow
from server.registry.history import serving_stack
from server.registry.report import GateReport
from server.registry.version import (
    ONNX,
    Action,
    Event,
    Kind,
    State,
    StoredFile,
    UnknownVersionError,
    Version,
    version_name,
    version_number,
)

LONGEST_TEXT = 2000


def find_row(session: Session, name: str) -> VersionRow:
    """A version's row.

    Raises:
        UnknownVersionError: there is none of this name.
    """
    row = session.get(VersionRow, version_number(name))
    if row is None:
        last = session.scalar(select(func.max(VersionRow.number)))
        there = "the registry is empty" if last is None else f"the registry has v1 to {version_name(last)}"
        raise UnknownVersionError(f"there is no version {name}: {there}")
    return row


def serving_row(session: Session) -> VersionRow | None:
    """The row of the version that serves, if any."""
    return session.scalar(select(VersionRow).where(VersionRow.state == "serving"))


def _can_serve(row: VersionRow) -> bool:
    return any(file.role == ONNX for file in row.files)


def rollback_target(session: Session) -> VersionRow | None:
    """The version that served last before the one that does, of those that have a file to serve."""
    actions = ("promote", "force", "rollback")
    query = select(EventRow.action, EventRow.version).where(EventRow.action.in_(actions)).order_by(EventRow.id)
    stack = serving_stack((action, version) for action, version in session.execute(query))
    rows = (session.get_one(VersionRow, number) for number in reversed(stack[:-1]) if number != stack[-1])
    return next((row for row in rows if _can_serve(row)), None)


def keep_figures(row: VersionRow, report: GateReport | None) -> None:
    """Make what the gate measured metrics of the version."""
    if report is not None:
        row.metrics = {**row.metrics, **report.figures}


def record(
    session: Session, row: VersionRow, action: Action, who: str, why: str, report: GateReport | None = None
) -> None:
    """Add an event to the transaction that makes it true."""
    kept = None if report is None else report.as_dict()
    session.add(EventRow(time=now(), version=row.number, action=action, who=who, why=why, report=kept))


def to_version(row: VersionRow) -> Version:
    """A row as callers see it."""
    name = version_name(row.number)
    description = Description.from_properties(row.description, of=f"{name} in the registry")
    return Version(
        number=row.number,
        kind=cast(Kind, row.kind),
        parent=None if row.parent is None else version_name(row.parent),
        state=cast(State, row.state),
        created=row.created,
        description=replace(description, version=name),
        files={file.role: StoredFile(sha256=file.sha256, bytes=file.bytes) for file in row.files},
        metrics=dict(row.metrics),
        facts=dict(row.facts),
    )


def to_event(row: EventRow) -> Event:
    """A row as callers see it."""
    return Event(
        time=row.time,
        version=version_name(row.version),
        action=cast(Action, row.action),
        who=row.who,
        why=row.why,
        report=None if row.report is None else GateReport.from_dict(row.report),
    )


def lacks(name: str, role: str, roles: Iterable[str]) -> str:
    """A sentence: the version has no such file, but these."""
    held = ", ".join(roles)
    return f"{name} has no file {role!r}: " + (f"it has {held}" if held else "its files were pruned")


def checked_text(what: str, text: str) -> str:
    """Text that every database can hold.

    Raises:
        UserError: control characters, half a character, or too much.
    """
    if len(text) > LONGEST_TEXT:
        raise UserError(f"{what} has {len(text):,} characters; at most {LONGEST_TEXT:,} are kept")
    if any((ord(sign) < 32 and sign not in "\n\t") or 0xD800 <= ord(sign) <= 0xDFFF for sign in text):
        raise UserError(f"{what} holds characters that are no text")
    return text


def now() -> datetime:
    """The time in UTC, aware."""
    return datetime.now(UTC)
