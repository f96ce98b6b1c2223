"""Tokens, devices and their news; and the public port of a real server: TLS, joining, what it refuses."""

import base64
import os
import re
import socket
import ssl
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from federation_server import Site, free_port, site
from serving_app import command, photo

from client.identity import open_identity
from lowssl_core.errors import UserError
from server.access.keys import create_key
from server.database.engine import Database
from server.database.tables import DeviceRow, JoinTokenRow
from server.federation.certificates import open_certificate
from server.federation.history import Record
from server.federation.joins import (
    BadNewsError,
    BadTokenError,
    Device,
    create_token,
    device_id,
    hear,
    join,
    list_devices,
    news_text,
)
from server.federation.operation import ScheduleConfig
from server.federation.schedule import is_round_due
from server.federation.superlink import SuperLink, SuperLinkError, registered_devices


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(f"sqlite:///{tmp_path}/registry.sqlite3")) as opened:
        yield opened


def new_key() -> tuple[ec.EllipticCurvePrivateKey, str]:
    key = ec.generate_private_key(ec.SECP384R1())
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return key, line.decode()


class Flower:
    """Takes devices' keys, as often as each comes."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def register(self, public_key: str, name: str) -> int:
        self.keys.append(public_key)
        return 2**64 - len(self.keys)  # Flower's ids are that large


@pytest.mark.parametrize("uses", [0, -1, 10**7, 10**20])
def test_uses_of_a_token_that_cannot_be_are_refused(database: Database, uses: int) -> None:
    with pytest.raises(UserError, match="expected 1 to 1,000,000"):
        create_token(database, uses=uses)


@pytest.mark.parametrize("hours", [0.0, 1e13, float("nan"), float("inf")])
def test_hours_that_cannot_be_are_refused(database: Database, hours: float) -> None:
    with pytest.raises(UserError, match="up to a year"):
        create_token(database, hours=hours)
    with pytest.raises(ValueError, match="up to 8784"):
        ScheduleConfig(every_hours=hours)


def test_a_token_lets_so_many_devices_in_and_no_more(database: Database) -> None:
    flower, token = Flower(), create_token(database, uses=2)
    keys = [new_key()[1] for _ in range(3)]
    joined = [join(database, token=token, public_key=key, name="a", register=flower.register) for key in keys[:2]]
    assert [is_new for _, is_new in joined] == [True, True]
    with pytest.raises(BadTokenError, match="as often as it may be"):
        join(database, token=token, public_key=keys[2], name="c", register=flower.register)
    assert [device.id for device in list_devices(database)] == [device_id(key) for key in keys[:2]]
    assert list_devices(database)[0].node == 2**64 - 1
    # The same key again is harmless, also when the token is used up, and uses up nothing.
    assert join(database, token=token, public_key=keys[0], name="b", register=flower.register) == (joined[0][0], False)
    assert flower.keys == keys[:2]


@pytest.mark.parametrize(
    "token", ["", "lowssl-join-", "lowssl-join-000000000000-" + "0" * 64, "x" * 10_000, "lowssl_000000000000_0"]
)
def test_what_is_no_token_is_refused(database: Database, token: str) -> None:
    with pytest.raises(BadTokenError, match="not known"):
        join(database, token=token, public_key=new_key()[1], name="", register=Flower().register)
    good = create_token(database)
    with pytest.raises(BadTokenError, match="not known"):
        join(database, token=good[:-1] + "g", public_key=new_key()[1], name="", register=Flower().register)
    assert list_devices(database) == []


def test_an_expired_token_lets_nobody_in_but_who_joined_by_it_may_ask_again(database: Database) -> None:
    flower, token, key = Flower(), create_token(database, uses=2), new_key()[1]
    join(database, token=token, public_key=key, name="", register=flower.register)
    with database.write() as session:
        session.query(JoinTokenRow).one().expires = datetime.now(UTC) - timedelta(seconds=1)
    with pytest.raises(BadTokenError, match="expired at"):
        join(database, token=token, public_key=new_key()[1], name="", register=flower.register)
    assert join(database, token=token, public_key=key, name="", register=flower.register)[1] is False


def test_where_flower_refuses_the_token_is_not_used_up(database: Database) -> None:
    token, key = create_token(database), new_key()[1]

    def fail(public_key: str, name: str) -> int:
        raise SuperLinkError("it does not answer")

    for _ in range(3):
        with pytest.raises(SuperLinkError):
            join(database, token=token, public_key=key, name="", register=fail)
    assert join(database, token=token, public_key=key, name="", register=Flower().register)[1] is True


def test_a_device_that_flower_was_not_told_of_is_told_of_when_it_joins_again(database: Database) -> None:
    flower, token, key = Flower(), create_token(database), new_key()[1]
    join(database, token=token, public_key=key, name="", register=flower.register)
    with database.write() as session:  # as after a kill between the two
        session.query(DeviceRow).one().node = None
    assert join(database, token=token, public_key=key, name="", register=flower.register)[1] is True
    assert flower.keys == [key, key]


def test_many_at_once_get_no_more_uses_than_there_are(database: Database) -> None:
    flower, token, counted = Flower(), create_token(database, uses=3), Counter[str]()

    def call() -> None:
        try:
            join(database, token=token, public_key=new_key()[1], name="", register=flower.register)
            counted["in"] += 1
        except BadTokenError:
            counted["out"] += 1

    threads = [threading.Thread(target=call) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted == {"in": 3, "out": 9}
    assert len(list_devices(database)) == 3


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("", "not one line"),
        ("ecdsa-sha2-nistp384 AAAA", "not in OpenSSH's format"),
        ("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIF6tR/9kVVxJfkGZHLqFM5OX/a/4TnMsVXhyxNRRjRxa", "of another kind"),
        ("a\nb", "not one line"),
        ("x" * 5000, "not one line"),
    ],
)
def test_what_is_no_devices_key_is_refused(database: Database, key: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        join(database, token=create_token(database), public_key=key, name="", register=Flower().register)


def test_news_are_believed_when_the_device_signed_them_just_now(database: Database) -> None:
    private, key = new_key()
    device, _ = join(database, token=create_token(database), public_key=key, name="", register=Flower().register)

    def tell(new_images: int, moment: datetime, signer: ec.EllipticCurvePrivateKey = private) -> None:
        time = moment.isoformat()
        signature = signer.sign(news_text(device.id, new_images, time), ec.ECDSA(hashes.SHA256()))
        hear(
            database,
            device=device.id,
            new_images=new_images,
            time=time,
            signature=base64.b64encode(signature).decode(),
        )

    now = datetime.now(UTC)
    tell(50, now)
    tell(10, now - timedelta(seconds=60))  # a message of earlier, sent again by somebody
    assert list_devices(database)[0].new_images == 50
    with pytest.raises(BadNewsError, match="not this device's"):
        tell(99, now, new_key()[0])
    with pytest.raises(BadNewsError, match="clock"):
        tell(99, now - timedelta(hours=1))
    with pytest.raises(BadNewsError, match="base64"):
        hear(database, device=device.id, new_images=1, time=now.isoformat(), signature="?")
    assert list_devices(database)[0].new_images == 50


def test_a_round_is_due_after_so_many_hours_or_when_enough_devices_have_something_new() -> None:
    now = datetime(2026, 5, 4, 12, tzinfo=UTC)
    hourly, eager = ScheduleConfig(every_hours=1), ScheduleConfig(devices=2, new_images=10)
    never = Record(version=0)
    last = Record(version=1, started=(now - timedelta(minutes=90)).isoformat(), seconds=1200.0)

    def device(new_images: int, minutes: float) -> Device:
        told = now - timedelta(minutes=minutes)
        return Device(id="x", name="x", joined=now, node=1, new_images=new_images, told=told)

    assert is_round_due(hourly, never, [], now)
    assert is_round_due(hourly, last, [], now)  # it ended 70 minutes ago
    assert not is_round_due(hourly, last, [], now - timedelta(minutes=11))
    assert not is_round_due(ScheduleConfig(), last, [device(1000, 1)] * 5, now)
    assert is_round_due(eager, last, [device(10, 1), device(30, 80)], now)
    assert not is_round_due(eager, last, [device(10, 1), device(9, 1)], now)
    assert not is_round_due(eager, last, [device(10, 1), device(30, 100)], now), "told before the last round began"


def test_where_no_server_runs_flower_is_not_quoted(tmp_path: Path) -> None:
    SuperLink(tmp_path)  # what one leaves in the folder
    with pytest.raises(SuperLinkError, match=r"^no server runs the federation$"):
        registered_devices(tmp_path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("site")) as made:
        made.start()
        yield made


def test_openssl_shows_the_fingerprint_that_the_server_prints(server: Site) -> None:
    shown = subprocess.run(
        f"openssl s_client -connect 127.0.0.1:{server.port} </dev/null | openssl x509 -noout -fingerprint -sha256",
        shell=True,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert shown.stdout.strip() == f"sha256 Fingerprint={server.fingerprint}"
    server.lowssl("status")


def test_a_device_joins_over_tls_once(server: Site) -> None:
    identity = server.join("kitchen", server.token())
    with server.client() as client:
        again = client.post(
            "/v1/devices", json={"token": server.token(), "public_key": identity.public, "name": "other"}
        )
        assert again.status_code == 409
        assert again.json() == {"device": identity.device, "name": "kitchen", "address": None}
        listed = client.get("/v1/federation/devices").json()["devices"]
        assert [(row["name"], row["status"]) for row in listed] == [("kitchen", "registered")]
        key = open_identity(server.root / "other").public
        for body, status in (
            ({"token": "no", "public_key": key, "name": "x"}, 401),
            ({"token": server.token(), "public_key": "no", "name": "x"}, 422),
            ({"token": server.token(), "public_key": key, "name": "x\n"}, 422),
            ({"token": server.token(), "public_key": key, "nmae": "x"}, 422),
            ({"token": server.token()}, 422),
        ):
            answer = client.post("/v1/devices", json=body)
            assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), body
        assert client.post("/v1/devices", content="token=x").status_code == 415
        assert client.post("/v1/devices/" + identity.device + "/news", json={}).status_code == 422


def test_a_removed_device_stays_out_until_it_has_another_key(server: Site) -> None:
    identity = server.join("attic", server.token())
    server.lowssl("remove", identity.device)
    with server.client() as client:

        def joined(public_key: str) -> httpx.Response:
            return client.post("/v1/devices", json={"token": server.token(), "public_key": public_key, "name": "attic"})

        def names() -> list[str]:
            return [row["name"] for row in client.get("/v1/federation/devices").json()["devices"]]

        answer = joined(identity.public)
        assert answer.status_code == 422
        assert "from an empty folder it joins with a new key" in answer.json()["detail"]
        assert "attic" not in names()
        anew = open_identity(server.root / "attic anew")
        assert joined(anew.public).status_code == 201
        assert names().count("attic") == 1
        # Flower still lists the old key; it must not be taken for that of a device whose joining was cut off.
        with server.registry() as registry:
            nodes = {device.id: device.node for device in list_devices(registry.database)}
            with registry.database.write() as session:  # as after a kill between Flower's answer and its writing down
                session.get_one(DeviceRow, anew.device).node = None
            assert joined(anew.public).status_code == 201
            assert {device.id: device.node for device in list_devices(registry.database)} == nodes


def test_control_calls_do_not_pass_the_public_port(server: Site) -> None:
    with server.client() as client:
        for path in (
            "/v1/control/start-run",
            "/v1/runtime/get-nodes",
            "/v1/fleet/register-node",
            "/v1/fleet/%2e%2e/control/start-run",
        ):
            assert client.post(path, content=b"x").status_code == 404, path


def test_bodies_stay_within_limits(server: Site) -> None:
    context = ssl.create_default_context(cafile=str(server.folder / "server.pem"))
    for path in ("/v1/fleet/push-object", "/v1/devices", "/embed"):
        plain = socket.create_connection(("127.0.0.1", server.port))
        with context.wrap_socket(plain, server_hostname="localhost") as connection:
            head = (
                f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {10**9}\r\n\r\n"
            )
            connection.sendall(head.encode() + b"x" * 1000)
            assert connection.recv(100).startswith(b"HTTP/1.1 413 "), path


def test_embeddings_are_still_served(server: Site) -> None:
    with server.client() as client:
        assert client.post("/embed", content=photo(0), headers={"content-type": "image/jpeg"}).status_code == 503
        assert client.get("/healthz").status_code == 200


def test_rounds_cannot_be_ordered_before_a_federation_has_begun(server: Site) -> None:
    with server.client() as client:
        assert client.get("/v1/federation").json()["phase"] == "not begun"
        answer = client.post("/v1/federation/rounds", json={"rounds": 1})
        assert (answer.status_code, answer.json()["code"]) == (409, "not_begun")
        assert client.get("/v1/federation/history").json() == {"rounds": []}
        answer = client.post("/v1/federation/devices/nobody/release", json={})
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_device")


def test_a_second_server_on_the_folder_says_so(server: Site) -> None:
    done = subprocess.run(command(server.data, "--federation"), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "another lowssl-server runs the federation" in done.stderr


def test_with_keys_operators_need_one_and_devices_do_not(tmp_path: Path) -> None:
    made = open_certificate(tmp_path, "mine", ["127.0.0.1"])
    config = tmp_path / "settings.toml"
    config.write_text(f'require_keys = true\ntls_certificate = "{made.path}"\ntls_key = "{made.key}"\n')
    with site(tmp_path) as server:
        server.start("--config", str(config))
        shown = made.path.read_bytes()
        assert ssl.get_server_certificate(("127.0.0.1", server.port)).split() == shown.decode().split()
        server.join("kitchen", server.token())
        with server.client() as client:
            assert client.get("/v1/federation").status_code == 401
            unsigned = client.post("/v1/fleet/pull-messages", content=b"")
            assert unsigned.status_code != 404
            assert "API key" not in unsigned.text
            with server.registry() as registry:
                key = create_key(registry.database, role="operate")[1]
                lesser = create_key(registry.database, role="embed")[1]
            assert client.get("/v1/federation", headers={"X-API-Key": lesser}).status_code == 403
            assert client.get("/v1/federation", headers={"X-API-Key": key}).status_code == 200
        assert server.stop() == 0


def test_tls_without_a_federation(tmp_path: Path) -> None:
    made, port = open_certificate(tmp_path, "mine", ["127.0.0.1"]), free_port()
    environment = os.environ | {
        "LOWSSL_SERVER_TLS_CERTIFICATE": str(made.path),
        "LOWSSL_SERVER_TLS_KEY": str(made.key),
        "LOWSSL_SERVER_WORKERS": "1",
    }
    process = subprocess.Popen(
        [*command(tmp_path / "data"), "--port", str(port)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        greeting = ""
        while "API  " not in greeting:
            greeting += process.stdout.readline()
        assert f"https://127.0.0.1:{port}/embed" in greeting
        assert re.search(r"([0-9A-F]{2}:){31}", greeting)
        context = ssl.create_default_context(cafile=str(made.path))
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context, trust_env=False) as client:
            assert client.get("/healthz").status_code == 200
            assert client.post("/v1/devices", json={}).status_code == 404
            assert client.post("/v1/fleet/pull-messages", content=b"").status_code == 404
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"TLS_CERTIFICATE": "a.pem"}, "tls_certificate and tls_key go together: give both or neither"),
        ({"TLS_CERTIFICATE": "a.pem", "TLS_KEY": "a.key"}, "there is no file a.pem"),
        ({"TLS_CERTIFICATE": "junk", "TLS_KEY": "junk"}, "junk and junk cannot be used for TLS"),
        ({"TLS_CERTIFICATE": "one.pem", "TLS_KEY": "two.key"}, "the key is another certificate's"),
        ({"FEDERATION": "perhaps"}, "LOWSSL_SERVER_FEDERATION=perhaps: expected true or false"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path: Path, settings: dict[str, str], said: str) -> None:
    (tmp_path / "junk").write_text("junk")
    for name in ("one", "two"):
        open_certificate(tmp_path, name, ["127.0.0.1"])
    environment = os.environ | {f"LOWSSL_SERVER_{name}": value for name, value in settings.items()}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command(tmp_path / "data"),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
