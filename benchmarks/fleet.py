"""A server and its devices as people run them, on this machine in one folder: joined, begun, followed, ended whole."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2

from client.folder import read_joined
from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically
from lowssl_core.images import BadImage
from lowssl_core.sources import Source
from server.demonstration.processes import Processes
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
_POLL = 0.2


@dataclass(frozen=True)
class Fleet:
    """A server and its devices.

    Attributes:
        folder: of everything.
        processes: that run.
        devices: their names.
    """

    folder: Path
    processes: Processes
    devices: Sequence[str]

    @property
    def federation(self) -> Path:
        """The folder of the federation."""
        return self.folder / "data" / "federation"

    @property
    def device_logs(self) -> dict[str, Path]:
        """What each device writes, by the device's id."""
        joined = {name: read_joined(self.processes.state(name)) for name in self.devices}
        return {found.device: self.processes.log(name) for name, found in joined.items() if found is not None}

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
            self.processes.check()
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
    names = [f"device-{index}" for index in range(1, devices + 1)]
    with Processes(folder / "data", folder, folder / "device.toml", lambda: None) as processes:
        deal_images(source, [processes.images(name) for name in names], rounds * NEW_IMAGES)
        _write_settings(folder, backbone, devices)
        processes.lowssl("start", "--recipe", str(folder / "recipe.toml"), "--plan", str(folder / "plan.toml"))
        processes.start_server()
        token = processes.token(devices)
        for name in names:
            processes.start_device(name, token)
        started = Fleet(folder, processes, names)
        started.wait_for(lambda: len(processes.pids()) == 1 + devices, "the start of the devices")
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


def _write_settings(folder: Path, backbone: str, devices: int) -> None:
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
