"""SQLite files of a device: opened so that a kill or a power cut at any moment leaves the last committed state."""

import errno
import os
import sqlite3
from pathlib import Path

from lowssl_core.errors import UserError


def open_database(path: Path, schema: str, *, version: int, page_size: int = 4096) -> sqlite3.Connection:
    """Open a database, made if it is missing; transactions are begun explicitly (autocommit mode).

    The connection may be used from any thread, by one at a time.

    A rollback journal, not a write-ahead log: it holds what a transaction changes of the old content only, so that the
    space a database takes has a bound (`client.memory` is capped in bytes), and it is gone after each transaction.

    Args:
        path: the file.
        schema: SQL statements that make the tables where they are missing.
        version: of the schema; a file of another one is refused.
        page_size: in bytes, of a new file.

    Raises:
        UserError: the file cannot be opened, is no database, is damaged, or has another version.
        OSError: the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"{path} cannot be opened: {error}") from None
    try:
        connection.execute(f"PRAGMA page_size = {page_size}")
        connection.execute("PRAGMA journal_mode = TRUNCATE")
        connection.execute("PRAGMA synchronous = FULL")
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found not in (0, version):
            raise UserError(f"{path} has layout {found}, this release reads {version}: move it away to start anew")
        if found == 0:  # else nothing is written: a full disk must not keep anyone from what is there
            connection.executescript(f"BEGIN IMMEDIATE; {schema}; PRAGMA user_version = {version}; COMMIT;")
    except sqlite3.Error as error:
        connection.close()
        if _is_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise UserError(f"{path} cannot be used as a database ({error}): move it away to start anew") from None
    except UserError:
        connection.close()
        raise
    return connection


class Transaction:
    """A context in which everything is written or nothing is; OSError (ENOSPC), as of other files, on a full disk."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            try:
                self._connection.execute("COMMIT")
            except sqlite3.Error as failure:
                error = failure
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        if _is_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        if kind is None and error is not None:
            raise error


def _is_full(error: BaseException | None) -> bool:
    # Errors of Python's own module have no code.
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
