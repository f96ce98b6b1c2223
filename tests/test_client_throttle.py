"""The cap on bandwidth: kept in each direction over all connections, to one server alone, with bounded memory."""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import client.throttle
from client.identity import open_identity
from client.node import Node
from client.throttle import Throttle

PATIENCE = 120.0
RATE = 200_000
PLENTY = 100_000_000


@contextmanager
def server(family: int = socket.AF_INET, host: str = "127.0.0.1") -> Iterator[socket.socket]:
    with socket.create_server((host, 0), family=family) as listener:
        listener.settimeout(PATIENCE)
        yield listener


@contextmanager
def limited() -> Iterator[tuple[socket.socket, Throttle]]:
    """A server, and the way to it."""
    with server() as listener, Throttle(f"127.0.0.1:{port_of(listener)}", RATE) as throttle:
        yield listener, throttle


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def connect(throttle: Throttle) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(throttle.url.rpartition(":")[2])), PATIENCE)


@contextmanager
def asked(throttle: Throttle, request: str) -> Iterator[tuple[socket.socket, str]]:
    """A connection to the proxy, and the first line of its answer to a request; "" where it left."""
    with connect(throttle) as connection:
        answer = b""
        with contextlib.suppress(ConnectionError):
            connection.sendall(request.encode("latin-1"))
            while not answer.endswith(b"\r\n\r\n") and (data := connection.recv(1)):
                answer += data
        yield connection, answer.decode().partition("\r\n")[0]


def answer_to(throttle: Throttle, request: str) -> str:
    with asked(throttle, request) as (_, said):
        return said


