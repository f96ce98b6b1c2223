"""The device's front door: joining over real TLS, settings by name, one agent a folder, and what status tells."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization

from client.arrivals import Arrivals, ArrivalsConfig
from client.config import CapsConfig, load_config
from client.folder import Joined, locked, write_joined
from client.identity import open_identity
from client.main import main
from client.node import Node
from client.running import _keep_to
from client.showing import describe, look
from lowssl_core.errors import UserError
from lowssl_core.files import remove_unfinished
from lowssl_core.processes import KeptProcess
from server.federation.certificates import Certificate, open_certificate

TOKEN = "lowssl-join-secret"


def device_of(public_key: str) -> str:
    """What a server calls a device."""
    key = serialization.load_ssh_public_key(public_key.encode())
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()[:32]


@dataclass
class Site:
    """A server that follows the contract of joining, and what it was asked."""

    certificate: Certificate
    port: int
    bodies: list[dict[str, str]] = field(default_factory=list)
    news: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    address: str | None = None
    fixed: tuple[int, bytes] | None = None
    busy: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(self.certificate.path.read_text())).hexdigest()

    def answer(self, path: str, body: dict[str, str]) -> tuple[int, bytes]:
        if self.fixed:
            return self.fixed
        if self.busy:
            self.busy -= 1
            return 503, b'{"detail": "the federation is not up; try again"}'
        if path.endswith("/news"):
            self.news.setdefault(path.split("/")[3], []).append(body)
            return 200, b"{}"
        if path != "/v1/devices":
            return 404, b"{}"
        self.bodies.append(body)
        if body["token"] != TOKEN:
            return 401, b'{"detail": "no"}'
        device = device_of(body["public_key"])
        is_known = device in self.devices
        self.devices.append(device)
        answer = {"device": device, "name": body["name"], "address": self.address}
        return 409 if is_known else 201, json.dumps(answer).encode()


@contextlib.contextmanager
def site_at(folder: Path, hosts: tuple[str, ...] = ("127.0.0.1",)) -> Iterator[Site]:
    certificate = open_certificate(folder, "server", hosts)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, data = site.answer(self.path, json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            for name, value in site.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Those who only want to see the certificate leave without a request."""

    server = Server(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.path, certificate.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    site = Site(certificate, server.server_port)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_at(tmp_path / "server") as site:
        yield site


def join(folder: Path, site: Site, *more: str, token: str = TOKEN) -> int:
    return main(["join", site.url, "--token", token, "--folder", str(folder), "--name", "kitchen", *more])


# Joining


def test_joining_pins_the_server_and_registers_the_key_and_again_is_harmless(tmp_path, site, capsys):
    folder = tmp_path / "device"
    for _ in range(2):
        assert join(folder, site) == 0
        told = capsys.readouterr().out
        assert site.fingerprint in told.replace(":", "").lower()
        assert f"kitchen ({site.devices[0]}) has joined {site.url}" in told
    assert len(set(site.devices)) == 1
    assert site.bodies[0].keys() == {"token", "public_key", "name"}
    assert (folder / "server.pem").read_text() == site.certificate.path.read_text()
    assert json.loads((folder / "joined.json").read_text()) == {
        "url": site.url,
        "address": f"127.0.0.1:{site.port}",
        "certificate": "server.pem",
        "device": site.devices[0],
        "name": "kitchen",
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert TOKEN not in "".join(path.read_text(errors="replace") for path in folder.iterdir())


def test_a_server_can_name_another_address_for_its_rounds(tmp_path, site):
    site.address = "fleet.example:9000"
    assert join(tmp_path / "device", site) == 0
    assert json.loads((tmp_path / "device" / "joined.json").read_text())["address"] == "fleet.example:9000"


def test_a_token_that_is_not_taken_leaves_nothing_joined(tmp_path, site, capsys):
    assert join(tmp_path / "device", site, token="old") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "wrong, expired or used up" in error
    assert not (tmp_path / "device" / "joined.json").exists()
    assert join(tmp_path / "device", site) == 0


def test_another_fingerprint_is_refused_before_the_token_is_sent_and_both_are_shown(tmp_path, site, capsys):
    assert join(tmp_path / "device", site, "--fingerprint", "AB" * 32) == 2
    error = capsys.readouterr().err
    assert site.fingerprint in error
    assert "ab" * 32 in error
    assert site.bodies == []
    shown = ":".join(site.fingerprint[index : index + 2].upper() for index in range(0, 64, 2))  # as openssl writes it
    assert join(tmp_path / "device", site, "--fingerprint", shown) == 0
    assert join(tmp_path / "device", site, "--fingerprint", "abc") == 2
    assert "64 hexadecimal digits" in capsys.readouterr().err


def test_a_renewed_certificate_is_taken_only_with_its_fingerprint(tmp_path, site, capsys):
    folder = tmp_path / "device"
    assert join(folder, site) == 0
    other = open_certificate(tmp_path / "other", "server", ["127.0.0.1"])
    shutil.copy(other.path, folder / "server.pem")  # as if the server had shown that one at first
    capsys.readouterr()
    assert join(folder, site) == 2
    error = capsys.readouterr().err
    assert hashlib.sha256(ssl.PEM_cert_to_DER_cert(other.path.read_text())).hexdigest() in error
    assert site.fingerprint in error
    assert join(folder, site, "--fingerprint", site.fingerprint) == 0


def test_an_authority_is_trusted_in_place_of_a_certificate(tmp_path, site, capsys):
    folder = tmp_path / "device"
    assert join(folder, site, "--ca", str(site.certificate.path)) == 0
    assert json.loads((folder / "joined.json").read_text())["certificate"] == "authority.pem"
    other = open_certificate(tmp_path / "other", "server", ["127.0.0.1"])
    assert join(tmp_path / "second", site, "--ca", str(other.path)) == 2
    assert "not trusted" in capsys.readouterr().err
    assert len(site.bodies) == 1
    for wrong in (tmp_path / "missing.pem", site.certificate.key):
        assert join(tmp_path / "third", site, "--ca", str(wrong)) == 2
        assert str(wrong) in capsys.readouterr().err


def test_a_certificate_for_another_host_is_refused_with_the_reason(tmp_path, capsys):
    with site_at(tmp_path / "server", ("elsewhere.example",)) as site:
        assert join(tmp_path / "device", site) == 2
    assert "not valid for '127.0.0.1'" in capsys.readouterr().err
    assert site.bodies == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://127.0.0.1:1", "cannot be reached"),
        ("http://127.0.0.1:1", "https://HOST:PORT"),
        ("127.0.0.1:1", "https://HOST:PORT"),
        ("https://127.0.0.1:notaport", "https://HOST:PORT"),
        ("https://127.0.0.1:1/path", "https://HOST:PORT"),
    ],
)
def test_where_no_server_is_one_line_says_so(tmp_path, capsys, url, said):
    assert main(["join", url, "--token", "x", "--folder", str(tmp_path / "device")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, b"", "takes no devices"),
        (422, b'{"detail": "name is too long"}', "422 name is too long"),
        (500, b"<html>", "answered 500"),
        (201, b"[]", "answered 201"),
        (201, b'{"device": "somebody else"}', "its key says"),
    ],
)
def test_a_server_that_answers_otherwise_is_quoted(tmp_path, site, capsys, status, body, said):
    site.fixed = (status, body)
    assert join(tmp_path / "device", site) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "device" / "joined.json").exists()


