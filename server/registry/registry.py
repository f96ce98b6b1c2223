"""Versions of the encoder that replace each other: adding, promoting, refusing, rolling back, pruning."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from sqlalchemy import URL, func, select
from sqlalchemy.orm import Session

from lowssl_core.errors import UserError
from lowssl_core.export.description import Description
from server.database.engine import Database
from server.database.tables import EventRow, FileRow, VersionRow
from server.registry.blobs import BlobStore
from server.registry.pruning import Pruned, plan_pruning, prune
from server.registry.report import GateReport
from server.registry.rows import (
    checked_text,
    find_row,
    keep_figures,
    lacks,
    now,
    record,
    rollback_target,
    serving_row,
    to_event,
    to_version,
)
from server.registry.version import (
    ONNX,
    Action,
    Event,
    Kind,
    StaleReportError,
    State,
    StoredFile,
    Version,
    version_name,
)

DATABASE_FILE = "registry.sqlite3"


class RegistrySettings(Protocol):
    """What `open_registry` needs to know; the server's settings have it."""

    @property
    def data_dir(self) -> Path:
        """Folder of the database, the files and the cache, as far as the URLs do not say otherwise."""

    @property
    def database_url(self) -> str | None:
        """The database; None: SQLite in `data_dir`."""

    @property
    def files_url(self) -> str | None:
        """The store of files; None: a folder in `data_dir`."""