@contextmanager
def opened(throttle: Throttle, listener: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection through the proxy: the device's and the server's."""
    request = f"CONNECT 127.0.0.1:{port_of(listener)} HTTP/1.1\r\nHost: x\r\n\r\n"
    with asked(throttle, request) as (device, said), listener.accept()[0] as served:
        assert said == "HTTP/1.1 200 Connection established"
        served.settimeout(PATIENCE)
        yield device, served


def read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        assert piece, "the other side left"
        data += piece
    return data


def send(connection: socket.socket, data: bytes) -> threading.Thread:
    thread = threading.Thread(target=connection.sendall, args=(data,), daemon=True)
    thread.start()
    return thread


def test_what_passes_is_whole_and_no_faster_than_the_cap_in_each_direction() -> None:
    sent = bytes(range(256)) * 400
    with limited() as (listener, throttle), opened(throttle, listener) as ends:
        for source, sink in (ends, reversed(ends)):
            began = time.monotonic()
            send(source, sent)
            assert read(sink, len(sent)) == sent
            assert time.monotonic() - began >= len(sent) / RATE


def test_connections_share_the_cap() -> None:
    sent = bytes(60_000)
    with (
        limited() as (listener, throttle),
        opened(throttle, listener) as first,
        opened(throttle, listener) as second,
    ):
        began = time.monotonic()
        for device, _ in (first, second):
            send(device, sent)
        for _, served in (first, second):
            assert read(served, len(sent)) == sent
        assert time.monotonic() - began >= 2 * len(sent) / RATE


def test_nobody_but_the_server_is_reached() -> None:
    with limited() as (listener, throttle), server() as other:
        for request, status in (
            (f"CONNECT 127.0.0.1:{port_of(other)} HTTP/1.1\r\n\r\n", 403),
            (f"CONNECT localhost:{port_of(listener)} HTTP/1.1\r\n\r\n", 403),
            ("CONNECT example.org HTTP/1.1\r\n\r\n", 403),
            (f"CONNECT example.org:{'9' * 5000} HTTP/1.1\r\n\r\n", 403),
            (f"GET http://127.0.0.1:{port_of(listener)}/ HTTP/1.1\r\n\r\n", 405),
            ("\xff\xfe\r\n\r\n", 405),
            ("CONNECT 127.0.0.1" + "x" * 8192, 400),
        ):
            assert answer_to(throttle, request).split()[1:2] == [str(status)], request[:60]
        for listening in (listener, other):
            listening.settimeout(0.2)
            with pytest.raises(TimeoutError):
                listening.accept()


@pytest.mark.parametrize(
    ("family", "host", "name", "request_"),
    [
        (socket.AF_INET6, "::1", "[::1]", "[::1]"),
        (socket.AF_INET6, "::1", "[::1]", "::1"),  # as httpcore writes it
        (socket.AF_INET, "127.0.0.1", "LocalHost", "localhost"),
    ],
)
def test_names_and_addresses_of_the_sixth_version_are_understood(
    family: socket.AddressFamily, host: str, name: str, request_: str
) -> None:
    with (
        server(family, host) as listener,
        Throttle(f"{name}:{port_of(listener)}", RATE) as throttle,
        asked(throttle, f"CONNECT {request_}:{port_of(listener)} HTTP/1.1\r\n\r\n") as (_, said),
        listener.accept()[0],
    ):
        assert said.endswith("established")


def test_an_end_on_one_side_is_one_on_the_other() -> None:
    with limited() as (listener, throttle):
        with opened(throttle, listener) as (device, served):
            send(served, b"the last words").join()
            served.close()
            assert read(device, 14) == b"the last words"
            assert device.recv(1) == b""
        with opened(throttle, listener) as (device, served):
            device.close()
            assert served.recv(1) == b""
        with opened(throttle, listener) as (device, served):
            served.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            served.close()  # reset
            with contextlib.suppress(ConnectionResetError):
                assert device.recv(1) == b""


def test_a_server_out_of_reach_is_a_connection_that_breaks() -> None:
    # Flower tries again after that, and gives up after an answer.
    with server() as listener:
        port = port_of(listener)
    with Throttle(f"127.0.0.1:{port}", RATE) as throttle:
        assert answer_to(throttle, f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n") == ""
    with Throttle(f"{'x' * 80}.example:1", RATE) as throttle:  # a name that DNS cannot hold
        assert answer_to(throttle, f"CONNECT {'x' * 80}.example:1 HTTP/1.1\r\n\r\n") == ""


def test_a_receiver_that_takes_nothing_holds_its_sender_up_and_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.throttle, "_STALL_SECONDS", 1.0)
    offered = bytes(64_000_000)
    with server() as listener:
        # Inherited by what is accepted; else the kernel takes megabytes for whoever does not read them.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        with Throttle(f"127.0.0.1:{port_of(listener)}", PLENTY) as throttle, opened(throttle, listener) as (device, _):
            taken = 0
            with contextlib.suppress(ConnectionError):
                while taken < len(offered):
                    taken += device.send(offered[taken:])
            # In kernels' buffers; of what the proxy holds, a piece at most.
            assert taken < 20_000_000


def test_more_connections_than_flower_opens_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.throttle, "_MAX_CONNECTIONS", 1)
    with limited() as (listener, throttle):
        request = f"CONNECT 127.0.0.1:{port_of(listener)} HTTP/1.1\r\n\r\n"
        with opened(throttle, listener):
            assert answer_to(throttle, request) == ""
        deadline = time.monotonic() + PATIENCE
        while not (said := answer_to(throttle, request)):  # until the first one's end is noticed
            assert time.monotonic() < deadline
        assert said.endswith("established")


def test_what_is_under_way_does_not_keep_it_from_ending() -> None:
    with server() as listener, contextlib.ExitStack() as stack:
        with Throttle(f"127.0.0.1:{port_of(listener)}", RATE) as throttle:
            stack.enter_context(connect(throttle))  # and says nothing
            device, served = stack.enter_context(opened(throttle, listener))
        for end in (device, served):
            assert end.recv(1) == b""


_COUNT_PARTS = """
import os
from flwr.app import Array
array = Array(dtype="uint8", shape=(2_500_000,), stype="bytes", data=os.urandom(2_500_000))
print("parts:", len(array.children), flush=True)
"""


@pytest.mark.parametrize(("rate", "parts"), [(None, 3), (100_000, 5)])
def test_flower_sends_in_parts_that_are_through_long_before_it_gives_them_up(
    tmp_path: Path, rate: int | None, parts: int
) -> None:
    with contextlib.ExitStack() as stack:
        throttle = None if rate is None else stack.enter_context(Throttle("127.0.0.1:1", rate))
        node = Node("127.0.0.1:1", open_identity(tmp_path), tmp_path, throttle=throttle)
        node.process.command = [sys.executable, "-c", _COUNT_PARTS]
        stack.enter_context(node)
        deadline = time.monotonic() + PATIENCE
        while "parts: " not in node.process.tail():
            assert time.monotonic() < deadline, node.process.tail()
            time.sleep(0.1)
    assert f"parts: {parts}" in node.process.tail().splitlines()
