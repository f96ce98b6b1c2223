"""A server and its devices as people run them, on this machine in one folder: joined, begun, followed, ended whole."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2

from client.folder import read_joined
from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically
from lowssl_core.images import BadImage
from lowssl_core.processes import KeptProcess, free_port, programs_path
from lowssl_core.sources import Source
from server.federation import orders
from server.federation.history import History

# Little training, for what is measured is all else. MoCo's head is the paper's, and travels with the backbone.
STEPS, BATCH, GLOBAL_SIZE, LOCAL_SIZE, NEW_IMAGES, QUEUE = 4, 16, 64, 32, 16, 256
_RECIPE = """\
epochs = 1
[backbone]
name = "{backbone}"
[method]
name = "moco"
queue_length = {queue}
[views]
global_size = {global_size}
num_locals = 2
local_size = {local_size}
[data]
batch_size = {batch}
shrink_to = {shrink_to}
"""
# Versions are made by another process, after the rounds that are measured.
_PLAN = """\
[rounds]
seconds = {seconds}
min_devices = {devices}
[versions]
every = 100000
promote = false
"""
# Whatever else this machine does must not make a device wait.
_DEVICE = """\
[images]
settle_seconds = 0
[learner.budget]
new_images = {new_images}
steps = {steps}
[conditions.power]
min_battery = 0
resume_battery = 0
[conditions.load]
max_load = 10_000
resume_load = 10_000
[conditions.memory]
max_percent = 100
resume_percent = 100
[conditions.temperature]
max_celsius = 150
resume_celsius = 150
[conditions.disk]
min_free_bytes = 0
[caps]
threads = 1
niceness = 0
"""
_PATIENCE = 300.0  # seconds without a completed round, or for a start
_GRACE = 40.0
_POLL = 0.2


@dataclass(frozen=True)
class Fleet:
    """A server and its devices.

    Attributes:
        folder: of everything.
        processes: by name: "server", "device 1" ...
    """

    folder: Path
    processes: dict[str, KeptProcess]

    @property
    def federation(self) -> Path:
        """The folder of the federation."""
        return self.folder / "data" / "federation"

    @property
    def device_logs(self) -> dict[str, Path]:
        """What each device writes, by the device's id."""
        logs = {}
        for name, process in self.processes.items():
            joined = read_joined(self.folder / name)
            if joined is not None:
                logs[joined.device] = process.log
        return logs

    def order(self, rounds: int) -> None:
        """Order rounds, as `lowssl federation round` does."""
        _lowssl(self.folder, "round", "--count", str(rounds))

    def follow(self, rounds: int) -> Iterator[int]:
        """Yield the number of each round as it is completed, up to `rounds`.

        Raises:
            UserError: a program ended, the federation failed, or nothing came for five minutes.
        """
        for number in range(1, rounds + 1):
            self.wait_for(lambda wanted=number: History(self.federation).newest() >= wanted, f"round {number}")  # type: ignore[misc]
            yield number

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for `condition`; UserError says why it cannot come about any more."""
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            for name, process in self.processes.items():
                if process.starts > 1:
                    raise UserError(f"{what}: the {name} ended: {process.tail(1)}")
            phase = str(orders.told(self.federation).get("phase", "not begun"))
            if phase.startswith(("failed", "ended", "cannot")) or time.monotonic() > deadline:
                raise UserError(f"{what}: it did not come about: {phase}")
            time.sleep(_POLL)


@contextmanager
def fleet(folder: Path, source: Source, *, backbone: str, devices: int, rounds: int) -> Iterator[Fleet]:
    """A server whose federation has begun with untrained weights, and devices that have joined it and run.

    However this process ends, all of them end.

    Args:
        folder: an empty one, for everything.
        source: the images, dealt to the devices in turn.
        backbone: whose weights travel, with the head of MoCo.
        devices: how many.
        rounds: that will be ordered: so many portions of new images each device gets, as far as there are any.

    Raises:
        UserError: no such backbone, too few images, Flower is not installed, or a program does not start.
    """
    deal_images(source, [folder / f"images {index}" for index in range(1, devices + 1)], rounds * NEW_IMAGES)
    _begin(folder, backbone, devices)
    port = free_port()
    url = f"https://127.0.0.1:{port}"
    # One worker: the encoder that a server could serve meanwhile is not what is measured.
    server = ("server.main", "--data-dir", str(folder / "data"), "--port", str(port), "--federation")
    started = Fleet(folder, {})
    with ExitStack() as stack:
        process = started.processes["server"] = stack.enter_context(_running(folder / "server.log", *server))
        started.wait_for(lambda: "API  " in process.tail(100), "the start of the server")
        fingerprint = json.loads(_lowssl(folder, "status", "--json"))["fingerprint"]
        token = _lowssl(folder, "token", "--uses", str(devices)).split()[0]
        for index in range(1, devices + 1):
            home, name = ("--folder", str(folder / f"device {index}")), f"device-{index}"
            _python("client.main", "join", url, "--token", token, "--fingerprint", fingerprint, "--name", name, *home)
            running = ("--images", str(folder / f"images {index}"), "--config", str(folder / "device.toml"), *home)
            log = folder / f"device {index}.log"
            process = stack.enter_context(_running(log, "client.main", "run", *running))
            started.processes[f"device {index}"] = process
            started.wait_for(lambda process=process: process.pid is not None, f"device {index}")  # type: ignore[misc]
        yield started


def deal_images(source: Source, folders: Sequence[Path], most: int) -> None:
    """Write up to `most` images as PNG into each folder, no image into two.

    Raises:
        UserError: fewer images than a batch for each folder.
    """
    count = min(most, len(source) // len(folders))
    if count < BATCH:
        raise UserError(f"{source.description}: {BATCH * len(folders)} images are needed at least")
    step = len(source) / (count * len(folders))  # spread over the classes, which lie one after the other
    for index in range(count * len(folders)):
        folder = folders[index % len(folders)]
        try:
            image = source.read(int(index * step))
        except BadImage:
            continue
        data = image if isinstance(image, bytes) else cv2.imencode(".png", image[..., ::-1])[1].tobytes()
        suffix = ".png" if data.startswith(b"\x89PNG") else ".jpg"
        write_atomically(folder / f"{index:05}{suffix}", lambda file, data=data: file.write(data))  # type: ignore[misc]


def _begin(folder: Path, backbone: str, devices: int) -> None:
    """Write the settings, and begin the federation."""
    texts = {
        "recipe.toml": _RECIPE.format(
            backbone=backbone,
            queue=QUEUE,
            batch=BATCH,
            global_size=GLOBAL_SIZE,
            local_size=LOCAL_SIZE,
            shrink_to=GLOBAL_SIZE + 8,
        ),
        "plan.toml": _PLAN.format(seconds=_PATIENCE, devices=devices),
        "device.toml": _DEVICE.format(new_images=NEW_IMAGES, steps=STEPS),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    _lowssl(folder, "start", "--recipe", str(folder / "recipe.toml"), "--plan", str(folder / "plan.toml"))


def _lowssl(folder: Path, *words: str) -> str:
    """What a subcommand of `lowssl federation` prints; UserError as `_python`."""
    return _python("lowssl_core.command_line", "federation", *words, "--data-dir", str(folder / "data"))


def _python(module: str, *words: str) -> str:
    """What a module run as a program prints; UserError with its last line if it fails."""
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or f"{module} failed").splitlines()[-1]
        raise UserError(said.removeprefix("lowssl federation: "))
    return done.stdout


def _running(log: Path, module: str, *words: str) -> KeptProcess:
    """A program of this Python's."""
    environment = {
        **os.environ,
        "PATH": programs_path(),
        "PYTHONUNBUFFERED": "1",
        "LOWSSL_SERVER_WORKERS": "1",
        "LOWSSL_SERVER_EXECUTION": "pool",
    }
    command = [sys.executable, "-m", module, *words]
    return KeptProcess(command, environment=environment, log=log, grace_seconds=_GRACE)
