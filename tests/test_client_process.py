"""Devices as people run them: two real `lowssl-client run` on real images behind a real SuperLink, and troubles."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from test_flower_processes import public_port

from client.folder import Joined, write_joined
from client.identity import open_identity, pin_server
from client.main import main
from lowssl_core.backbones import BackboneConfig
from lowssl_core.loader import DataConfig
from lowssl_core.methods import MoCoConfig
from lowssl_core.optim import OptimConfig
from lowssl_core.photos import open_photos
from lowssl_core.processes import descendants
from lowssl_core.protocol.manifest import manifest_of, pack
from lowssl_core.recipe import Recipe
from lowssl_core.views import ViewsConfig
from server.aggregation.means import FedAvgConfig
from server.federation import orders
from server.federation.certificates import open_certificate
from server.federation.federation import Federation, begin
from server.federation.history import History, Record
from server.federation.plan import Plan, RoundsConfig

PATIENCE = 600.0
RECIPE = Recipe(
    method=MoCoConfig(hidden=64, outputs=32, queue_length=32),
    backbone=BackboneConfig(name="resnet_tiny"),
    data=DataConfig(batch_size=8, shrink_to=56),
    views=ViewsConfig(global_size=32, num_locals=2, local_size="matched"),
    optim=OptimConfig(name="adamw", base_lr=0.03, warmup_steps=2),
    alpha=0.4,
)
# Tests run on busy machines.
SETTINGS = """
[images]
settle_seconds = 0
[learner]
save_every_steps = 2
[learner.budget]
new_images = 16
steps = {steps}
[learner.memory]
max_bytes = 1_000_000
[conditions.load]
max_load = 10_000.0
resume_load = 10_000.0
[conditions.memory]
max_percent = 100.0
resume_percent = 100.0
[conditions.temperature]
max_celsius = 150.0
resume_celsius = 150.0
[conditions.disk]
min_free_bytes = 0
[conditions.metered]
file = "{metered}"
[caps]
threads = 1
memory_bytes = 4_000_000_000
"""


class Relay:
    """The network between a device and its server; it can be cut in the middle of an upload, once."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.cut_after: int | None = None
        self.cuts = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                device, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                device.close()
                continue
            for source, sink, is_up in ((device, server, True), (server, device, False)):
                threading.Thread(target=self._pass, args=(source, sink, is_up), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, is_up: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                passed += len(data)
                if is_up and self.cut_after is not None and passed > self.cut_after:
                    self.cut_after, self.cuts = None, self.cuts + 1
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()  # the other thread closes the other one


@dataclass
class Site:
    """A server, the network, and two devices of different scenes."""

    root: Path
    federation: Federation
    relays: dict[str, Relay] = field(default_factory=dict)
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def add_device(self, name: str, port: int, *, scene: int, steps: int) -> None:
        """Join by the operator's hand; joining over HTTP is tested elsewhere."""
        folder, images = self.root / name, self.root / f"{name}-images"
        relay = self.relays[name] = Relay(port)
        identity = open_identity(folder)
        self.federation.superlink.register(identity.public, name)
        pinned = pin_server(folder, "127.0.0.1", relay.port)
        address = f"127.0.0.1:{relay.port}"
        write_joined(
            folder,
            Joined(
                url=f"https://{address}",
                address=address,
                certificate=pinned.name,
                device=identity.device,
                name=name,
            ),
        )
        images.mkdir()
        photos = open_photos()
        for index in range(24):
            cv2.imwrite(str(images / f"{index:02d}.png"), photos.read(300 * scene + 3 * index)[..., ::-1])
        (images / "broken.jpg").write_bytes(b"\xff\xd8\xff" + b"x" * 100)
        text = SETTINGS.format(steps=steps, metered=self.root / f"{name}-metered")
        (self.root / f"{name}.toml").write_text(text)

    def copy_device(self, name: str, copy: str) -> None:
        """A second device with the first one's key, as from a copied disk."""
        (self.root / copy).mkdir()
        for file in ("device.key", "server.pem", "joined.json"):
            shutil.copy(self.root / name / file, self.root / copy / file)
        shutil.copytree(self.root / f"{name}-images", self.root / f"{copy}-images")
        shutil.copy(self.root / f"{name}.toml", self.root / f"{copy}.toml")

    def command(self, name: str) -> list[str]:
        images, config = self.root / f"{name}-images", self.root / f"{name}.toml"
        folder = ["--folder", str(self.root / name)]
        return [sys.executable, "-m", "client.main", "run", "--images", str(images), "--config", str(config), *folder]

    def start(self, name: str) -> None:
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(self.command(name), stdout=log, stderr=log)

    def kill(self, name: str) -> None:
        """As when its power goes."""
        process = self.processes.pop(name)
        for pid in (process.pid, *descendants(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def stop(self, name: str) -> int:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(PATIENCE)

    def status(self, name: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "client.main", "status", "--json", "--folder", str(self.root / name)],
            capture_output=True,
            check=True,
        )
        return dict(json.loads(done.stdout))

    def told(self, name: str, key: str) -> Any:
        agent = self.status(name)["agent"]
        return None if agent is None else agent[key]

    def order(self, rounds: int = 1) -> int:
        wanted = self.version() + rounds
        orders.order(self.federation.folder, wanted)
        return wanted

    def version(self) -> int:
        return History(self.federation.folder).last().record.version

    def completed(self, wanted: int) -> Record:
        self.wait_for(lambda: self.version() == wanted)
        return History(self.federation.folder).last().record

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-2000:] for path in sorted(self.root.glob("*.log")))
                pytest.fail(f"it did not come about: {orders.told(self.federation.folder)}\n{logs}")
            time.sleep(0.2)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    torch.manual_seed(0)
    method = RECIPE.method.build(RECIPE.backbone, RECIPE.data.batch_size)
    manifest = manifest_of(method)
    plan = Plan(recipe=RECIPE.as_dict(), rounds=RoundsConfig(seconds=100), aggregator=FedAvgConfig(momentum=0.0))
    begin(tmp_path / "federation", manifest, pack(method.federated_state(), manifest), plan)
    certificate = open_certificate(tmp_path, "public", ["127.0.0.1"])
    with Federation(tmp_path / "federation") as federation, public_port(federation, certificate) as port:
        site = Site(tmp_path, federation)
        try:
            site.add_device("hall", port, scene=0, steps=6)
            site.add_device("yard", port, scene=1, steps=40)
            for name in ("hall", "yard"):
                site.start(name)
            yield site
        finally:
            for name in list(site.processes):
                site.kill(name)
            for relay in site.relays.values():
                relay.close()


