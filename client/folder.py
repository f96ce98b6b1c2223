"""A device's folder: where it is, which server it has joined, and that one agent at a time works on it."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically

VARIABLE = "LOWSSL_CLIENT_DIR"
SOCKET = "agent.sock"
PAUSED = "paused"
TALLY = "rounds.json"
REPLIES = "replies"
NEWS = "news.json"
ARRIVALS = "arrivals.sqlite3"
MEMORY = "memory/memory.sqlite3"
_JOINED = "joined.json"
_LOCK = "lock"


class ImagesAwayError(UserError):
    """The folder of images is not there, or may not be read; a disk that is not mounted yet may be, soon."""

    status = 1


def default_folder() -> Path:
    """$LOWSSL_CLIENT_DIR, or lowssl-client in the place for programs' state, ~/.local/state (XDG).

    Raises:
        UserError: this user has no home.
    """
    if named := os.environ.get(VARIABLE):
        return Path(named)
    try:
        states = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    except RuntimeError:  # no HOME, and no such user
        raise UserError(f"this user has no home: give --folder, or ${VARIABLE}") from None
    return states / "lowssl-client"


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The server that a device belongs to.

    Attributes:
        url: as the person gave it, "https://HOST:PORT".
        address: "HOST:PORT" of the calls that rounds are made of.
        certificate: name of the file in the folder by which the server's is checked.
        device: the device's id.
        name: what people call it.
    """

    url: str
    address: str
    certificate: str
    device: str
    name: str


def read_joined(folder: Path) -> Joined | None:
    """The server that the device in `folder` has joined, None if it has joined none yet.

    Raises:
        UserError: a damaged file.
    """
    path = folder / _JOINED
    try:
        return Joined(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and join again") from None


def write_joined(folder: Path, joined: Joined) -> None:
    """Remember the server."""
    text = json.dumps(dataclasses.asdict(joined), indent=2) + "\n"
    write_atomically(folder / _JOINED, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other agents off the folder; the kernel ends that with this process, however it ends.

    Raises:
        UserError: another one works on it.
    """
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = file.read(20).strip() or "?"
            raise UserError(f"an agent runs already in {folder} (process {owner})") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
