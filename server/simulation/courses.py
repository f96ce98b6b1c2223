"""The courses that an experiment compares: a federation, its devices each alone, and one device with all the images."""

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2

from lowssl_core.errors import UserError
from lowssl_core.images import BadImage
from lowssl_core.protocol.manifest import FloatArray, Manifest
from lowssl_core.sources import Source
from server.federation.federation import begin
from server.federation.rounds import Rounds
from server.simulation.federations import FederationSettings
from server.simulation.link import Device, SimulatedLink, Watch, work_off
from server.simulation.stream import Stream

CourseName = Literal["federated", "alone", "pooled"]
# The device side, by its name: server and client never import each other.
DEVICE, CHECK_SETTINGS = "client.simulated:Device", "client.simulated:check_settings"


@dataclass(frozen=True, kw_only=True)
class World:
    """What all courses have in common.

    Attributes:
        recipe: what is trained, a tree of plain values.
        seed: of what is drawn beside the recipe's own.
        federation: how.
        manifest: of the models.
        start: (size,) the model that all begin with.
        source: all the images.
        streams: by device, in which order they arrive.
        rounds: how many.
    """

    recipe: Mapping[str, Any]
    seed: int
    federation: FederationSettings
    manifest: Manifest
    start: FloatArray
    source: Source
    streams: Mapping[str, Stream]
    rounds: int


class Course(ABC):
    """Devices on their folders, and rounds that can be gone on with after any kill: a round done is not done again.

    Args:
        world: what all courses have in common.
        folder: of this one.
        watch: told after each step and each device.
        owners: for each device of this course those of the world whose images it gets.
    """

    has_shared = True
    """Whether there is one model for all."""

    has_own = True
    """Whether devices have models of their own."""

    def __init__(self, world: World, folder: Path, watch: Watch, owners: Mapping[str, Sequence[str]]) -> None:
        self._world, self._folder, self._watch, self._owners = world, folder, watch, owners
        make: Callable[..., Device] = load(DEVICE)
        self._devices = {
            name: make(folder / "devices" / name, name, world.recipe, world.federation.learner, len(of))
            for name, of in owners.items()
        }

    def close(self) -> None:
        """Close the devices."""
        for device in self._devices.values():
            device.close()

    def run_round(self, number: int) -> dict[str, Any]:
        """Let a round's images arrive and train; returns its account, plain values.

        Raises:
            UserError: training diverged, or no device is left to ask.
            OSError: the disk is full.
        """
        for name, owners in self._owners.items():
            for owner in owners:
                self._deliver(self._folder / "devices" / name / "images", owner, number)
        began = time.monotonic()
        account = self._train(number)
        return account | {"seconds": round(time.monotonic() - began, 3)}

    @abstractmethod
    def shared(self) -> FloatArray:
        """(size,) the one model for all, as it is now."""

    def own(self) -> dict[str, FloatArray]:
        """By device, (size,) its own model as it is now."""
        return {name: device.weights() for name, device in self._devices.items()}

    @abstractmethod
    def _train(self, number: int) -> dict[str, Any]:
        """Train one round; returns what it came to."""

    def _beginning(self, number: int) -> FloatArray | None:
        """(size,) what a device alone takes over before a round: the world's start before the first one."""
        return self._world.start if number == 1 else None

    def _account(self, names: Sequence[str]) -> dict[str, Any]:
        """What the last round of some devices came to, together and one by one."""
        devices = {name: self._devices[name].account() for name in names}
        totals = {key: sum(each[key] for each in devices.values()) for key in ("steps", "views")}
        return {**totals, "bytes_down": 0, "bytes_up": 0, "devices": devices}

    def _deliver(self, folder: Path, owner: str, number: int) -> None:
        """Put the images that arrive for a round into a device's folder, under names in the order of arrival."""
        for position, index in enumerate(self._world.streams[owner].arriving(number, self._world.rounds)):
            stem = f"{number:05}-{position:05}-{owner}"
            try:
                image = self._world.source.read(int(index))
            except BadImage:
                continue
            suffix = Path(self._world.source.name(int(index))).suffix if isinstance(image, bytes) else ".png"
            data = image if isinstance(image, bytes) else cv2.imencode(".png", image[..., ::-1])[1].tobytes()
            path = folder / f"{stem}{suffix}"
            if not path.exists():
                unfinished = folder / f".{path.name}"
                unfinished.write_bytes(data)
                unfinished.replace(path)


class Federated(Course):
    """The federation: the server's rounds over devices of this process."""

    def __init__(self, world: World, folder: Path, watch: Watch) -> None:
        super().__init__(world, folder, watch, {name: [name] for name in world.streams})
        plan = world.federation.with_recipe(world.recipe)
        self._server = folder / "server"
        begin(self._server, world.manifest, world.start, plan)
        participants = plan.rounds.max_devices
        self._link = SimulatedLink(self._devices, participants=participants, seed=world.seed, watch=watch)
        self._rounds = Rounds(self._link, self._server, plan)

    def shared(self) -> FloatArray:
        """(size,) the global model."""
        completed = self._rounds.history.load(self._rounds.version)
        assert completed is not None, "it has just been saved, or was found whole"
        return completed.flat

    def _train(self, number: int) -> dict[str, Any]:
        if self._rounds.version < number:
            self._link.open_round(number)
            if self._rounds.run_round() is None:
                raise UserError(f"round {number} is void: too few replies count; {self._server}/status.json says why")
        record = self._rounds.history.record(number)
        assert record is not None, "it has just been saved, or was found whole"
        account = self._account(record.asked)
        return account | {
            "bytes_down": record.bytes_down,
            "bytes_up": record.bytes_up,
            "rejected": list(record.rejected),
            "failed": dict(record.failed),
            "clipped": sum(row["clip"] < 1 for row in record.accepted),
            "epsilon": record.epsilon,
        }


class Alone(Course):
    """The same devices, and nobody hears of the others."""

    has_shared = False

    def __init__(self, world: World, folder: Path, watch: Watch) -> None:
        super().__init__(world, folder, watch, {name: [name] for name in world.streams})

    def shared(self) -> FloatArray:
        """There is none."""
        raise NotImplementedError

    def _train(self, number: int) -> dict[str, Any]:
        for device in self._devices.values():
            work_off(device.train(number, self._beginning(number)), self._watch)
        return self._account(list(self._devices))


class Pooled(Course):
    """One device that gets all the images, with as many times the steps and the memory."""

    has_own = False

    def __init__(self, world: World, folder: Path, watch: Watch) -> None:
        super().__init__(world, folder, watch, {"pool": list(world.streams)})

    def shared(self) -> FloatArray:
        """(size,) the device's model."""
        return self._devices["pool"].weights()

    def _train(self, number: int) -> dict[str, Any]:
        work_off(self._devices["pool"].train(number, self._beginning(number)), self._watch)
        return self._account(["pool"])


COURSES: Mapping[CourseName, type[Federated] | type[Alone] | type[Pooled]] = {
    "federated": Federated,
    "alone": Alone,
    "pooled": Pooled,
}


def load(name: str) -> Any:
    """What a name such as `DEVICE`, module:attribute, stands for."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
