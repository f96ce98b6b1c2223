"""A cap on bandwidth: a small proxy on this machine that lets Flower reach the server, and nothing else, slowly."""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

MIN_BYTES_PER_SECOND = 20_000
"""Below that Flower's own messages, of which there are some each three seconds, leave nothing for a model."""

_HOST = "127.0.0.1"
_MAX_CONNECTIONS = 32  # Flower's SuperNode opens a handful
_MAX_REQUEST = 8192
_OPEN_SECONDS = 20.0  # for a request and the connection to the server: Flower's own patience is 30
_STALL_SECONDS = 60.0  # that a piece may take to be taken
_LEAST_BUFFER, _MOST_BUFFER = 2**14, 2**20
_LEAST_PIECE, _MOST_PIECE = 2**10, 2**18
_LOG = logging.getLogger(__name__)


class Bucket:
    """So many bytes a second, for all that ask: first come, first served, and nothing is saved up.

    Args:
        bytes_per_second: the cap.
    """

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._free_at = 0.0

    async def take(self, count: int) -> None:
        """Come back when so many bytes may pass."""
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + count / self._rate
        await asyncio.sleep(self._free_at - now)


class Throttle:
    """An HTTP proxy on 127.0.0.1 that knows CONNECT to one server alone, and holds each direction to a cap.

    The cap is on what the connections carry, TLS included, all of them together. What is waiting is held back at its
    sender: here is a piece of a twentieth of a second for each connection and direction, and in the kernel as much as
    passes in a second. A connection that breaks on one side, or whose receiver takes nothing for a minute, is ended on
    both.

    Args:
        address: of the server, "HOST:PORT".
        bytes_per_second: the cap.

    Attributes:
        bytes_per_second: the cap.
        url: of the proxy.
    """

    def __init__(self, address: str, bytes_per_second: int) -> None:
        self.bytes_per_second = bytes_per_second
        self._server = _parse(address)
        self._up, self._down = Bucket(bytes_per_second), Bucket(bytes_per_second)
        self._piece = min(max(bytes_per_second // 20, _LEAST_PIECE), _MOST_PIECE)
        self._buffer = min(max(bytes_per_second, _LEAST_BUFFER), _MOST_BUFFER)
        self._listener = socket.create_server((_HOST, 0))
        # Inherited by what is accepted. Left alone, the kernel takes in megabytes, and Flower waits for the answer to
        # what has not been sent yet.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer)
        self._listener.setblocking(False)
        self.url = f"http://{_HOST}:{self._listener.getsockname()[1]}"
        self._num_connections = 0
        self._loop = asyncio.new_event_loop()
        self._serving: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="throttle", daemon=True)

    def __enter__(self) -> Self:
        self._serving = self._loop.create_task(self._accept())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._serving is not None, "it was entered"
        self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        assert self._serving is not None, "it was entered"
        with contextlib.closing(self._loop), contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._serving)

    async def _accept(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    connection, _ = await self._loop.sock_accept(self._listener)
                except OSError as error:  # no file descriptor is free
                    _LOG.warning("the proxy cannot accept a connection: %s", error)
                    await asyncio.sleep(1.0)
                    continue
                if self._num_connections == _MAX_CONNECTIONS:
                    connection.close()
                    continue
                self._num_connections += 1
                group.create_task(self._carry(connection))

    async def _carry(self, flower: socket.socket) -> None:
        """Do all for one connection, until it ends on either side."""
        try:
            # A server that is out of reach shows as a connection that breaks, which Flower tries again for ever;
            # an answer of 502 would make it give up.
            with flower, contextlib.suppress(OSError, UnicodeError):  # the latter: no name that DNS can hold
                async with asyncio.timeout(_OPEN_SECONDS):
                    refusal = await self._hear(flower)
                    if refusal:
                        await self._loop.sock_sendall(flower, refusal)
                        return
                    server = await self._connect()
                with server:
                    await self._loop.sock_sendall(flower, b"HTTP/1.1 200 Connection established\r\n\r\n")
                    await _until_one_ends(self._pass(flower, server, self._up), self._pass(server, flower, self._down))
        finally:
            self._num_connections -= 1

    async def _hear(self, flower: socket.socket) -> bytes:
        """Read a request; returns what to answer where it is not the one that is let through, else nothing."""
        request = b""
        while b"\r\n\r\n" not in request:
            data = await self._loop.sock_recv(flower, _MAX_REQUEST - len(request))
            if not data:  # it left, or says more than a request does
                return b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
            request += data
        method, _, rest = request.partition(b" ")
        if method != b"CONNECT":
            return b"HTTP/1.1 405 Method Not Allowed\r\nAllow: CONNECT\r\nContent-Length: 0\r\n\r\n"
        if _parse(rest.partition(b" ")[0].decode("latin-1")) != self._server:
            return b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
        return b""

    async def _connect(self) -> socket.socket:
        """A connection to the server, at the first of its addresses that takes it.

        Raises:
            OSError: none does.
        """
        host, port = self._server
        failure = OSError(f"{host} has no address")
        for family, kind, protocol, _, address in await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            server = socket.socket(family, kind, protocol)
            try:
                server.setblocking(False)
                server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer)
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await self._loop.sock_connect(server, address)
            except OSError as error:
                server.close()
                failure = error
            except BaseException:
                server.close()
                raise
            else:
                return server
        raise failure

    async def _pass(self, source: socket.socket, sink: socket.socket, bucket: Bucket) -> None:
        while data := await self._loop.sock_recv(source, self._piece):
            await bucket.take(len(data))
            async with asyncio.timeout(_STALL_SECONDS):
                await self._loop.sock_sendall(sink, data)


async def _until_one_ends(*ways: Coroutine[Any, Any, None]) -> None:
    """Run all, until one is done or fails; the others are cut off."""
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _parse(address: str) -> tuple[str, int]:
    """Host, in lower case without brackets, and port of "HOST:PORT"; port 0 where there is none."""
    host, _, port = address.rpartition(":")
    return host.strip("[]").lower(), int(port) if port.isascii() and port.isdigit() and len(port) < 6 else 0
