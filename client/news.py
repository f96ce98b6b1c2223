"""What a device tells its server of new images, signed: rounds may be ordered by that."""

import base64
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.calls import Server, post
from client.contents import read_facts
from client.identity import Identity
from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically

_LOG = logging.getLogger(__name__)
_SECONDS = 10.0
# A camera's images come one by one.
_MORE_AFTER = timedelta(minutes=10)
# A server forgets what it was told before its last round; a device that was not in it says it again.
_SAME_AFTER = timedelta(hours=1)
_FIRST_PAUSE, _LONGEST_PAUSE = 60.0, 3600.0  # after a failure


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a server has heard.

    Attributes:
        new_images: that had not been learned from.
        at: when; aware.
    """

    new_images: int
    at: datetime


def is_worth_telling(told: Told | None, new_images: int, now: datetime) -> bool:
    """Whether a server is to be told of so many new images: fewer at once, more or as many after a while.

    Args:
        told: what it has heard last; None: nothing yet, which is as good as 0.
        new_images: that were not learned from.
        now: the time, aware.
    """
    if told is None:
        return new_images > 0
    # A clock that was set back makes everything old.
    age = now - told.at if now >= told.at else timedelta.max
    if new_images < told.new_images:
        return True
    if new_images > told.new_images:
        return age >= _MORE_AFTER
    return new_images > 0 and age >= _SAME_AFTER


class News:
    """Tells a server how many images there are to learn from, when that is worth it.

    A failure is a line in the log, and tried again after one, two, four minutes, up to an hour.

    Args:
        server: whom to tell.
        certificate: that the server's is checked by.
        identity: the device's.
        path: of the file that remembers what was told last.
        clock: seconds, for the pauses.
    """

    def __init__(
        self,
        server: Server,
        certificate: Path,
        identity: Identity,
        path: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server, self._certificate, self._identity, self._path = server, certificate, identity, path
        self._clock = clock
        self._told = _read(path)
        self._trouble = ""
        self._failures, self._not_before = 0, -math.inf

    def status(self) -> dict[str, Any]:
        """Why the server could not be told since, "" if it could. Called from another thread."""
        return {"trouble": self._trouble}

    def tell(self, new_images: int) -> None:
        """Tell the server, if it is time to.

        Args:
            new_images: that the device could learn from now.
        """
        now = datetime.now(UTC)
        if self._clock() < self._not_before or not is_worth_telling(self._told, new_images, now):
            return
        try:
            self._send(new_images, now)
        except (UserError, OSError) as error:
            self._trouble = str(error)
            self._not_before = self._clock() + min(_FIRST_PAUSE * 2**self._failures, _LONGEST_PAUSE)
            self._failures += 1
            _LOG.warning("the server was not told of %d new images: %s", new_images, error)
        else:
            self._trouble, self._failures = "", 0
            _LOG.info("told the server of %d new images", new_images)

    def _send(self, new_images: int, now: datetime) -> None:
        moment = now.isoformat(timespec="milliseconds")
        signature = _sign(self._identity, f"lowssl-news\n{self._identity.device}\n{new_images}\n{moment}".encode())
        answer = post(
            self._server,
            self._certificate,
            f"/v1/devices/{self._identity.device}/news",
            {"new_images": new_images, "time": moment, "signature": signature},
            seconds=_SECONDS,
        )
        if answer.status != 200:
            raise UserError(f"{self._server.address} answered {answer.said}")
        self._told = Told(new_images=new_images, at=now)
        text = json.dumps({**dataclasses.asdict(self._told), "at": moment})
        write_atomically(self._path, lambda file: file.write(text.encode()))


def _read(path: Path) -> Told | None:
    """What was told last; None where nothing is known of it."""
    facts = read_facts(path)
    try:
        told = Told(new_images=int(facts["new_images"]), at=datetime.fromisoformat(facts["at"]))
    except (KeyError, ValueError, TypeError):
        return None
    return told if told.at.tzinfo else None


def _sign(identity: Identity, text: bytes) -> str:
    """ECDSA with SHA-256 in DER, base64."""
    key = serialization.load_ssh_private_key(identity.path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey), "identities are opened by `open_identity`"
    return base64.b64encode(key.sign(text, ec.ECDSA(hashes.SHA256()))).decode()