def test_a_server_that_is_starting_is_waited_for_and_the_token_comes_by_standard_input(
    tmp_path, site, capsys, monkeypatch
):
    site.busy, site.headers = 2, {"Retry-After": "1"}
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TOKEN}\n"))
    assert join(tmp_path / "device", site, token="-") == 0
    told = capsys.readouterr()
    assert told.err == (
        f"lowssl-client join: 127.0.0.1:{site.port} is not ready (503 the federation is not up; try again):"
        " waiting for up to 60 seconds\n"
    )
    assert "has joined" in told.out
    assert [body["token"] for body in site.bodies] == [TOKEN]
    assert join(tmp_path / "other", site, token="-") == 2
    assert "--token -: no token came on standard input" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("headers", [{"Retry-After": "5"}, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, {}])
def test_a_server_that_stays_busy_is_given_up_with_its_own_words(tmp_path, site, capsys, monkeypatch, headers):
    monkeypatch.setattr("client.joining._PATIENCE_SECONDS", 2.0)  # a minute else
    site.busy, site.headers = 1000, headers
    assert join(tmp_path / "device", site) == 2
    error = capsys.readouterr().err
    assert error == f"lowssl-client join: 127.0.0.1:{site.port} answered 503 the federation is not up; try again\n"
    assert site.busy == 999, "it did not ask again beyond its patience"


def test_a_device_belongs_to_one_server(tmp_path, site, capsys):
    assert join(tmp_path / "device", site) == 0
    assert main(["join", "https://127.0.0.1:1", "--token", TOKEN, "--folder", str(tmp_path / "device")]) == 2
    assert f"has joined {site.url}" in capsys.readouterr().err


# Running


