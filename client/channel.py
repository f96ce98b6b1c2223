"""The agent's Unix socket: one question and one answer a connection, each a JSON header and bytes, both bounded."""

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lowssl_core.errors import UserError

MAX_HEADER = 2**16
MAX_BODY = 2**33
"""Bytes of one message's body: above any model that the manifest allows."""

_PREFIX = struct.Struct(">4sIQ")  # magic, length of the header, length of the body
_MAGIC = b"LAG1"
_PIECE = 2**20


class ChannelError(OSError):
    """The other side cannot be reached, left, or speaks another language; the message is one line."""


class NobodyListensError(ChannelError):
    """No agent runs on this folder."""


@dataclass(frozen=True)
class Frame:
    """What goes one way over the channel.

    Attributes:
        header: a JSON object.
        body: anything.
    """

    header: Mapping[str, Any]
    body: bytes = field(default=b"", repr=False)


Answer = Callable[[Frame], Frame]


def ask(path: Path, question: Frame, *, seconds: float | None = None) -> Frame:
    """Ask the agent that listens at `path`, and wait for its answer.

    Args:
        path: the socket.
        question: what to ask.
        seconds: how long the answer may take; None: as long as the agent lives.

    Raises:
        NobodyListensError: nobody listens there.
        ChannelError: the other side left or took too long, or the answer is malformed.
    """
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connection:
        connection.settimeout(seconds)
        try:
            with _short(path) as name:
                connection.connect(name)
        except OSError as error:
            raise NobodyListensError(f"no agent listens at {path} ({error.strerror or error})") from None
        try:
            write_frame(connection, question)
            return read_frame(connection)
        except TimeoutError:
            raise ChannelError(f"the agent at {path} did not answer in {seconds:g} s") from None
        except ChannelError:
            raise
        except OSError as error:
            raise ChannelError(f"the agent at {path} left ({error.strerror or error})") from None


class Listener:
    """Answers questions at a Unix socket, each connection in a thread of its own.

    The socket's folder is made private to this user: whoever may connect may do all that the agent can do.

    Args:
        path: where to listen; what an agent that died has left there is replaced.
        answer: gives the answer; an exception closes the connection without one.
        seconds: how long a question may take to arrive, and a piece of an answer to be taken.
    """

    def __init__(self, path: Path, answer: Answer, *, seconds: float = 30.0) -> None:
        self.path = path
        self._answer = answer
        self._seconds = seconds
        self._socket = _listen(path)
        self._thread = threading.Thread(target=self._accept, name="listener", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take no more questions; those being answered go on."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._thread.join()
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            try:
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
            except RuntimeError:  # no memory for a thread; whoever asked may ask again
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.closing(connection):
            connection.settimeout(self._seconds)
            # Whoever asked has left, speaks another language, or sends more than there is memory for.
            with contextlib.suppress(OSError, MemoryError):
                write_frame(connection, self._answer(read_frame(connection)))


def write_frame(connection: socket.socket, frame: Frame) -> None:
    """Send a frame.

    Raises:
        ChannelError: it is larger than frames may be.
        OSError: the other side left.
    """
    header = json.dumps(dict(frame.header), allow_nan=False, separators=(",", ":")).encode()
    if len(header) > MAX_HEADER or len(frame.body) > MAX_BODY:
        raise ChannelError(f"a frame of {len(header)} and {len(frame.body)} bytes is too large to send")
    connection.sendall(_PREFIX.pack(_MAGIC, len(header), len(frame.body)) + header)
    if frame.body:  # nothing can be sent too: to a side that has answered and left, in vain
        connection.sendall(frame.body)


def read_frame(connection: socket.socket) -> Frame:
    """Receive a frame; nothing is allocated for a length that is merely announced.

    Raises:
        ChannelError: what comes is no frame, or is cut.
        OSError: the other side left.
    """
    magic, header_length, body_length = _PREFIX.unpack(_read(connection, _PREFIX.size))
    if magic != _MAGIC or header_length > MAX_HEADER or body_length > MAX_BODY:
        raise ChannelError("what came over the agent's socket is no frame of it")
    try:
        header = json.loads(_read(connection, header_length))
    except (ValueError, RecursionError):
        raise ChannelError("a frame's header is no JSON") from None
    if not isinstance(header, dict):
        raise ChannelError("a frame's header is no object")
    return Frame(header, _read(connection, body_length))


def _read(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = connection.recv(min(length - len(data), _PIECE))
        if not piece:
            raise ChannelError("the other side of the agent's socket left in the middle of a frame")
        data += piece
    return bytes(data)


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A socket by a name of some thirty bytes, for its address has room for 107, and folders may be deep; for Linux.

    Raises:
        OSError: there is no such folder.
    """
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    with _short(path) as name:
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
            try:
                probe.connect(name)  # the kernel takes it, however busy the agent is
            except OSError:
                path.unlink(missing_ok=True)
            else:
                raise UserError(f"an agent runs already at {path}")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(name)
    listener.listen()
    return listener
