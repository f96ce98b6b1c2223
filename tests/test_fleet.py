"""The public way to the SuperLink: what passes unharmed, and what is refused before it gets there."""

import asyncio
import os
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.federation import fleet
from server.federation.certificates import Certificate, open_certificate
from server.federation.fleet import CALLS, MAX_BODY, FleetPassage, fleet_route


class SuperLinkStandIn:
    """Answers each call with its own bytes, and remembers what it was asked."""

    def __init__(self) -> None:
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.may_answer = threading.Event()
        self.may_answer.set()

    async def answer(self, request: Request) -> Response:
        body = await request.body()
        self.paths.append(request.url.path)
        self.headers.append(dict(request.headers))
        while not self.may_answer.is_set():
            await asyncio.sleep(0.01)
        status = {b"unknown": 401, b"full disk": 500}.get(body, 200)
        return Response(body, status_code=status, media_type="application/protobuf", headers={"flwr-version": "1.41.0"})


@contextmanager
def serve(app: Starlette, certificate: Certificate) -> Iterator[str]:
    config = uvicorn.Config(
        app, ssl_certfile=str(certificate.path), ssl_keyfile=str(certificate.key), ws="none", log_level="warning"
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def public(address: str, certificate: Certificate, *, max_calls: int = 64) -> Starlette:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with FleetPassage(address, certificate.path, max_calls=max_calls) as app.state.passage:
            yield

    return Starlette(routes=[fleet_route(lambda request: request.app.state.passage)], lifespan=lifespan)


@contextmanager
def client_of(app: Starlette, certificate: Certificate) -> Iterator[httpx.Client]:
    context = ssl.create_default_context(cafile=str(certificate.path))
    with (
        serve(app, certificate) as address,
        httpx.Client(base_url=f"https://{address}", verify=context, trust_env=False, timeout=20) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return open_certificate(tmp_path_factory.mktemp("certificates"), "superlink", ["127.0.0.1"])


@pytest.fixture
def superlink() -> SuperLinkStandIn:
    return SuperLinkStandIn()


@pytest.fixture
def address(superlink: SuperLinkStandIn, certificate: Certificate) -> Iterator[str]:
    app = Starlette(routes=[Route("/{path:path}", superlink.answer, methods=["POST"])])
    with serve(app, certificate) as address:
        yield address


@pytest.fixture
def device(address: str, certificate: Certificate) -> Iterator[httpx.Client]:
    with client_of(public(address, certificate), certificate) as client:
        yield client


@pytest.mark.parametrize("call", sorted(CALLS))
def test_a_device_s_call_passes_with_its_signature_and_nothing_else(
    device: httpx.Client, superlink: SuperLinkStandIn, call: str
) -> None:
    body = os.urandom(100_000)
    headers = {"flwr-public-key": "k", "flwr-signature": "s", "flwr-timestamp": "t", "authorization": "secret"}
    answer = device.post(f"/v1/fleet/{call}", content=body, headers=headers | {"cookie": "c"})
    assert (answer.status_code, answer.content) == (200, body)
    assert answer.headers["flwr-version"] == "1.41.0"
    (passed,) = superlink.headers
    assert superlink.paths == [f"/v1/fleet/{call}"]
    assert (passed["flwr-public-key"], passed["flwr-signature"], passed["flwr-timestamp"]) == ("k", "s", "t")
    assert "authorization" not in passed
    assert "cookie" not in passed


def test_a_refusal_of_the_superlink_comes_back_as_it_is(device: httpx.Client) -> None:
    assert device.post("/v1/fleet/pull-messages", content=b"unknown").status_code == 401


def test_an_error_of_the_superlink_s_own_is_something_to_wait_for(device: httpx.Client) -> None:
    refused = device.post("/v1/fleet/send-node-heartbeat", content=b"full disk")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    assert device.post("/v1/fleet/send-node-heartbeat", content=b"x").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e%2fcontrol%2fstart-run",
        "/v1/control/start-run",
        "/v1/runtime/push-messages",
        "/v1/fleet/PULL-MESSAGES",
    ],
)
def test_nothing_else_passes(device: httpx.Client, superlink: SuperLinkStandIn, path: str) -> None:
    assert device.post(path, content=b"x", follow_redirects=False).status_code in (307, 404)
    assert superlink.paths == []


def test_bodies_are_bounded_and_must_say_their_length(device: httpx.Client, superlink: SuperLinkStandIn) -> None:
    url = "/v1/fleet/push-object"
    assert device.post(url, content=bytes(MAX_BODY + 1)).status_code == 413
    assert device.post(url, content=iter([b"x"])).status_code == 411
    assert superlink.paths == []
    assert device.post(url, content=bytes(MAX_BODY)).status_code == 200


def test_too_many_calls_at_a_time_are_sent_away_for_a_moment(
    address: str, certificate: Certificate, superlink: SuperLinkStandIn
) -> None:
    superlink.may_answer.clear()
    with client_of(public(address, certificate, max_calls=2), certificate) as client:
        threads = [threading.Thread(target=client.post, args=("/v1/fleet/pull-messages",)) for _ in range(2)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        while len(superlink.paths) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = client.post("/v1/fleet/pull-messages")
        superlink.may_answer.set()
        for thread in threads:
            thread.join()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert client.post("/v1/fleet/pull-messages").status_code == 200


def test_a_superlink_that_is_away_is_something_to_wait_for(certificate: Certificate) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with client_of(public(f"127.0.0.1:{port}", certificate), certificate) as client:
        assert client.post("/v1/fleet/pull-messages", content=b"x").status_code == 503


def test_a_body_that_does_not_arrive_is_given_up(
    address: str, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "_PIECE_SECONDS", 0.2)
    with serve(public(address, certificate), certificate) as public_address:
        host, _, port = public_address.rpartition(":")
        context = ssl.create_default_context(cafile=str(certificate.path))
        plain = socket.create_connection((host, int(port)), timeout=20)
        with context.wrap_socket(plain, server_hostname=host) as connection:
            connection.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_another_certificate_than_the_superlink_s_own_is_not_trusted(
    address: str, certificate: Certificate, tmp_path: Path
) -> None:
    other = open_certificate(tmp_path, "other", ["127.0.0.1"])
    with client_of(public(address, other), certificate) as client:
        assert client.post("/v1/fleet/pull-messages", content=b"x").status_code == 503