def accepted(record: Record) -> list[str]:
    return sorted(row["device"] for row in record.accepted)


def test_two_devices_train_a_model_through_a_pause_a_power_cut_and_a_cut_upload(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    devices = sorted(open_identity(site.root / name).device for name in ("hall", "yard"))
    start = History(site.federation.folder).last().flat

    # A plain round, its upload cut once: 60 kB into a connection are in the middle of the update.
    site.relays["hall"].cut_after = 60_000
    record = site.completed(site.order())
    assert accepted(record) == devices
    assert site.relays["hall"].cuts == 1
    first = History(site.federation.folder).last().flat
    assert np.isfinite(first).all()
    assert np.abs(first - start).max() > 0
    facts = site.status("hall")
    assert facts["rounds"]["answered"] == 1
    assert facts["images"]["learned"] == facts["memory"]["images"] == 16
    assert list(facts["images"]["reasons"]) == ["broken.jpg"]
    assert facts["agent"]["connection"] == {"open": True, "trouble": ""}

    # A second agent on the folder, and a second device with the key.
    second = subprocess.run(site.command("hall"), capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "an agent runs already" in second.stderr
    site.copy_device("hall", "copy")
    site.start("copy")
    site.wait_for(lambda: "Failed to activate" in (site.told("copy", "connection") or {}).get("trouble", ""))

    # Killed in a round, started again paused, resumed: the round counts once.
    wanted = site.order()
    site.wait_for(lambda: (site.told("yard", "learner") or {}).get("round") == 2)
    site.kill("yard")
    assert site.status("yard")["agent"] is None
    assert main(["pause", "--folder", str(site.root / "yard")]) == 0
    site.start("yard")
    site.wait_for(lambda: site.told("yard", "stage") == "training")
    assert site.told("yard", "waiting") == ["paused"]
    main(["status", "--folder", str(site.root / "yard")])
    assert "waits for   paused" in capsys.readouterr().out
    main(["resume", "--folder", str(site.root / "yard")])
    record = site.completed(wanted)
    assert accepted(record) == devices
    assert not np.array_equal(History(site.federation.folder).last().flat, first)
    assert [site.status(name)["rounds"]["answered"] for name in ("hall", "yard")] == [2, 2]

    assert site.status("copy")["rounds"] == {}

    # A metered network: the device takes its leave, until it may speak again.
    metered = site.root / "hall-metered"
    metered.touch()
    site.wait_for(lambda: "the network is metered" in site.told("hall", "connection")["trouble"])
    assert "the network is metered" in site.told("hall", "waiting")[0]
    metered.unlink()
    site.wait_for(lambda: site.told("hall", "connection")["open"])

    for name in ("hall", "yard", "copy"):
        assert site.stop(name) == 0
