"""A federation on real processes: SuperLink, public port over TLS, SuperNodes with keys, agents; and their deaths."""

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from federation_device import MANIFEST
from starlette.applications import Starlette

from client.identity import open_identity
from lowssl_core.processes import descendants
from server.aggregation.means import FedAvgConfig
from server.federation import orders
from server.federation.certificates import Certificate, open_certificate
from server.federation.federation import Federation, begin
from server.federation.fleet import FleetPassage, fleet_route
from server.federation.history import History, Record
from server.federation.plan import Plan, RoundsConfig
from server.federation.superlink import SuperLinkError

PATIENCE = 600.0
START = np.ones(MANIFEST.size, dtype=np.float32)
NUMBERS = (0.1, 0.3)
PLAN = Plan(
    recipe={"steps": 2},
    rounds=RoundsConfig(seconds=100, down="fp32", up="fp32"),
    aggregator=FedAvgConfig(momentum=0.0),
)
SLOW = {"steps": 20, "seconds": 0.2}


@dataclass
class Site:
    """A server and its devices."""

    root: Path
    federation: Federation
    certificate: Certificate
    port: int
    devices: list[str] = field(default_factory=list)
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.federation.folder

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.certificate.path))

    def start_device(self, name: str, number: float) -> None:
        command = [sys.executable, str(Path(__file__).with_name("federation_device.py")), str(self.root / name)]
        command += [f"127.0.0.1:{self.port}", str(self.certificate.path), str(number)]
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            )

    def kill_device(self, name: str) -> None:
        """As when its power goes: the agent and everything beside it, at once."""
        process = self.processes.pop(name)
        for pid in (process.pid, *descendants(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def plan(self, **recipe: object) -> None:
        begin(self.folder, MANIFEST, START, Plan(recipe=recipe, rounds=PLAN.rounds, aggregator=PLAN.aggregator))

    def run(self, rounds: int) -> list[Record]:
        """Order rounds, and wait until they are completed."""
        wanted = History(self.folder).last().record.version + rounds
        orders.order(self.folder, wanted)
        self.wait_for(lambda: orders.told(self.folder).get("phase") == "idle" and self.version() == wanted)
        return History(self.folder).records()[-rounds:]

    def version(self) -> int:
        return History(self.folder).last().record.version

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                log = self.federation.superlink.process.tail(30)
                pytest.fail(f"it did not come about: {orders.told(self.folder)}\n{log}")
            time.sleep(0.1)

    def is_collecting(self) -> bool:
        status = orders.told(self.folder)
        return status.get("phase") == "collecting" and len(status["asked"]) == len(NUMBERS)

    def trained(self, name: str) -> list[int]:
        """The versions that a device has trained from, in order."""
        path = self.root / name / "trained.jsonl"
        return [json.loads(line)["version"] for line in path.read_text().splitlines()] if path.exists() else []

    def stage(self, name: str) -> str:
        from client.agent import SOCKET
        from client.channel import ChannelError, Frame, ask

        with contextlib.suppress(ChannelError):
            return str(ask(self.root / name / SOCKET, Frame({"ask": "status"}), seconds=10.0).header["stage"])
        return "away"


@contextmanager
def public_port(federation: Federation, certificate: Certificate) -> Iterator[int]:
    """The server's public port: what it passes on, it passes on to the SuperLink."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        superlink = federation.superlink
        async with FleetPassage(superlink.address, superlink.certificate.path) as app.state.passage:
            yield

    app = Starlette(routes=[fleet_route(lambda request: request.app.state.passage)], lifespan=lifespan)
    config = uvicorn.Config(
        app, ssl_certfile=str(certificate.path), ssl_keyfile=str(certificate.key), ws="none", log_level="warning"
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    begin(root / "federation", MANIFEST, START, PLAN)
    certificate = open_certificate(root, "public", ["127.0.0.1"])
    with Federation(root / "federation") as federation, public_port(federation, certificate) as port:
        site = Site(root, federation, certificate, port)
        try:
            for index, number in enumerate(NUMBERS):
                identity = open_identity(root / f"device-{index}")
                federation.superlink.register(identity.public, f"device-{index}")
                site.devices.append(identity.device)
                site.start_device(f"device-{index}", number)
            site.start_device("stranger", 100.0)
            yield site
        finally:
            for name in list(site.processes):
                site.kill_device(name)


def expected(site: Site) -> float:
    """Where each parameter must be: each completed round has moved it by the mean of the devices' numbers."""
    return 1.0 + float(np.mean(NUMBERS)) * site.version()


def check_model(site: Site) -> None:
    flat = History(site.folder).last().flat
    np.testing.assert_allclose(flat[: MANIFEST.trained_size], expected(site), rtol=1e-5)


def test_rounds_run_over_the_public_port_and_each_device_trains_once_a_round(site: Site) -> None:
    records = site.run(2)
    assert [sorted(row["device"] for row in record.accepted) for record in records] == [sorted(site.devices)] * 2
    assert site.trained("device-0") == site.trained("device-1") == [0, 1]
    check_model(site)


def test_nothing_but_fleet_calls_passes_the_public_port(site: Site) -> None:
    with httpx.Client(base_url=site.url, verify=site.tls(), trust_env=False) as client:
        for path in (
            "/v1/control/start-run",
            "/v1/control/list-nodes",
            "/v1/runtime/get-nodes",
            "/v1/fleet/../control/start-run",
            "/v1/fleet/%2e%2e/control/start-run",
            "/v1/fleet/register-node",
            "/v1/fleet/unregister-node",
            "/docs",
        ):
            assert client.post(path, content=b"x").status_code == 404, path
        assert client.get("/v1/fleet/pull-messages").status_code == 405
        unsigned = client.post("/v1/fleet/pull-messages", content=b"", headers={"content-type": "application/protobuf"})
        assert unsigned.status_code >= 400


def test_a_body_of_a_gigabyte_is_refused_unread(site: Site) -> None:
    plain = socket.create_connection(("127.0.0.1", site.port))
    with site.tls().wrap_socket(plain, server_hostname="127.0.0.1") as connection:
        head = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: {10**9}\r\n\r\n"
        connection.sendall(head.encode() + b"x" * 1000)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    with httpx.Client(base_url=site.url, verify=site.tls(), trust_env=False) as client:
        endless = client.post("/v1/fleet/push-object", content=iter([b"x"]))
        assert endless.status_code == 411


def test_a_device_whose_key_is_not_registered_is_not_let_in(site: Site) -> None:
    log = site.root / "stranger" / "flower" / "supernode.log"
    site.wait_for(lambda: log.exists() and "Failed to initialize the connection" in log.read_text())
    site.kill_device("stranger")
    stranger = open_identity(site.root / "stranger").device
    assert all(stranger not in record.asked for record in History(site.folder).records())
    assert {device.status for device in site.federation.superlink.devices()} == {"online"}
    with pytest.raises(SuperLinkError, match=r"flwr supernode"):
        site.federation.superlink.register("ssh-ed25519 AAAA nobody", "nobody")
    with pytest.raises(SuperLinkError, match=r"flwr supernode"):
        site.federation.superlink.unregister(12345)


def test_a_device_killed_in_a_round_comes_back_and_counts_once(site: Site) -> None:
    site.plan(**SLOW)
    before = site.version()
    orders.order(site.folder, before + 1)
    site.wait_for(lambda: site.is_collecting() and site.stage("device-1") == "training")
    site.kill_device("device-1")
    site.start_device("device-1", NUMBERS[1])
    site.wait_for(lambda: site.version() == before + 1)
    record = History(site.folder).last().record
    assert sorted(row["device"] for row in record.accepted) == sorted(site.devices)
    check_model(site)


def test_a_superlink_killed_in_a_round_again_and_again_comes_back_and_no_round_is_lost(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowssl_core.processes._PAUSES", (0.1,))
    site.plan(**SLOW)
    before = site.version()
    orders.order(site.folder, before + 1)
    site.wait_for(lambda: site.is_collecting() and "training" in (site.stage("device-0"), site.stage("device-1")))
    process = site.federation.superlink.process
    killed: set[int | None] = {None}
    while len(killed) <= 6:
        site.wait_for(lambda: process.pid not in killed)
        if (pid := process.pid) is not None:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
    site.wait_for(lambda: site.version() == before + 1)
    assert [record.version for record in History(site.folder).records()] == list(range(before + 2))
    check_model(site)
    for name in ("device-0", "device-1"):
        assert len(site.trained(name)) == len(set(site.trained(name))), "a repeated task is answered from disk"
