"""Who may join and who has: tokens that expire, and devices with the names that people know them by."""

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import select

from lowssl_core.errors import UserError
from server.database.engine import Database
from server.database.tables import DeviceRow, JoinTokenRow

PREFIX = "lowssl-join-"
LONGEST_NAME = 100
MOST_USES = 1_000_000
LONGEST_KEY = 1000
CLOCKS_SECONDS = 300.0
"""By which a device's clock may differ from the server's."""

_TOKEN = re.compile(PREFIX + r"([0-9a-f]{12})-[0-9a-f]{64}")


class BadTokenError(UserError):
    """A token that does not exist, has expired, or was used as often as it may be."""


class BadNewsError(UserError):
    """News of a device that it did not sign, or not lately."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that has joined.

    Attributes:
        id: 32 hexadecimal digits of its public key's sha256.
        name: for people.
        joined: when; aware, UTC.
        node: Flower's id of it; None until Flower was told.
        new_images: that it had not learned from when it last told.
        told: when that was; None if it never did.
    """

    id: str
    name: str
    joined: datetime
    node: int | None
    new_images: int = 0
    told: datetime | None = None


def create_token(database: Database, *, name: str = "", uses: int = 1, hours: float = 24.0) -> str:
    """A new token, which cannot be had a second time.

    Args:
        database: the registry's.
        name: what it is for.
        uses: how many devices may join by it.
        hours: until it expires.

    Raises:
        UserError: a name that a table could not show, no number of uses, or no time.
    """
    check_name(name)
    if not 1 <= uses <= MOST_USES:
        raise UserError(f"{uses} uses; expected 1 to {MOST_USES:,}")
    if not 0 < hours <= 24 * 366:
        raise UserError(f"{hours:g} hours; expected more than 0, up to a year")
    id_ = secrets.token_hex(6)
    text = f"{PREFIX}{id_}-{secrets.token_hex(32)}"
    now = datetime.now(UTC)
    row = JoinTokenRow(
        id=id_, hash=_hash(text), name=name, uses_left=uses, created=now, expires=now + timedelta(hours=hours)
    )
    with database.write() as session:
        session.add(row)
    return text


def check_name(name: str) -> None:
    """Refuse a name that a log or a table could not show, with a UserError."""
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise UserError(f"the name {name[:20]!r}: expected up to {LONGEST_NAME} printable characters")


def device_id(public_key: str) -> str:
    """The id of the device with this public key, one line in OpenSSH's format.

    Raises:
        UserError: not such a key, or another kind than devices have.
    """
    der = _load(public_key).public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()[:32]


def join(
    database: Database, *, token: str, public_key: str, name: str, register: Callable[[str, str], int]
) -> tuple[Device, bool]:
    """Let a device in; returns it, and whether it is new. One that has joined before uses up nothing.

    The device is written down before Flower is told: killed between the two, joining again tells it.

    Args:
        database: the registry's.
        token: as the device was given it.
        public_key: the device's, one line in OpenSSH's format.
        name: for people.
        register: tells Flower of a public key and a name; gives Flower's id of the device.

    Raises:
        BadTokenError: see there.
        UserError: no such key, a name that cannot be shown, or Flower did not take it: the token's use is given back.
    """
    token_id = _known_token(database, token)  # first: who guesses learns nothing else, and does not make us write
    check_name(name)
    id_ = device_id(public_key.strip())
    key = " ".join(public_key.split()[:2])  # without the comment, which may say who made it
    found = _admit(database, token_id, id_, key, name)
    if found.node is not None:
        return found, False
    try:
        node = register(key, name or id_)
    except UserError:
        _forget(database, id_)
        raise
    with database.write() as session:
        row = session.get_one(DeviceRow, id_)
        row.node = str(node)
        return _device(row), True


def list_devices(database: Database) -> list[Device]:
    """All devices, those that joined first first."""
    with database.read() as session:
        return [_device(row) for row in session.scalars(select(DeviceRow).order_by(DeviceRow.joined))]