def test_running_needs_a_server_and_images(tmp_path, site, capsys):
    folder = tmp_path / "device"
    assert main(["run", "--images", str(tmp_path), "--folder", str(folder)]) == 2
    assert "no server joined yet" in capsys.readouterr().err
    assert join(folder, site) == 0
    # A disk that is not mounted yet: systemd tries again, as it does not after 2.
    assert main(["run", "--images", str(tmp_path / "none"), "--folder", str(folder)]) == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_a_second_agent_is_refused_with_the_first_ones_process(tmp_path, site, capsys):
    folder = tmp_path / "device"
    assert join(folder, site) == 0
    with locked(folder):
        assert main(["run", "--images", str(tmp_path), "--folder", str(folder)]) == 2
    assert f"an agent runs already in {folder} (process {os.getpid()})" in capsys.readouterr().err
    with locked(folder):
        pass


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("colour = 1", "unknown key colour; the file has images, learner, conditions, caps"),
        ("[learner.memory]\nmax_byte = 1", "unknown key learner.memory.max_byte"),
        ("[caps]\nthreads = 0", "caps.threads is 0; it is a whole number from 1"),
        ("[caps]\nniceness = 20", "caps.niceness is 20"),
        ("[caps]\nbytes_per_second = 19_999", "caps.bytes_per_second is 19999; it is a whole number from 20,000"),
        ("[caps]\nthreads = 'all'", "caps.threads is 'all'; it is a whole number"),
        ("[conditions.quiet_hours]\nstart = 'late'", "conditions.quiet_hours.start is 'late'"),
        ("rescan_seconds = 0", "rescan_seconds is 0"),
        ("rescan_seconds = 1e300", "up to 86,400"),
        ('[conditions.quiet_hours]\nstart = "22:00+02:00"', "it is a local time of day"),
        ('[conditions.metered]\nfile = "metered"', "it is an absolute path, or empty"),
        ("= 1", "not TOML"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(tmp_path, text, said):
    path = tmp_path / "device.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).startswith(f"--config {path}: ")
    assert said in str(error.value)


def test_settings_may_be_absent_or_partial(tmp_path):
    path = tmp_path / "device.toml"
    path.write_text("[learner.memory]\nmax_bytes = 5_000_000\n")
    assert load_config(path).learner.memory.max_bytes == 5_000_000
    assert load_config(path).conditions == load_config(None).conditions
    with pytest.raises(UserError, match="No such file"):
        load_config(tmp_path / "missing.toml")


# Status


def test_status_tells_what_the_folder_knows_while_no_agent_runs(tmp_path, site, capsys):
    folder, images = tmp_path / "device", tmp_path / "images"
    images.mkdir()
    assert join(folder, site) == 0
    cv2.imwrite(str(images / "good.png"), np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8))
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff" + b"x" * 200)
    with Arrivals(images, folder, ArrivalsConfig(settle_seconds=0)) as arrivals:
        arrivals.rescan()
    capsys.readouterr()
    assert main(["pause", "--folder", str(folder)]) == 0
    assert main(["status", "--folder", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "not running, paused" in told
    assert "2 files: 1 new, 0 learned from, 1 set aside" in told
    assert "broken.jpg: " in told
    assert "0 answered" in told
    assert "news" not in told
    assert main(["resume", "--folder", str(folder)]) == 0
    capsys.readouterr()
    assert main(["status", "--json", "--folder", str(folder)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["agent"] is None
    assert facts["paused"] is False
    assert facts["joined"]["url"] == site.url
    assert facts["images"]["new"] == 1


def test_status_tells_what_the_server_was_told_and_what_keeps_it_from_being_told_more(tmp_path):
    (tmp_path / "news.json").write_text('{"new_images": 1200, "at": "2026-05-04T12:00:00.000+00:00"}')
    facts = look(tmp_path)
    now = datetime(2026, 5, 4, 12, 5, tzinfo=UTC)
    assert "news        the server was told of 1,200 new images 5 minutes ago\n" in describe(facts, now)
    facts["agent"] = {"stage": "idle", "pid": 7, "waiting": [], "news": {"trouble": "away"}}
    assert "5 minutes ago\n            not told since: away\n" in describe(facts, now)
    assert "news        not told: away\n" in describe({**facts, "news": {}}, now)


def test_an_image_that_is_gone_is_not_counted_as_new(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (48, 48, 3), np.uint8)
        cv2.imwrite(str(images / f"{index}.png"), pixels)
    with Arrivals(images, tmp_path / "device", ArrivalsConfig(settle_seconds=0)) as arrivals:
        arrivals.rescan()
        (images / "0.png").unlink()
        arrivals.rescan()
        assert arrivals.counts().new == len(arrivals.new(10)) == 2


def test_commands_without_a_device_say_so(tmp_path, capsys):
    for command in ("status", "pause", "resume"):
        assert main([command, "--folder", str(tmp_path / "none")]) == 2
        assert "there is no such folder" in capsys.readouterr().err


def test_pausing_takes_a_device(tmp_path, capsys):
    for command in ("pause", "resume"):
        assert main([command, "--folder", str(tmp_path)]) == 2
        assert "no server joined yet" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["https://a..b:1", f"https://{'a' * 70}.example:1", "https://a:0"])
def test_hosts_and_ports_that_cannot_be_are_one_line(tmp_path, capsys, url):
    assert main(["join", url, "--token", "x", "--folder", str(tmp_path / "device")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_user_without_a_home_gives_a_folder(tmp_path, capsys, monkeypatch):
    for name in ("HOME", "XDG_STATE_HOME", "LOWSSL_CLIENT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", nobody)
    assert main(["status"]) == 2
    assert "this user has no home: give --folder, or $LOWSSL_CLIENT_DIR" in capsys.readouterr().err
    assert main(["status", "--folder", str(tmp_path)]) == 0


def nobody(path):
    raise RuntimeError("Could not determine home directory.")


def test_a_name_that_is_no_text_and_an_agent_that_does_not_answer_are_shown(tmp_path):
    facts = look(tmp_path) | {"problem": "the agent at x did not answer in 10 s"}
    facts["images"] = {
        "files": 1,
        "new": 0,
        "learned": 0,
        "set_aside": 1,
        "reasons": {os.fsdecode(b"caf\xe9.jpg"): "cut"},
    }
    text = describe(facts)
    text.encode("utf-8")
    assert "caf\N{REPLACEMENT CHARACTER}.jpg: cut" in text
    assert "agent       the agent at x did not answer in 10 s" in text


CONNECTED = ["INFO : Starting Flower SuperNode", "INFO : SuperNode ID: 7"]
AWAY = ["INFO : Connection attempt failed, retrying in 2.31 seconds"]


@pytest.mark.parametrize(
    ("lines", "trouble"),
    [
        ([], "not connected yet"),
        (CONNECTED, ""),
        ([*CONNECTED, "WARNING : a message failed", "INFO : Received message"], ""),
        ([*CONNECTED, *AWAY], "not connected: INFO : Connection attempt failed, retrying in 2.31 seconds"),
        ([*CONNECTED, *50 * AWAY, "INFO : Connection successful after 99.10 seconds and 51 tries."], ""),
        ([*CONNECTED, *AWAY, *CONNECTED], ""),
        ([CONNECTED[0], *AWAY], "not connected: INFO : Connection attempt failed, retrying in 2.31 seconds"),
        (600 * ["INFO : Received message"], ""),  # its beginning is longer ago than anybody looks
    ],
)
def test_a_connection_is_open_until_flower_says_that_it_tries_again(tmp_path, monkeypatch, lines, trouble):
    monkeypatch.setattr(KeptProcess, "pid", 1)
    node = Node("127.0.0.1:1", open_identity(tmp_path), tmp_path)
    node.process.log.parent.mkdir(exist_ok=True)
    node.process.log.write_text("\n".join(lines))
    assert node.trouble() == trouble


def test_memory_caps_that_cannot_be_are_one_line():
    for limit in (2_000_000, 2**63):
        with pytest.raises(UserError, match=rf"caps\.memory_bytes is {limit:,}; "):
            _keep_to(CapsConfig(memory_bytes=limit, niceness=0))


def test_what_a_kill_left_half_written_goes_away(tmp_path):
    for name in (".learner.safetensors.a1b2c3_9", ".rounds.json.abcdefgh"):
        (tmp_path / name).write_bytes(b"half")
    kept = ["learner.safetensors", ".hidden", "replies"]
    (tmp_path / kept[0]).write_bytes(b"whole")
    (tmp_path / kept[1]).write_bytes(b"a person's")
    (tmp_path / kept[2]).mkdir()
    remove_unfinished(tmp_path)
    remove_unfinished(tmp_path / "not there")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_running_removes_what_a_kill_left_of_the_state_and_of_replies(tmp_path, site):
    folder = tmp_path / "device"
    assert join(folder, site) == 0
    left = [folder / ".learner.safetensors.a1b2c3_9", folder / "replies" / f".{64 * 'a'}.abcdefgh"]
    reply = folder / "replies" / (64 * "a")
    reply.parent.mkdir()
    for path in (*left, reply):
        path.write_bytes(b"half")
    run = ["run", "--images", str(tmp_path), "--folder", str(folder), "--config", str(tmp_path / "missing.toml")]
    with locked(folder):  # another agent may be in the middle of a write
        assert main(run) == 2
        assert all(path.exists() for path in left)
    assert main(run) == 2
    assert not any(path.exists() for path in left)
    assert reply.exists()


def test_looking_and_pausing_load_nothing_heavy(tmp_path):
    write_joined(tmp_path, Joined(url="https://a:1", address="a:1", certificate="server.pem", device="d", name="n"))
    program = (
        "import sys; from client.main import main; "
        f"main(['pause', '--folder', {str(tmp_path)!r}]); main(['status', '--folder', {str(tmp_path)!r}]); "
        "sys.exit(bool({'torch', 'numpy', 'cv2', 'flwr', 'cryptography'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert (tmp_path / "paused").exists()
