"""One request and its answer: an id, the time, a line in the log, a figure in the metrics, and no error that leaks."""

import contextlib
import itertools
import re
import secrets
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import FilteringBoundLogger

from server.telemetry.metrics import Metrics

_SCOPE_KEY = "lowssl.exchange"
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
# How long what a refused client still sends is thrown away before its connection is closed.
_LINGER_SECONDS = 2.0


@dataclass(kw_only=True)
class Exchange:
    """What becomes known of a request while it is answered, for its line in the log.

    Attributes:
        request_id: the client's X-Request-ID if it is short and plain, else made here.
        images: how many the request held.
        bytes_in: of the body, as far as it was read.
        version: which answered.
        key: the name of the caller's API key.
        body_read: whether the body was received to its end.
    """

    request_id: str
    images: int = 0
    bytes_in: int = 0
    version: str = ""
    key: str = ""
    body_read: bool = False
    started: float = field(default_factory=time.perf_counter)

    @staticmethod
    def of(scope: MutableMapping[str, Any]) -> "Exchange":
        """The exchange that a request belongs to."""
        exchange = scope[_SCOPE_KEY]
        assert isinstance(exchange, Exchange)
        return exchange


class Telemetry:
    """ASGI middleware around everything else: makes the `Exchange` and tells of it when the answer has gone.

    An exception becomes a plain 500 with the request's id; its traceback goes to the log alone.

    Args:
        app: everything else.
        metrics: counts requests.
        log: gets a line for each.
        fault: makes the answer to a request whose handling raised.
        max_body_bytes: what a refused request has left of a shorter body is still received, to keep its connection.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        log: FilteringBoundLogger,
        fault: Callable[[Scope], ASGIApp],
        max_body_bytes: int,
    ) -> None:
        self._app = app
        self._fault = fault
        self._metrics = metrics
        self._log = log
        self._max_body_bytes = max_body_bytes
        self._ids = _RequestIds()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"] if name in _HEADERS_READ}
        exchange = scope[_SCOPE_KEY] = Exchange(request_id=self._ids.choose(headers.get(b"x-request-id", b"")))
        answer = _Answer(exchange, headers, receive, send, self._max_body_bytes)
        try:
            await self._app(scope, answer.receive, answer.send)
        except ClientDisconnect:
            pass  # nobody is there to hear an answer
        except Exception:
            self._log.exception("error", request_id=exchange.request_id, path=scope["path"])
            if answer.status:
                raise  # half of an answer has gone: only closing the connection can tell
            await self._fault(scope)(scope, answer.receive, answer.send)
        finally:
            self._tell(scope, exchange, answer.status)

    def _tell(self, scope: Scope, exchange: Exchange, status: int) -> None:
        seconds = time.perf_counter() - exchange.started
        route = getattr(scope.get("route"), "path", "other")
        status = status or 499  # nginx's word for a client that left
        self._metrics.count_request(route, status, seconds)
        self._log.info(
            "request",
            request_id=exchange.request_id,
            method=scope["method"],
            route=route,
            status=status,
            ms=round(seconds * 1000, 2),
            images=exchange.images,
            bytes_in=exchange.bytes_in,
            version=exchange.version,
            key=exchange.key,
        )


_HEADERS_READ = (b"x-request-id", b"content-length", b"transfer-encoding")


class _Answer:
    """`receive` and `send` of one request, watched."""

    def __init__(
        self, exchange: Exchange, headers: dict[bytes, bytes], receive: Receive, send: Send, max_body_bytes: int
    ) -> None:
        self.status = 0
        self._exchange = exchange
        self._receive, self._send = receive, send
        length = headers.get(b"content-length", b"0")
        self._is_bounded = b"transfer-encoding" not in headers and length.isdigit() and int(length) <= max_body_bytes
        self._max_body_bytes = max_body_bytes
        self._closes = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._exchange.bytes_in += len(message.get("body", b""))
            self._exchange.body_read = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message["headers"], (b"x-request-id", self._exchange.request_id.encode())]
            if not self._exchange.body_read and not self._is_bounded:
                self._closes = True
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        elif self._closes and not message.get("more_body", False):
            # Closing a socket with unread data resets it, and the client would lose the answer that it has not read.
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _linger(self) -> None:
        """Throw away what still comes, for a moment."""
        left = self._max_body_bytes
        with contextlib.suppress(TimeoutError), anyio.fail_after(_LINGER_SECONDS):
            while left > 0:
                message = await self._receive()
                left -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return


class _RequestIds:
    """Ids that no other process or start makes; asking the system for chance each time would yield to other threads."""

    def __init__(self) -> None:
        self._start = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    def choose(self, given: bytes) -> str:
        """The client's own, if it is sane, or a new one."""
        return given.decode() if _SANE_ID.fullmatch(given) else f"{self._start}-{next(self._numbers)}"
