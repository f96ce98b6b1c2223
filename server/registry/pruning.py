"""Removing the files of old versions, and files that no version names, beside whatever other processes do."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from server.database.engine import Database
from server.database.tables import FileRow, VersionRow
from server.registry.blobs import BlobStore, Lying
from server.registry.rows import now, record, rollback_target
from server.registry.version import version_name

# A file that no version names may belong to an import that is under way. Removed, it would only be written again.
UNNAMED_AGE = timedelta(hours=1)
# One that is being written would be missed.
UNFINISHED_AGE = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What pruning removed, or would remove.

    Attributes:
        versions: names of those that lost their files, the oldest first.
        files: how many files of the store.
        bytes: their length together.
    """

    versions: tuple[str, ...]
    files: int
    bytes: int


def plan_pruning(database: Database, blobs: BlobStore, *, keep: int) -> Pruned:
    """What `prune` would remove now."""
    with database.read() as session:
        rows = _prunable(session, keep)
        gone = {row.number for row in rows}
        named = set(session.scalars(select(FileRow.sha256).where(FileRow.version.not_in(gone))))
    return _pruned(rows, _unnamed(blobs, named, _hashes(rows)))


def prune(database: Database, blobs: BlobStore, *, keep: int, who: str, why: str) -> Pruned:
    """Remove the files of all but the newest `keep` prunable versions, and what no version names (`Registry.prune`)."""
    with database.write() as session:
        rows = _prunable(session, keep)
        freed = _hashes(rows)
        for row in rows:
            row.files.clear()
            record(session, row, "prune", who, why)
    with database.read() as session:
        named = set(session.scalars(select(FileRow.sha256)))
    removed = [lying for lying in _unnamed(blobs, named, freed) if _remove(database, blobs, lying)]
    _clean_cache(database, blobs)
    return _pruned(rows, removed)


def _prunable(session: Session, keep: int) -> list[VersionRow]:
    """Versions that may lose their files, the oldest first."""
    target = rollback_target(session)
    query = select(VersionRow).where(VersionRow.state.in_(("refused", "retired"))).order_by(VersionRow.number.desc())
    others = [row for row in session.scalars(query) if row.files and row is not target]
    return others[keep:][::-1]


def _hashes(rows: Iterable[VersionRow]) -> set[str]:
    return {file.sha256 for row in rows for file in row.files}


def _unnamed(blobs: BlobStore, named: set[str], freed: set[str]) -> list[Lying]:
    """Files that are not named, and were freed just now or are old; what was left half written, too."""
    moment = now()
    found = []
    for lying in blobs.listing():
        age = moment - lying.modified
        if lying.sha256 is None:
            is_garbage = age > UNFINISHED_AGE
        else:
            is_garbage = lying.sha256 not in named and (lying.sha256 in freed or age > UNNAMED_AGE)
        if is_garbage:
            found.append(lying)
    return found


def _remove(database: Database, blobs: BlobStore, lying: Lying) -> bool:
    """Remove a file, unless a version has begun to name it.

    An import stores its file first and names it then, in a writing transaction in which it sees that the file is there.
    As this one excludes that one, the import finds the file, or knows that it has to store it again.
    """
    with database.write() as session:
        if session.scalar(select(FileRow.version).where(FileRow.sha256 == lying.sha256).limit(1)) is not None:
            return False
        blobs.remove(lying)
        return True


def _clean_cache(database: Database, blobs: BlobStore) -> None:
    cached = blobs.cached()
    with database.read() as session:  # after looking: what is there was named when it was fetched
        named = set(session.scalars(select(FileRow.sha256)))
    oldest = (now() - UNFINISHED_AGE).timestamp()
    for path in cached:
        is_whole = not path.name.startswith(".")
        with suppress(FileNotFoundError):  # another process did it
            if path.name not in named and (is_whole or path.stat().st_mtime < oldest):
                path.unlink()


def _pruned(rows: Iterable[VersionRow], removed: list[Lying]) -> Pruned:
    return Pruned(
        versions=tuple(version_name(row.number) for row in rows),
        files=len(removed),
        bytes=sum(lying.bytes for lying in removed),
    )
