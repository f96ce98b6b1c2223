"""`lowssl-server --federation` as a process, and devices that join it and train without torch: for tests."""

import contextlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from client.agent import Agent
from client.connection import Connection
from client.identity import Identity, open_identity, pin_server
from client.node import Node
from lowssl_core.command_line import main as lowssl
from lowssl_core.processes import descendants, free_port
from lowssl_core.protocol.codec import decode_flat, encode_flat
from lowssl_core.protocol.manifest import Manifest, delta_of
from lowssl_core.protocol.messages import Metrics, Task, Update, write_message
from server.registry.registry import Registry, open_registry
from server.settings import Settings

RECIPE = """\
epochs = 1

[backbone]
name = "resnet_tiny"

[method]
name = "moco"
hidden = 64
queue_length = 64
momentum = 0.99

[views]
global_size = 48
num_locals = 2
local_size = "matched"

[data]
batch_size = 32
"""
PATIENCE = 600.0  # a busy machine starves what runs at low priority


@dataclass
class Site:
    """A server's folder, and the process in it, started as a command behind `enter`."""

    root: Path
    enter: Sequence[str] = ()
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[str] | None" = None
    greeting: str = ""
    devices: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def folder(self) -> Path:
        return self.data / "federation"

    @property
    def settings(self) -> Settings:
        return Settings(data_dir=self.data)

    def lowssl(self, *words: str) -> None:
        assert lowssl(["federation", *words, "--data-dir", str(self.data)]) == 0

    @contextmanager
    def registry(self) -> Iterator[Registry]:
        with contextlib.closing(open_registry(self.settings)) as registry:
            yield registry

    def begin(self, *words: str, plan: str = "") -> None:
        (self.root / "recipe.toml").write_text(RECIPE)
        (self.root / "plan.toml").write_text(plan)
        self.lowssl("start", "--recipe", str(self.root / "recipe.toml"), "--plan", str(self.root / "plan.toml"), *words)

    def start(self, *flags: str) -> None:
        """Start the server, and wait until it says that it is there."""
        command = [*self.enter, sys.executable, "-m", "server.main"]
        command += ["--data-dir", str(self.data), "--port", str(self.port)]
        environment = os.environ | {"LOWSSL_SERVER_WORKERS": "1", "LOWSSL_SERVER_EXECUTION": "pool"}
        with self.log.open("a") as errors:
            self.process = subprocess.Popen(
                [*command, "--federation", *flags], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        assert self.process.stdout is not None
        self.greeting = ""
        while "API  " not in self.greeting:
            line = self.process.stdout.readline()
            assert line, self.log.read_text()
            self.greeting += line

    @property
    def log(self) -> Path:
        return self.root / "server.log"

    @property
    def fingerprint(self) -> str:
        found = re.search(r"(?:[0-9A-F]{2}:){31}[0-9A-F]{2}", self.greeting)
        assert found is not None, self.greeting
        return found[0]

    def kill(self) -> None:
        """As when the power goes: the server at once, without a word."""
        assert self.process is not None
        self.process.kill()
        self._wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self._wait()

    def _wait(self) -> int:
        assert self.process is not None
        assert self.process.stdout is not None
        status = self.process.wait(40)
        self.process.stdout.close()
        self.process = None
        return status

    def client(self) -> httpx.Client:
        """One that trusts what a device pins."""
        folder = self.root / "pinned"
        pem = pin_server(folder, "127.0.0.1", self.port, fingerprint=self.fingerprint)
        context = ssl.create_default_context(cafile=str(pem))
        return httpx.Client(base_url=f"https://127.0.0.1:{self.port}", verify=context, trust_env=False, timeout=30.0)

    def token(self, **options: Any) -> str:
        from server.federation.joins import create_token

        with self.registry() as registry:
            return create_token(registry.database, **options)

    def join(self, name: str, token: str) -> Identity:
        """As `lowssl-client join` does it."""
        identity = open_identity(self.root / name)
        with self.client() as client:
            deadline = time.monotonic() + PATIENCE
            while True:
                answer = client.post("/v1/devices", json={"token": token, "public_key": identity.public, "name": name})
                if answer.status_code != 503 or time.monotonic() > deadline:
                    break
                time.sleep(0.5)  # the SuperLink starts
        assert answer.status_code == 201, answer.text
        assert answer.json() == {"device": identity.device, "name": name, "address": None}
        shutil.copy(self.root / "pinned" / "server.pem", self.root / name / "server.pem")
        return identity

    def start_device(self, name: str, seconds: float = 0.0, enter: Sequence[str] = ()) -> None:
        command = [*enter, sys.executable, __file__, str(self.root / name), f"127.0.0.1:{self.port}"]
        command += [str(self.folder / "rounds" / "manifest.json"), str(seconds)]
        with (self.root / f"{name}.log").open("ab") as log:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            self.devices.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            status = (self.folder / "status.json").read_text() if (self.folder / "status.json").exists() else ""
            assert time.monotonic() < deadline, f"it did not come about: {status}\n{self.log.read_text()[-3000:]}"
            time.sleep(0.2)

    def close(self) -> None:
        if self.process is not None:
            self.kill()
        for device in self.devices:
            for pid in (device.pid, *descendants(device.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            device.wait()


@contextmanager
def site(root: Path, enter: Sequence[str] = ()) -> Iterator[Site]:
    made = Site(root, enter)
    try:
        yield made
    finally:
        made.close()


class Trembling:
    """Training is moving each parameter by a thousandth, one way or the other, and taking its time."""

    def __init__(self, folder: Path, device: str, manifest: Manifest, seconds: float) -> None:
        self.device, self.manifest, self.seconds, self.journal = device, manifest, seconds, folder / "trained.jsonl"

    def learn(self, task: Task) -> Generator[object, None, Update]:
        base = decode_flat(task.payload, self.manifest)
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(0.1)
            yield None
        local, trained = base.copy(), self.manifest.trained_size
        rng = np.random.default_rng([task.version, int(self.device[:8], 16)])
        local[:trained] *= 1 + 1e-3 * rng.standard_normal(trained).astype(np.float32)
        with self.journal.open("a") as file:
            file.write(json.dumps({"version": task.version}) + "\n")
        update = Update(
            round=task.round,
            base_version=task.version,
            device=self.device,
            update_id=f"{self.device}-{task.run}-{task.version}",
            manifest=self.manifest.hash,
            weight=10.0,
            metrics=Metrics(steps=4, seconds=0.1, new_images=10, loss=1.5),
            payload=encode_flat(delta_of(local, base, self.manifest), self.manifest, task.codec, share=task.share),
        )
        write_message(update)
        return update

    def status(self) -> dict[str, Any]:
        return {}


def main(folder: Path, server: str, manifest: Path, seconds: float) -> None:
    identity, shape = open_identity(folder), Manifest.from_json(manifest.read_text())
    with (
        Agent(lambda: Trembling(folder, identity.device, shape, seconds), folder) as agent,
        Connection(lambda: Node(server, identity, folder, certificate=folder / "server.pem"), closed_by=lambda: ()),
    ):
        signal.signal(signal.SIGTERM, lambda *_: agent.close())
        agent.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
