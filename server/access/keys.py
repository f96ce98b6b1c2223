"""API keys: made of 256 random bits, kept as their hash, and checked from memory that notices a revocation."""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, get_args

from sqlalchemy import select, update

from lowssl_core.errors import UserError
from server.database.engine import Database
from server.database.tables import ApiKeyRow

Role = Literal["embed", "operate", "admin"]
# Each may do what those before it may.
ROLES: tuple[Role, ...] = get_args(Role)

PREFIX = "lowssl_"
LONGEST_NAME = 100
_KEY = re.compile(PREFIX + r"([0-9a-f]{12})_[0-9a-f]{64}")
_FRESH_SECONDS = 1.0
# A key that is not known may be new; who guesses does not make us look more often than this.
_FRESH_SECONDS_OF_UNKNOWN = 0.1
_USE_WRITTEN_SECONDS = 60.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """A key without its secret."""

    id: str
    name: str
    role: Role
    created: datetime
    last_used: datetime | None = None
    revoked: datetime | None = None
    requests_per_minute: int | None = None

    def may(self, role: Role) -> bool:
        """Whether the key's role is at least `role`."""
        return ROLES.index(self.role) >= ROLES.index(role)


def create_key(
    database: Database, *, role: Role, name: str = "", requests_per_minute: int | None = None
) -> tuple[ApiKey, str]:
    """A new key and its text, which cannot be had a second time.

    Raises:
        UserError: a name that a log or a table could not show, or a rate below 1.
    """
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise UserError(f"the name {name[:20]!r}...: expected up to {LONGEST_NAME} printable characters")
    if requests_per_minute is not None and requests_per_minute < 1:
        raise UserError(f"{requests_per_minute} requests a minute; expected at least 1")
    key_id = secrets.token_hex(6)
    text = f"{PREFIX}{key_id}_{secrets.token_hex(32)}"
    key = ApiKey(
        id=key_id,
        name=name or key_id,
        role=role,
        created=datetime.now(UTC),
        requests_per_minute=requests_per_minute,
    )
    with database.write() as session:
        session.add(
            ApiKeyRow(
                id=key.id,
                hash=_hash(text),
                name=key.name,
                role=key.role,
                created=key.created,
                last_used=None,
                revoked=None,
                requests_per_minute=key.requests_per_minute,
            )
        )
    return key, text


def list_keys(database: Database) -> list[ApiKey]:
    """All keys, also revoked ones, oldest first."""
    with database.read() as session:
        return [_key(row) for row in session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created))]


def revoke_key(database: Database, key_id: str) -> ApiKey:
    """Revoke a key; one that is revoked stays so. UserError if there is none of that id."""
    with database.write() as session:
        row = session.get(ApiKeyRow, key_id)
        if row is None:
            raise UserError(f"no key has the id {key_id}; `lowssl keys list` shows them")
        row.revoked = row.revoked or datetime.now(UTC)
        return _key(row)


class KeyRing:
    """Answers whether a text is a key that is good now; used from one event loop.

    All keys are read again when what is known of them is older than a second: guesses cost no look-up, and a
    revocation is noticed. While the database is out of reach, what was known last goes on being so.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._keys: Mapping[str, tuple[str, ApiKey]] = {}
        self._read_at = self._written_at = float("-inf")
        self._used: dict[str, datetime] = {}
        self._lock = asyncio.Lock()

    async def find(self, text: str) -> ApiKey | None:
        """The key whose text this is, or None."""
        match = _KEY.fullmatch(text)
        if match is None:
            return None
        fresh = _FRESH_SECONDS if match[1] in self._keys else _FRESH_SECONDS_OF_UNKNOWN
        if time.monotonic() - self._read_at > fresh:
            async with self._lock:
                if time.monotonic() - self._read_at > fresh:
                    await self._refresh()
        expected, key = self._keys.get(match[1], ("", None))
        if not hmac.compare_digest(expected, _hash(text)) or key is None:
            return None
        self._used[key.id] = datetime.now(UTC)
        return key

    async def close(self) -> None:
        """Write down when keys were used last."""
        await asyncio.to_thread(self._write_use)

    async def _refresh(self) -> None:
        try:
            self._keys = await asyncio.to_thread(self._read)
        except Exception:
            if self._read_at == float("-inf"):
                raise
            _log.exception("API keys cannot be read; those known last still hold")
        self._read_at = time.monotonic()
        if self._used and self._read_at - self._written_at > _USE_WRITTEN_SECONDS:
            self._written_at = self._read_at
            await asyncio.to_thread(self._write_use)

    def _read(self) -> dict[str, tuple[str, ApiKey]]:
        with self._database.read() as session:
            rows = session.scalars(select(ApiKeyRow).where(ApiKeyRow.revoked.is_(None)))
            return {row.id: (row.hash, _key(row)) for row in rows}

    def _write_use(self) -> None:
        used, self._used = self._used, {}
        if not used:
            return
        try:
            with self._database.write() as session:
                for key_id, moment in used.items():
                    session.execute(update(ApiKeyRow).where(ApiKeyRow.id == key_id).values(last_used=moment))
        except Exception:  # knowing when a key was used is not worth failing a request
            _log.exception("the last use of API keys cannot be written")


def _hash(text: str) -> str:
    """SHA-256: a slow hash makes guessing a password dear, but nobody guesses 256 random bits."""
    return hashlib.sha256(text.encode()).hexdigest()


def _key(row: ApiKeyRow) -> ApiKey:
    role = next(role for role in ROLES if role == row.role)
    return ApiKey(
        id=row.id,
        name=row.name,
        role=role,
        created=row.created,
        last_used=row.last_used,
        revoked=row.revoked,
        requests_per_minute=row.requests_per_minute,
    )
