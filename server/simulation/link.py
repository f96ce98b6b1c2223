"""The link of a simulated federation: devices of this process, one after another as they are asked."""

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from lowssl_core.errors import UserError
from lowssl_core.protocol import BadUpdate
from lowssl_core.protocol.manifest import FloatArray
from server.federation.rounds import Reply

Answer = TypeVar("Answer")


class Device(Protocol):
    """What the device side is, as seen from here; it is loaded by its name, as Flower loads a ClientApp."""

    def answer(self, data: bytes) -> Generator[object, None, bytes]:
        """The bytes of an update for those of a task, yielding between steps."""
        ...

    def train(self, number: int, arrived: FloatArray | None) -> Generator[object, None, None]:
        """A round by itself, after it has taken over the model that arrived, if any, yielding between steps."""
        ...

    def weights(self) -> FloatArray:
        """(size,) its own model."""
        ...

    def account(self) -> dict[str, Any]:
        """What came of its last round: steps, views, seconds, loss, mu, drift, memory_images."""
        ...

    def close(self) -> None:
        """Close its files."""
        ...


@dataclass(frozen=True)
class Watch:
    """Who looks on: `on_step` is called between two steps and may raise to stop, `on_device` after a device's work."""

    on_step: Callable[[], None]
    on_device: Callable[[], None]


class SimulatedLink:
    """A `server.federation.rounds.Link` to devices of this process.

    A task is worked on when its reply is waited for.

    Args:
        devices: by name.
        participants: how many are there in a round; None: all.
        seed: of which those are.
        watch: told after each step and each reply.
    """

    def __init__(self, devices: Mapping[str, Device], *, participants: int | None, seed: int, watch: Watch) -> None:
        self._devices, self._participants, self._seed, self._watch = devices, participants, seed, watch
        self._tasks: deque[tuple[str, bytes]] = deque()
        self._present = sorted(devices)

    def open_round(self, number: int) -> None:
        """Decide which devices are there in a round: by seed and round, so that a run gone on with asks the same."""
        self._tasks.clear()
        names = sorted(self._devices)
        if self._participants is not None and self._participants < len(names):
            rng = np.random.default_rng([self._seed, number])
            names = sorted(rng.choice(names, self._participants, replace=False).tolist())
        self._present = names

    def devices(self) -> Sequence[str]:
        """The devices that are there in this round."""
        return self._present

    def send(self, device: str, data: bytes, *, seconds: float) -> None:
        """Put a task in the queue."""
        self._tasks.append((device, data))

    def receive(self, seconds: float) -> list[Reply]:
        """The reply to the first task in the queue, worked out now.

        Raises:
            UserError: the queue is empty, and no device can be asked any more.
        """
        if not self._tasks:
            raise UserError("too few devices are left to ask: the others are in quarantine (status.json says why)")
        name, data = self._tasks.popleft()
        try:
            return [Reply(device=name, data=work_off(self._devices[name].answer(data), self._watch))]
        except BadUpdate as error:
            return [Reply(device=name, failure=str(error))]


def work_off(work: Generator[object, None, Answer], watch: Watch) -> Answer:
    """Take all steps of a device's work; returns its answer."""
    with closing(work):
        while True:
            try:
                next(work)
            except StopIteration as stop:
                watch.on_device()
                answer: Answer = stop.value
                return answer
            watch.on_step()
