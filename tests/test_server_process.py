"""`lowssl-server` as a process: how it starts, how it ends, and how it stands clients that do not behave."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
from serving_app import add_version, command, make_registry, photo, serving, settings_for

from server.access.keys import create_key
from server.registry.registry import open_registry


def _run(*command: str, cwd: Path | None = None) -> tuple[int, str, str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd, check=False)
    return done.returncode, done.stdout, done.stderr


def test_an_empty_folder_is_enough_and_an_import_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with serving(folder, poll_seconds=0.1) as server:
        for line in ("/docs", f"lowssl registry import default --data-dir {folder}", "/embed"):
            assert line in server.greeting
        status, body = server.embed()
        assert (status, body["code"]) == (503, "no_model")
        registry = open_registry(settings_for(folder))
        add_version(registry, tmp_path)
        registry.close()
        server.wait_for("lowssl_ready", 1)
        assert server.embed()[1]["version"] == "v1"
        assert server.stop(signal.SIGINT) == 0
    with serving(folder) as server:
        assert "v1 serves" in server.greeting


def test_the_serving_process_does_without_torch(tmp_path: Path) -> None:
    make_registry(tmp_path / "data")
    with serving(tmp_path / "data") as server:
        assert server.embed()[0] == 200
        maps = Path(f"/proc/{server.process.pid}/maps")
        if not maps.exists():
            pytest.skip("this system does not show a process's libraries")
        assert "libtorch" not in maps.read_text()


def test_when_told_to_stop_it_answers_what_it_has_begun(tmp_path: Path) -> None:
    make_registry(tmp_path / "data")
    with serving(tmp_path / "data") as server:
        body = photo(0)
        slow = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        slow.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:100])
        server.wait_for("lowssl_in_flight", 1)
        server.process.send_signal(signal.SIGTERM)
        _wait_until_refused(server.port)
        slow.sendall(body[100:])
        answer = http.client.HTTPResponse(slow)
        answer.begin()
        assert (answer.status, answer.headers["X-Lowssl-Version"]) == (200, "v1")
        answer.close()
        slow.close()
        assert server.process.wait(30) == 0


def _wait_until_refused(port: int) -> None:
    deadline = time.monotonic() + 20
    with contextlib.suppress(ConnectionRefusedError):
        while time.monotonic() < deadline:
            socket.create_connection(("127.0.0.1", port)).close()
            time.sleep(0.02)


def test_the_demonstrations_encoder_is_imported_and_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = tmp_path / "demo" / "run" / "encoder.safetensors"
    demo.parent.mkdir(parents=True)
    demo.write_bytes((resources.files("lowssl_core") / "weights" / "default.safetensors").read_bytes())
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "data", "--demo") as server:
        assert "importing demo/run/encoder.safetensors" in server.greeting
        assert "v1 serves" in server.greeting
        status, body = server.embed()
        assert (status, body["version"], body["dimension"]) == (200, "v1", 256)
    with serving(tmp_path / "data", "--demo") as server:  # a second time there is nothing to import
        assert "importing" not in server.greeting


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "70000"], "--port 70000: expected a whole number, 0 to 65,535"),
        (["--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid"),
        (["--config", "none.toml"], "--config none.toml: No such file or directory"),
        (["--data-dir", "file"], "file"),
        (["--demo"], "there is no demo/run/encoder.safetensors here; `make demo` makes it"),
    ],
)
def test_what_the_user_can_mend_is_one_line(tmp_path: Path, flags: list[str], said: str) -> None:
    (tmp_path / "file").write_text("")
    status, out, errors = _run(*command(tmp_path / "data", *flags), cwd=tmp_path)
    assert (status, out, errors.count("\n")) == (2, "", 1), errors
    assert errors.startswith("lowssl-server: ")
    assert said in errors


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, _, errors = _run(*command(tmp_path / "data", "--port", str(port)))
    assert status == 2
    assert errors == (
        f"lowssl-server: cannot listen at 127.0.0.1, port {port}: "
        "something listens there already; --port takes another one\n"
    )


def test_off_loopback_a_key_is_needed_and_the_terminal_says_how_to_make_one(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    settings = make_registry(folder)
    with serving(folder, "--host", "0.0.0.0") as server:
        assert f"lowssl keys create --role embed --data-dir {folder}" in server.greeting
        assert server.embed()[0] == 401
        registry = open_registry(settings)
        _, text = create_key(registry.database, role="embed")
        registry.close()
        assert server.embed(Authorization=f"Bearer {text}")[0] == 200
        assert server.stop() == 0


def test_a_client_that_leaves_frees_its_place(tmp_path: Path) -> None:
    make_registry(tmp_path / "data")
    with serving(tmp_path / "data", max_in_flight=1) as server:
        before_the_body = socket.create_connection(("127.0.0.1", server.port))
        before_the_body.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n...")
        server.wait_for("lowssl_in_flight", 1)
        assert server.embed()[0] == 503
        before_the_body.close()
        server.wait_for("lowssl_in_flight", 0)

        body = json.dumps({"images": [_large()] * 64}).encode()
        while_it_waits = socket.create_connection(("127.0.0.1", server.port))
        while_it_waits.sendall(
            b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % len(body)
        )
        while_it_waits.sendall(body)
        server.wait_for("lowssl_in_flight", 1)
        while_it_waits.close()
        server.wait_for("lowssl_in_flight", 0)
        server.wait_for("lowssl_waiting_images", 0)
        assert server.embed()[0] == 200
        assert server.figures()['lowssl_requests_total{route="/embed",status="499"}'] == 2
        assert "Traceback" not in server.log.read_text()


def _large() -> str:
    import base64

    return base64.b64encode(photo(0, (3000, 2000), "WEBP")).decode()


def test_a_body_over_the_limit_is_cut_off(tmp_path: Path) -> None:
    make_registry(tmp_path / "data")
    with serving(tmp_path / "data", max_body_bytes=100_000) as server:
        with contextlib.closing(server.connect()) as connection:
            connection.request("POST", "/embed", iter([b"x" * 50_000] * 20), {"Content-Type": "image/jpeg"})
            answer = connection.getresponse()
            assert (answer.status, answer.headers["Connection"]) == (413, "close")
            assert json.loads(answer.read())["code"] == "too_large"
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as claims:
            claims.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000000\r\n\r\n")
            assert claims.recv(1000).startswith(b"HTTP/1.1 413 ")
        # Who waits to be told to go on is told at once not to.
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as polite:
            polite.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 200000\r\n\r\n")
            assert polite.recv(1000).startswith(b"HTTP/1.1 413 ")
        assert server.embed()[0] == 200
        sent = server.figures()['lowssl_requests_total{route="/embed",status="413"}']
        assert sent == 3


def test_who_sends_too_slowly_loses_the_place(tmp_path: Path) -> None:
    make_registry(tmp_path / "data")
    with serving(tmp_path / "data", max_in_flight=1, request_seconds=0.5) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as slow:
            slow.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert server.embed()[0] == 200


def test_a_request_of_too_many_headers_is_refused(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "data") as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as client,
    ):
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                client.sendall(b"x" * 10_000)
                time.sleep(0.001)
            assert client.recv(1000).startswith(b"HTTP/1.1 431 ")
        with contextlib.closing(server.connect()) as connection:
            connection.request("GET", "/healthz")
            assert connection.getresponse().status == 200


def test_under_overload_every_answer_is_200_or_says_when_to_come_back(tmp_path: Path) -> None:
    make_registry(tmp_path / "data")
    with serving(tmp_path / "data", max_in_flight=3) as server:
        statuses: Counter[int] = Counter()
        body = photo(0, (1600, 1200))

        def call() -> None:
            with contextlib.closing(server.connect()) as connection:
                for _ in range(20):
                    connection.request("POST", "/embed", body, {"Content-Type": "image/jpeg"})
                    answer = connection.getresponse()
                    answer.read()
                    statuses[answer.status] += 1
                    assert answer.status == 200 or int(answer.headers["Retry-After"]) >= 1

        threads = [threading.Thread(target=call) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 503}
        assert sum(statuses.values()) == 24 * 20  # no call ended in an error of the connection
        server.wait_for("lowssl_in_flight", 0)
        assert server.embed()[0] == 200
