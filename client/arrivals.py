"""The images that arrive in a watched folder: found, told apart by content, checked, and remembered."""

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from client.contents import BAD, LEARNED, NEW, Counts, count_arrivals, list_set_aside
from client.database import Transaction, open_database
from client.folder import ARRIVALS, ImagesAwayError
from client.walking import Bits, File, hash_file, walk
from lowssl_core.images import BadImage, ImageLimits, NotEnoughMemory, decode, read_size

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS contents (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, state INTEGER NOT NULL,
    reason TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS contents_by_state ON contents (state, id);
CREATE TABLE IF NOT EXISTS files (id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE, size INTEGER NOT NULL,
    modified INTEGER NOT NULL, content INTEGER REFERENCES contents (id), reason TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS files_by_content ON files (content)
"""
# Files between two commits: what a kill makes the next scan examine again.
_FILES_PER_COMMIT = 64
# A time that no file has: one that could not be read is opened again by the next scan, as rights, memory and contents
# change without it.
_TRY_AGAIN = -1


@dataclass(frozen=True, kw_only=True)
class ArrivalsConfig:
    """What is taken as an image.

    Attributes:
        settle_seconds: how long a file must have stayed as it is; until then it may still be being written.
        max_file_bytes: larger files are set aside unread.
    """

    settle_seconds: float = 2.0
    max_file_bytes: int = 64_000_000

    def __post_init__(self) -> None:
        if not 0 <= self.settle_seconds < float("inf"):
            raise ValueError(f"settle_seconds is {self.settle_seconds}; it is a number from 0")
        if self.max_file_bytes < 1:
            raise ValueError(f"max_file_bytes is {self.max_file_bytes}; it is a whole number from 1")


@dataclass(frozen=True, kw_only=True)
class ScanReport:
    """What a scan of the folder found.

    Attributes:
        files: image files in the folder, by their extensions.
        new: images that were never seen before and can be used.
        duplicates: files examined in this scan whose content was known, under another name or from before.
        set_aside: files examined in this scan that cannot be used; `Arrivals.set_aside` names them all.
        settling: files that may still be being written; a later scan takes them.
        unexamined: files left for a later scan by the limit.
        vanished: files known before that are gone.
    """

    files: int = 0
    new: int = 0
    duplicates: int = 0
    set_aside: int = 0
    settling: int = 0
    unexamined: int = 0
    vanished: int = 0


class _Known(NamedTuple):
    """A row of the files: its number, and the size in bytes and time in ns at which it was examined."""

    row: int
    size: int
    modified: int


class Arrivals:
    """The images of a folder and its folders, at any depth, and which of them were learned from.

    An image is its content: a copy, a new name or a restored backup is nothing new. Every scan looks at all names,
    sizes and times, and opens only files that are new or changed. What a scan found is committed as it goes; after
    kill -9 the next one goes on from there. Memory does not grow with the number of files but for the names of one
    folder and one bit a file.

    Args:
        folder: where images arrive.
        state_dir: where the index is kept, `arrivals.sqlite3`.
        config: what is taken.
        limits: accepted image sizes in pixels.

    Raises:
        ImagesAwayError: no such folder.
        UserError: an index that cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        state_dir: Path,
        config: ArrivalsConfig | None = None,
        limits: ImageLimits | None = None,
    ) -> None:
        if not folder.is_dir():
            raise ImagesAwayError(f"--images {folder}: there is no such folder")
        self.folder = folder
        self.config = config or ArrivalsConfig()
        self._limits = limits or ImageLimits()
        self._database = open_database(state_dir / ARRIVALS, _SCHEMA, version=_VERSION)
        self._settling: dict[str, tuple[File, float]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the index."""
        self._database.close()

    def rescan(self, examine: int | None = None) -> ScanReport:
        """Look through the folder for what came, changed or went.

        Args:
            examine: open at most so many files, so that a first look at a large folder can be taken in parts; those
                that could not be read before are opened beside them, or many of them would keep others from their turn.

        Raises:
            ImagesAwayError: the folder is gone, or may not be read.
        """
        try:
            os.scandir(self.folder).close()
        except (FileNotFoundError, NotADirectoryError):
            raise ImagesAwayError(f"--images {self.folder}: there is no such folder any more") from None
        except OSError as error:
            raise ImagesAwayError(f"--images {self.folder}: {error.strerror}") from None
        counts = dict.fromkeys(ScanReport.__dataclass_fields__, 0)
        opened = 0
        seen = Bits()
        settling: dict[str, tuple[File, float]] = {}
        waiting: list[File] = []
        unreadable: list[str] = []
        for file in walk(self.folder, unreadable):
            counts["files"] += 1
            known = self._known(file.path)
            if known is not None:
                seen.add(known.row)
                if (known.size, known.modified) == (file.size, file.modified):
                    continue
            if not self._is_settled(file, settling):
                counts["settling"] += 1
            elif known is not None and known.modified == _TRY_AGAIN:
                waiting.append(file)
            elif examine is not None and opened == examine:
                counts["unexamined"] += 1
            else:
                opened += 1
                waiting.append(file)
            if len(waiting) == _FILES_PER_COMMIT:
                self._take(waiting, seen, counts)
        self._take(waiting, seen, counts)
        self._settling = settling
        counts["vanished"] = self._forget_vanished(seen, unreadable)
        return ScanReport(**counts)

    def new(self, limit: int) -> list[str]:
        """The keys (sha256, hexadecimal) of at most `limit` images never learned from, in the order they came."""
        rows = self._database.execute(
            "SELECT key FROM contents WHERE state = ? AND EXISTS (SELECT 1 FROM files WHERE content = contents.id)"
            " ORDER BY id LIMIT ?",
            (NEW, limit),
        )
        return [key.hex() for (key,) in rows]

    def read(self, key: str) -> bytes:
        """The bytes of an image.

        Raises:
            BadImage: it is gone, cannot be read, or changed since it was found; the next scan finds out which.
        """
        for path in self._paths(key):
            try:
                data = (self.folder / path).read_bytes()
            except OSError:
                continue
            if hashlib.sha256(data).hexdigest() == key:
                return data
        with Transaction(self._database):
            self._database.execute(
                "UPDATE files SET modified = ? WHERE content = (SELECT id FROM contents WHERE key = ?)",
                (_TRY_AGAIN, bytes.fromhex(key)),
            )
        raise BadImage("gone or changed since it was found")

    def mark_learned(self, keys: Iterable[str]) -> None:
        """Remember that training has taken these images in."""
        with Transaction(self._database):
            self._database.executemany(
                "UPDATE contents SET state = ? WHERE key = ? AND state = ?",
                ((LEARNED, bytes.fromhex(key), NEW) for key in keys),
            )

    def put_aside(self, key: str, reason: str) -> None:
        """Never offer an image again, and say why."""
        with Transaction(self._database):
            self._database.execute(
                "UPDATE contents SET state = ?, reason = ? WHERE key = ?", (BAD, reason, bytes.fromhex(key))
            )

    def set_aside(self, limit: int = 100) -> dict[str, str]:
        """At most `limit` files that cannot be used, by path in the folder, the last found first, and why."""
        return list_set_aside(self._database, limit)

    def counts(self) -> Counts:
        """How many images and files of each kind are known."""
        return count_arrivals(self._database)

    def _known(self, path: str) -> _Known | None:
        row = self._database.execute(
            "SELECT id, size, modified FROM files WHERE path = ?", (os.fsencode(path),)
        ).fetchone()
        return None if row is None else _Known(*row)

    def _paths(self, key: str) -> list[str]:
        rows = self._database.execute(
            "SELECT path FROM files JOIN contents ON contents.id = content WHERE key = ?", (bytes.fromhex(key),)
        )
        return [os.fsdecode(path) for (path,) in rows]

    def _is_settled(self, file: File, settling: dict[str, tuple[File, float]]) -> bool:
        """Whether a file has stayed as it is for a while: by its own time, or since an earlier scan of this process.

        The second way is for clocks: a camera's may be ahead of this machine's, and its files from the future.
        """
        wanted = self.config.settle_seconds
        if time.time() - file.modified / 1e9 >= wanted:
            return True
        now = time.monotonic()
        before, since = self._settling.get(file.path, (file, now))
        if before != file:
            since = now
        settling[file.path] = (file, since)
        return now - since >= wanted

    def _take(self, files: list[File], seen: Bits, counts: dict[str, int]) -> None:
        """Examine files and commit what they are; `files` is empty afterwards."""
        with Transaction(self._database):
            for file in files:
                try:
                    content, outcome = self._examine(file)
                    reason = ""
                except FileNotFoundError:
                    continue
                except (NotEnoughMemory, OSError) as error:
                    why = error.strerror if isinstance(error, OSError) else error.reason
                    content, outcome, reason = None, "set_aside", f"cannot be read: {why}"
                    file = file._replace(modified=_TRY_AGAIN)  # noqa: PLW2901
                except BadImage as error:  # nothing is known of its content
                    content, outcome, reason = None, "set_aside", error.reason
                counts[outcome] += 1
                seen.add(self._record(file, content, reason))
        files.clear()

    def _record(self, file: File, content: int | None, reason: str) -> int:
        """Write down what a file is; returns the number of its row."""
        ((row,),) = self._database.execute(
            "INSERT INTO files (path, size, modified, content, reason) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (path) DO UPDATE SET size = excluded.size, modified = excluded.modified,"
            " content = excluded.content, reason = excluded.reason RETURNING id",
            (os.fsencode(file.path), file.size, file.modified, content, reason),
        ).fetchall()
        return int(row)

    def _examine(self, file: File) -> tuple[int, str]:
        """A file's content by its number, and what the file is: "new", "duplicates" or "set_aside".

        Raises:
            BadImage: it is not even read; NotEnoughMemory: this time.
            OSError: it cannot be read.
        """
        if file.size > self.config.max_file_bytes:
            raise BadImage(f"huge: a file of {file.size:,} bytes, more than {self.config.max_file_bytes:,}")
        key = hash_file(self.folder / file.path)
        known = self._database.execute("SELECT id, state FROM contents WHERE key = ?", (key,)).fetchone()
        if known is not None:
            return known[0], "set_aside" if known[1] == BAD else "duplicates"
        try:
            data = (self.folder / file.path).read_bytes()
        except MemoryError:
            raise NotEnoughMemory from None
        reason = self._defect(data)
        state = BAD if reason else NEW
        ((row,),) = self._database.execute(
            "INSERT INTO contents (key, state, reason) VALUES (?, ?, ?) RETURNING id", (key, state, reason)
        ).fetchall()
        return row, "set_aside" if reason else "new"

    def _defect(self, data: bytes) -> str:
        """Why an image cannot be used; "" where it can. Raises NotEnoughMemory where that cannot be told."""
        try:
            read_size(data, self._limits)
            decode(data, reduce=8, limits=self._limits)  # the whole of a JPEG is read all the same
        except NotEnoughMemory:
            raise
        except BadImage as error:
            return error.reason
        return ""

    def _forget_vanished(self, seen: Bits, unreadable: Iterable[str]) -> int:
        """Drop the files that are gone, but for those in folders that nobody could look into.

        What is known of their contents stays.
        """
        unknown = tuple(os.fsencode(prefix) for prefix in unreadable)
        files = self._database.execute("SELECT id, path FROM files")
        gone = [row for row, path in files if row not in seen and not bytes(path).startswith(unknown)]
        with Transaction(self._database):
            self._database.executemany("DELETE FROM files WHERE id = ?", ((row,) for row in gone))
        return len(gone)
