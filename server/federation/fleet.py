"""The public way to the SuperLink: devices' calls passed through as streams, bounded, and nothing else of Flower's."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

MAX_BODY = 8 * 2**20
"""Bytes of a call: Flower cuts what it sends into pieces of 5 MiB."""

CALLS = frozenset(
    {
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    }
)
"""Of Flower's fleet API. Without those by which a device would register itself: a person registers devices."""

# To the SuperLink, beside Flower's own: what is called with. Signatures are over the time alone.
_REQUEST_HEADERS = frozenset({"content-type", "content-length", "accept", "user-agent"})
_FLOWER = "flwr-"
_DROPPED = frozenset({"connection", "keep-alive", "transfer-encoding", "server", "date"})
_MAX_CALLS = 64
_PIECE_SECONDS = 30.0  # that a piece of a call's body may take to arrive
_ANSWER_SECONDS = 60.0


class FleetPassage:
    """Passes devices' calls on to a SuperLink.

    Flower's client tries again after 502, 503 and 504, and gives up after anything else, its heartbeat too, for good:
    what may mend itself is answered with those. That is also an error of the SuperLink's own (500): its disk is full.

    Args:
        address: of the SuperLink, "127.0.0.1:PORT".
        certificate: that it shows.
        max_calls: passed on at a time; more are answered 503.
    """

    def __init__(self, address: str, certificate: Path, *, max_calls: int = _MAX_CALLS) -> None:
        context = ssl.create_default_context(cafile=str(certificate))
        self._client = httpx.AsyncClient(
            base_url=f"https://{address}",
            verify=context,
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=5.0),
            limits=httpx.Limits(max_connections=max_calls, max_keepalive_connections=max_calls),
            trust_env=False,  # a proxy of the environment is none for this machine
        )
        self._free = max_calls

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections to the SuperLink."""
        await self._client.aclose()

    async def pass_on(self, request: Request) -> Response:
        """The SuperLink's answer to a call, or what is wrong with it: 404, 411, 413, 408, 502, 503, 504."""
        call = request.path_params["call"]
        if call not in CALLS:
            raise HTTPException(404)
        length = request.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):
            raise HTTPException(411)
        if int(length) > MAX_BODY:
            raise HTTPException(413, f"a call has at most {MAX_BODY} bytes", headers={"connection": "close"})
        if self._free <= 0:
            raise HTTPException(503, "too many calls at a time", headers={"retry-after": "2"})
        self._free -= 1
        try:
            answer = await self._send(call, request)
        except BaseException:
            self._free += 1
            raise
        return StreamingResponse(
            self._body(answer),
            status_code=answer.status_code,
            headers={name: value for name, value in answer.headers.items() if name not in _DROPPED},
        )

    async def _send(self, call: str, request: Request) -> httpx.Response:
        headers = {
            name: value
            for name, value in request.headers.items()
            if name in _REQUEST_HEADERS or name.startswith(_FLOWER)
        }
        passed = self._client.build_request("POST", f"/v1/fleet/{call}", headers=headers, content=_pieces(request))
        try:
            answer = await self._client.send(passed, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            raise HTTPException(503, "the federation is not up", headers={"retry-after": "2"}) from None
        except httpx.TimeoutException:
            raise HTTPException(504) from None
        except httpx.TransportError:
            raise HTTPException(502) from None
        if answer.status_code == 500:
            await answer.aclose()
            raise HTTPException(503, "the federation cannot do this now", headers={"retry-after": "2"})
        return answer

    async def _body(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        try:
            async for piece in answer.aiter_raw():
                yield piece
        finally:
            self._free += 1
            await answer.aclose()


def fleet_route(passage: Callable[[Request], FleetPassage]) -> Route:
    """The one public route: POST /v1/fleet/CALL.

    Args:
        passage: gives the passage of a request, made when the application starts.
    """

    async def pass_on(request: Request) -> Response:
        return await passage(request).pass_on(request)

    endpoint: Callable[[Request], Awaitable[Response]] = pass_on
    return Route("/v1/fleet/{call}", endpoint, methods=["POST"], include_in_schema=False)


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """A call's body as it arrives; the server before us holds it to its announced length."""
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(_PIECE_SECONDS):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise HTTPException(408, headers={"connection": "close"}) from None
        except ClientDisconnect:
            raise HTTPException(400) from None  # nobody hears it
        yield piece