def remove_device(database: Database, id_: str) -> None:
    """Forget a device; with another key it may join again."""
    with database.write() as session:
        row = session.get(DeviceRow, id_)
        if row is not None:
            session.delete(row)


def news_text(device: str, new_images: int, time: str) -> bytes:
    """What a device signs to tell how many images it has not learned from yet; `time` in ISO 8601, UTC."""
    return f"lowssl-news\n{device}\n{new_images}\n{time}".encode()


def hear(database: Database, *, device: str, new_images: int, time: str, signature: str) -> None:
    """Write down what a device tells of its new images.

    Args:
        database: the registry's.
        device: its id.
        new_images: that it has not learned from.
        time: when it said so, ISO 8601, UTC; older than what it told last is not heard again.
        signature: base64 of its key's ECDSA signature (SHA-256, DER) over `news_text`.

    Raises:
        BadNewsError: no such device, another signature, or another time than now, give or take five minutes.
    """
    try:
        told = datetime.fromisoformat(time)
        raw = base64.b64decode(signature, validate=True)
    except (ValueError, binascii.Error):
        raise BadNewsError("the time is no ISO 8601, or the signature no base64") from None
    with database.read() as session:
        row = session.get(DeviceRow, device)
    if row is None:
        raise BadNewsError("this device has not joined")
    try:
        _load(row.public_key).verify(raw, news_text(device, new_images, time), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise BadNewsError("the signature is not this device's") from None
    if told.tzinfo is None or abs((datetime.now(UTC) - told).total_seconds()) > CLOCKS_SECONDS:
        raise BadNewsError(f"the time is {time}; the device's clock is wrong, or this was said long ago")
    with database.write() as session:
        row = session.get_one(DeviceRow, device)
        if row.told is None or told > row.told:
            row.new_images, row.told = new_images, told


def _admit(database: Database, token_id: str, id_: str, public_key: str, name: str) -> Device:
    """The device's row, made for a use of the token unless there is one."""
    with database.write() as session:
        held = session.get_one(JoinTokenRow, token_id)
        row = session.get(DeviceRow, id_)
        if row is not None and row.token == held.id:
            return _device(row)
        if held.expires < datetime.now(UTC):
            raise BadTokenError(f"this token expired at {held.expires:%Y-%m-%d %H:%M} UTC")
        if row is not None:
            return _device(row)
        if held.uses_left < 1:
            raise BadTokenError("this token was used as often as it may be")
        held.uses_left -= 1
        row = DeviceRow(
            id=id_,
            name=name or id_[:12],
            public_key=public_key,
            token=held.id,
            joined=datetime.now(UTC),
            node=None,
            new_images=0,
            told=None,
        )
        session.add(row)
        session.flush()
        return _device(row)


def _known_token(database: Database, token: str) -> str:
    match = _TOKEN.fullmatch(token)
    with database.read() as session:
        held = None if match is None else session.get(JoinTokenRow, match[1])
        if held is None or not hmac.compare_digest(held.hash, _hash(token)):
            raise BadTokenError("this token is not known")
        return held.id


def _forget(database: Database, id_: str) -> None:
    with database.write() as session:
        row = session.get_one(DeviceRow, id_)
        session.get_one(JoinTokenRow, row.token).uses_left += 1
        session.delete(row)


def _load(public_key: str) -> ec.EllipticCurvePublicKey:
    accepted = "expected ecdsa-sha2-nistp384 and base64, as lowssl-client makes it"
    if len(public_key) > LONGEST_KEY or len(public_key.splitlines()) != 1:
        raise UserError(f"the public key is not one line of up to {LONGEST_KEY} characters; {accepted}")
    try:
        key = serialization.load_ssh_public_key(public_key.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"the public key is not in OpenSSH's format; {accepted}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise UserError(f"the public key is of another kind; {accepted}")
    return key


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _device(row: DeviceRow) -> Device:
    return Device(
        id=row.id,
        name=row.name,
        joined=row.joined,
        node=None if row.node is None else int(row.node),
        new_images=row.new_images,
        told=row.told,
    )