class Registry:
    """Versions in a database and their files in a store; at most one version serves.

    What may happen to a version, by its state:

    ========== ============ ============== =================== =====================
    state      promote      refuse         rollback, of it     another is promoted
    ========== ============ ============== =================== =====================
    candidate  serving      refused        -                   candidate
    refused    serving      refused        -                   refused
    retired    serving      retired        serving             retired
    serving    error        error          error               retired
    ========== ============ ============== =================== =====================

    A retired version that the gate refuses stays retired: it did serve, and one may roll back to it. A version whose
    files were pruned cannot serve. Each change is one transaction, its event and the change of the version that is
    replaced included; files are stored before the row that names them. So a process killed at any point leaves files
    that nothing names at most, which `prune` removes.

    Any number of processes may share a registry. Methods may be called from any thread.

    Args:
        database: holds the rows.
        blobs: holds the files.
    """

    def __init__(self, database: Database, blobs: BlobStore) -> None:
        self.database = database
        self._blobs = blobs

    def versions(self, *, state: State | None = None) -> list[Version]:
        """All versions, or those of one state, the oldest first."""
        query = select(VersionRow).order_by(VersionRow.number)
        if state is not None:
            query = query.where(VersionRow.state == state)
        with self.database.read() as session:
            return [to_version(row) for row in session.scalars(query)]

    def version(self, name: str) -> Version:
        """One version.

        Raises:
            UnknownVersionError: there is none of this name.
        """
        with self.database.read() as session:
            return to_version(find_row(session, name))

    def serving(self) -> Version | None:
        """The version that serves, if any."""
        with self.database.read() as session:
            row = serving_row(session)
            return None if row is None else to_version(row)

    def events(self, version: str | None = None) -> list[Event]:
        """What happened, to all versions or to one, in order.

        Raises:
            UnknownVersionError: there is no version of this name.
        """
        query = select(EventRow).order_by(EventRow.id)
        with self.database.read() as session:
            if version is not None:
                query = query.where(EventRow.version == find_row(session, version).number)
            return [to_event(row) for row in session.scalars(query)]

    def add(
        self,
        *,
        kind: Kind,
        description: Description,
        files: Mapping[str, Path],
        parent: str | None = None,
        metrics: Mapping[str, float] | None = None,
        facts: Mapping[str, object] | None = None,
        who: str,
        why: str = "",
    ) -> Version:
        """Add a candidate.

        Args:
            kind: where it came from.
            description: of its exported file.
            files: by role; `promote` wants "onnx".
            parent: name of the version that it was trained on from.
            metrics: finite figures.
            facts: what JSON can hold, without NaN.
            who: who added it.
            why: in their words.

        Raises:
            UnknownVersionError: there is no such parent.
            UserError: a file cannot be read, or text cannot be stored.
            ValueError: metrics or facts that JSON cannot hold.
        """
        who, why = checked_text("who", who), checked_text("why", why)
        described = {"metrics": dict(metrics or {}), "facts": dict(facts or {})}
        json.dumps(described, allow_nan=False)  # PostgreSQL takes no NaN either
        properties = description.to_properties()
        for key, value in properties.items():  # they may be those of a file that nobody vouches for
            checked_text(key, value)
        stored: dict[str, StoredFile] = {}
        missing = list(files)
        while True:
            stored |= {role: self._blobs.put(files[role]) for role in missing}
            with self.database.write() as session:
                # `prune` removes files in such a transaction too: what is here now stays once it is named.
                missing = [role for role, file in stored.items() if not self._blobs.holds(file)]
                if not missing:
                    row = VersionRow(
                        number=(session.scalar(select(func.max(VersionRow.number))) or 0) + 1,
                        kind=kind,
                        state="candidate",
                        parent=None if parent is None else find_row(session, parent).number,
                        created=now(),
                        description=properties,
                        files=[FileRow(role=role, sha256=f.sha256, bytes=f.bytes) for role, f in stored.items()],
                        **described,
                    )
                    session.add(row)
                    session.flush()
                    record(session, row, "add", who, why)
                    return to_version(row)

    def promote(self, name: str, *, who: str, why: str = "", report: GateReport | None = None) -> Version:
        """Let a version serve in place of the one that does.

        Args:
            name: which.
            who: who decided it.
            why: in their words.
            report: what the gate found. One that did not pass is overruled, and the event says so ("force").

        Raises:
            UnknownVersionError: there is no such version.
            StaleReportError: the report passed it against another version than the one that serves now.
            UserError: it serves already, or has no file to serve.
        """
        who, why = checked_text("who", who), checked_text("why", why)
        with self.database.write() as session:
            row, before = find_row(session, name), serving_row(session)
            now_serving = None if before is None else version_name(before.number)
            if row.state == "serving":
                raise UserError(f"{name} serves already")
            if report is not None and report.passed and report.against != now_serving:
                raise StaleReportError(
                    f"{name} was judged against {report.against or 'no version'}, but meanwhile "
                    f"{now_serving or 'no version'} serves: judge it again"
                )
            keep_figures(row, report)
            self._serve(
                session, row, before, "promote" if report is None or report.passed else "force", who, why, report
            )
            return to_version(row)

    def refuse(self, name: str, *, who: str, why: str = "", report: GateReport | None = None) -> Version:
        """Keep a version from serving; one that served before stays retired, and the report is kept all the same.

        Raises:
            UnknownVersionError: there is no such version.
            UserError: it serves.
        """
        who, why = checked_text("who", who), checked_text("why", why)
        with self.database.write() as session:
            row = find_row(session, name)
            if row.state == "serving":
                raise UserError(f"{name} serves: promote another version or roll back instead")
            if row.state != "retired":
                row.state = "refused"
            keep_figures(row, report)
            record(session, row, "refuse", who, why, report)
            return to_version(row)

    def rollback(self, *, who: str, why: str = "") -> Version:
        """Let the version serve that served before; without a gate, as it passed once or was forced.

        Each call goes back one promotion more, as "undo" does, over versions whose files were pruned. To go forward
        again, promote.

        Raises:
            UserError: no version serves, or none that could serve did before.
        """
        who, why = checked_text("who", who), checked_text("why", why)
        with self.database.write() as session:
            before = serving_row(session)
            if before is None:
                raise UserError("no version serves: there is nothing to roll back")
            row = rollback_target(session)
            if row is None:
                raise UserError(f"no version that could serve did so before {version_name(before.number)}")
            self._serve(session, row, before, "rollback", who, why, None)
            return to_version(row)

    def prune(self, *, keep: int, who: str, why: str = "", dry_run: bool = False) -> Pruned:
        """Remove the files of old versions, and those that no version names.

        Rows and events stay: lineage and history are never lost. Files are kept of the version that serves, of the one
        that `rollback` would return to, of all candidates, and of the newest `keep` others. A file that no version
        named from the start is removed when it is older than an hour.

        Args:
            keep: how many refused and retired versions keep their files, from 0.
            who: who asked for it.
            why: in their words.
            dry_run: whether only to say what would be removed.
        """
        if keep < 0:
            raise UserError(f"keep is {keep}; expected 0 or more")
        who, why = checked_text("who", who), checked_text("why", why)
        if dry_run:
            return plan_pruning(self.database, self._blobs, keep=keep)
        return prune(self.database, self._blobs, keep=keep, who=who, why=why)

    def fetch(self, version: Version, role: str = ONNX) -> Path:
        """A local file of a version, whose content was checked just now; not to be changed.

        Raises:
            DamagedFileError: it is missing or is not what was stored.
            StoreUnavailableError: the store of files cannot be reached.
            UserError: the version has no such file.
        """
        if role not in version.files:
            raise UserError(lacks(version.name, role, list(version.files)))
        return self._blobs.fetch(version.files[role], of=f"{version.name} ({role})")

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    def _serve(
        self,
        session: Session,
        row: VersionRow,
        before: VersionRow | None,
        action: Action,
        who: str,
        why: str,
        report: GateReport | None,
    ) -> None:
        name = version_name(row.number)
        file = next((file for file in row.files if file.role == ONNX), None)
        if file is None:
            raise UserError(lacks(name, ONNX, [file.role for file in row.files]))
        if not self._blobs.holds(StoredFile(sha256=file.sha256, bytes=file.bytes)):
            raise UserError(f"{name} cannot serve: its file {file.sha256[:12]} is not in the store")
        if before is not None:
            before.state = "retired"
            record(session, before, "retire", who, f"replaced by {name}")
            session.flush()  # the database lets no two serve, not even for a moment
        row.state = "serving"
        record(session, row, action, who, why, report)


def has_registry(settings: RegistrySettings) -> bool:
    """Whether there is a registry where the settings say; of a database by URL that is not asked."""
    return settings.database_url is not None or (settings.data_dir.expanduser() / DATABASE_FILE).is_file()


def open_registry(settings: RegistrySettings) -> Registry:
    """The registry that the settings speak of, made if there is none yet.

    Raises:
        UserError: a URL that cannot be used, a database that a newer LowSSL has migrated, or one that is not reached.
    """
    data_dir = settings.data_dir.expanduser().absolute()
    blobs = BlobStore(settings.files_url or data_dir / "files", data_dir / "cache")
    database = Database(settings.database_url or URL.create("sqlite", database=str(data_dir / DATABASE_FILE)))
    return Registry(database, blobs)
