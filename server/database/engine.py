"""Opening the database: migrated under a lock, with writing transactions one after another on SQLite and PostgreSQL."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from lowssl_core.errors import UserError

# How long one waits for the transactions of others before giving up.
PATIENCE_SECONDS = 30.0
# Any number will do, if all that share the database take the same: the letters "lowssl".
ADVISORY_LOCK = 0x6C6F7773736C
ACCEPTED = "sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"


class DatabaseUnavailableError(UserError):
    """The database cannot be reached or does not do what it is asked, or others kept it busy for too long."""

    status = 1


class Database:
    """An open database whose tables are those of this version of LowSSL.

    Writing transactions exclude each other, in this process and in all others, from their first statement on: by BEGIN
    IMMEDIATE on SQLite, by an advisory lock on PostgreSQL. So what a writing transaction has read stays true until it
    ends, and none is ever asked to try again. Writes here are few and short. Reading transactions see one moment and
    wait for nobody. A committed transaction survives the loss of power (SQLite: WAL, synchronous=FULL).

    Args:
        url: see `ACCEPTED`; missing folders are made.

    Raises:
        UserError: a URL of another kind, or a database that a newer LowSSL has migrated.
        DatabaseUnavailableError: it cannot be reached.
    """

    def __init__(self, url: str | URL) -> None:
        parsed = _parse(url)
        self._name = parsed.render_as_string(hide_password=True)
        self._is_sqlite = parsed.get_backend_name() == "sqlite"
        self._engine = _sqlite_engine(parsed) if self._is_sqlite else create_engine(parsed, pool_pre_ping=True)
        options = {} if self._is_sqlite else {"isolation_level": "REPEATABLE READ"}
        self._reading = self._engine.execution_options(**options)
        self._writing = self._engine.execution_options(lowssl_writes=True)
        try:
            with self._named_errors():
                if self._is_sqlite:
                    self._use_wal()
                self._migrate()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one moment of the database; what it is told to change is thrown away.

        Raises:
            DatabaseUnavailableError: the database cannot be reached.
        """
        with self._named_errors(), Session(self._reading, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that alone writes; committed at the end, or rolled back if the block raises.

        Raises:
            DatabaseUnavailableError: the database cannot be reached, or others wrote for longer than 30 s.
        """
        with self._named_errors(), Session(self._writing, expire_on_commit=False) as session, session.begin():
            self._lock(session.connection())
            yield session

    def _lock(self, connection: Connection) -> None:
        if self._is_sqlite:
            return  # BEGIN IMMEDIATE did it
        milliseconds = int(PATIENCE_SECONDS * 1000)
        connection.execute(text(f"SET LOCAL lock_timeout = {milliseconds}"))
        # The lock of a process whose machine is gone is given up after twice as long.
        connection.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = {2 * milliseconds}"))
        connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))

    def _use_wal(self) -> None:
        """Set the journal's mode, which stays in the file; SQLite does not wait for others here by itself."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with self._engine.connect() as connection:
                    raw: Any = connection.connection.driver_connection
                    raw.execute("PRAGMA journal_mode = WAL")
                return
            except (sqlite3.OperationalError, OperationalError) as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _migrate(self) -> None:
        """Bring the tables up to date; nothing is locked where they are."""
        from server.database.migrations.running import is_current, upgrade

        with self._reading.connect() as connection:
            if is_current(connection, name=self._name):
                return
        with self._writing.begin() as connection:
            self._lock(connection)
            upgrade(connection, name=self._name)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, DataError):
            raise  # a mistake of ours
        except (DBAPIError, PoolTimeoutError, sqlite3.Error) as error:
            reason = error.orig if isinstance(error, DBAPIError) else error
            first = next(iter(str(reason).strip().splitlines()), type(reason).__name__)
            raise DatabaseUnavailableError(f"database {self._name}: {first}") from error


def _parse(url: str | URL) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        # The text is not repeated: there may be a password in it.
        raise UserError(f"the database's URL cannot be read; give {ACCEPTED}") from None
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        if not parsed.database or parsed.database == ":memory:":
            raise UserError(f"database {url}: SQLite needs a file here, others could not see its memory: {ACCEPTED}")
        return parsed.set(drivername="sqlite+pysqlite")
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        if find_spec("psycopg") is None:
            raise UserError("PostgreSQL takes psycopg: pip install 'lowssl[postgres]'")
        return parsed.set(drivername="postgresql+psycopg")
    raise UserError(f"database {parsed.render_as_string(hide_password=True)}: give {ACCEPTED}")


def _sqlite_engine(url: URL) -> Engine:
    assert url.database
    Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": PATIENCE_SECONDS})

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, record: object) -> None:
        connection.isolation_level = None  # else the driver begins transactions of its own
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")  # a commit reaches the disk before it returns

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A transaction that begins by reading and then writes would be refused if another wrote in between.
        writes = connection.get_execution_options().get("lowssl_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
