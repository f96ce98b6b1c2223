"""Bringing a database's tables up to date within a transaction of the caller."""

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from lowssl_core.errors import UserError


def is_current(connection: Connection, *, name: str) -> bool:
    """Whether the tables are those of this version of LowSSL.

    Args:
        connection: of the database.
        name: how errors call it.

    Raises:
        UserError: the tables are those of a newer version.
    """
    found = MigrationContext.configure(connection).get_current_revision()
    known = _revisions()
    if found is not None and found not in known:
        raise UserError(
            f"database {name}: its tables are of schema {found}, which a newer LowSSL made; this one knows up to "
            f"{known[-1]}: update LowSSL"
        )
    return found == known[-1]


def upgrade(connection: Connection, *, name: str) -> None:
    """Take the steps that are missing, if another process has not; the caller holds the lock and commits.

    Raises:
        UserError: see `is_current`.
    """
    if is_current(connection, name=name):
        return
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    # A percent sign in a folder's name would begin an interpolation.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


@cache
def _revisions() -> tuple[str, ...]:
    """The known revisions, the first one first."""
    scripts = ScriptDirectory.from_config(_config())
    return tuple(script.revision for script in reversed(list(scripts.walk_revisions())))
