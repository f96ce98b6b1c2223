"""A federation's rounds: devices are asked, replies screened and folded as they come, the next model saved."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically
from lowssl_core.protocol.codec import encode_flat
from lowssl_core.protocol.manifest import FloatArray
from lowssl_core.protocol.messages import Task, write_message
from server.aggregation.means import FedBuffConfig
from server.aggregation.privacy import Accountant, PrivateMeanConfig, poisson_sample
from server.aggregation.quarantine import Quarantine
from server.aggregation.reply import Rejected, Verdict
from server.aggregation.screening import Screening
from server.federation import orders
from server.federation.history import Completed, History, Record
from server.federation.open_round import OpenRound, now
from server.federation.plan import Plan

_POLL_SECONDS = 1.0
_VOID_SECONDS = 30.0  # what made a round void may be mended after a while, hardly at once
_FULL_DISK_SECONDS = 10.0


@dataclass(frozen=True)
class Reply:
    """What came of a task.

    Attributes:
        device: that was sent it, by its key.
        data: the bytes of its update; None: there are none.
        failure: why there are none, in a few words.
        is_lost: whether the device lost the task (it, or its connection, ended) and may be sent it again.
    """

    device: str
    data: bytes | None = field(default=None, repr=False)
    failure: str = ""
    is_lost: bool = False


class Link(Protocol):
    """The way to the devices. A device is known by an id that follows from its key."""

    def devices(self) -> Sequence[str]:
        """The devices that are online."""
        ...

    def send(self, device: str, data: bytes, *, seconds: float) -> None:
        """Send a task; its reply is taken for `seconds`. The reply to an earlier task is still taken as well."""
        ...

    def receive(self, seconds: float) -> list[Reply]:
        """What has come since the last call, waiting up to `seconds` for something."""
        ...


class Stopped(Exception):  # noqa: N818 - what happened
    """The federation was asked to stop; what had not been completed is done again by the next run."""


class Rounds:
    """Runs a federation's rounds over a link, from the last completed one on.

    Nothing of an unfinished round is kept: the next run asks the same again, and devices that had answered send the
    same bytes from their disks. A round that too few replies came to is void: it moves nothing, and is run again.

    Args:
        link: the way to the devices.
        folder: of the federation.
        plan: how rounds run.
        pause_seconds: after a void round.
    """

    def __init__(self, link: Link, folder: Path, plan: Plan, *, pause_seconds: float = _VOID_SECONDS) -> None:
        self._link, self._folder, self._plan, self._pause_seconds = link, folder, plan, pause_seconds
        self.history = History(folder)
        self._last = self.history.last()
        self._screening = Screening(plan.screening, Quarantine())
        if self._last.screening is not None:
            self._screening.restore(dict(self._last.screening))
        self._aggregator = plan.aggregator.build(folder / "spool")
        self._aggregator.carried = self._last.carried
        self._accountant = _open_accountant(folder, plan)
        self._busy: dict[str, int] = {}  # device: version of the task that it has not answered
        self._early: list[tuple[Reply, int]] = []  # replies to earlier rounds that came between two
        self._released: set[str] = set()  # since the last round was saved

    @property
    def version(self) -> int:
        """The newest version of the model."""
        return self._last.record.version

    def run(self, until: Callable[[], int]) -> None:
        """Run rounds until the model has the version that `until` gives, asked before each round.

        Raises:
            Stopped: it was asked to stop.
            UserError: differential privacy's budget does not allow one more round.
        """
        while self.version < until():
            if self.run_round() is None:
                self._pause(self._pause_seconds)
        self._tell("idle")

    def run_round(self) -> Record | None:
        """Run one round; None if it is void. Raises as `run`."""
        self._wait_for_devices()
        self._charge()
        before = copy.deepcopy(self._screening.as_dict())
        self._screening.begin(self._last.flat, self.history.manifest, self.version)
        self._aggregator.begin(self._last.flat, self.history.manifest)
        current = OpenRound(self.version)
        self._take_early(current)
        self._ask(current)
        self._collect(current)
        self._judge(current, self._screening.close())
        if len(current.accepted) < self._plan.rounds.min_devices and self._plan.privacy is None:
            self._make_void(current, before, "void")
            return None
        self._tell("saving", current)
        flat = self._aggregator.finish()
        if not np.isfinite(flat).all():
            self._make_void(current, before, "void: the replies that passed gave a model that is not finite")
            return None
        return self._complete(current, flat)

    def _make_void(self, current: OpenRound, before: dict[str, Any], phase: str) -> None:
        """Leave the model as it is: a round's replies have not counted, and count when they are sent again.

        Faults stay faults, and releases releases.
        """
        self._screening.restore(before | {"quarantine": self._screening.quarantine.as_dict()})
        self._aggregator.carried = self._last.carried
        self._tell(phase, current)

    def _wait_for_devices(self) -> None:
        """Wait until enough devices are online that have nothing left to do; one may be released meanwhile."""
        free, needed = -1, self._plan.rounds.min_devices
        while True:
            self._release()
            before, free = free, len(self._free_devices())
            if free != before:
                self._tell(f"waiting for devices: {free} of {needed}, rounds.min_devices")
            if free >= needed:
                return
            self._early += self._receive(_POLL_SECONDS)

    def _release(self) -> None:
        """Take devices out of quarantine that a person has released; asked for until a round is saved with it."""
        for device in set(orders.releases(self._folder)) - self._released:
            self._screening.quarantine.release(device)
            self._released.add(device)

    def _receive(self, seconds: float) -> list[tuple[Reply, int]]:
        """What has come, each with the version of the task that it answers."""
        if orders.is_stopped(self._folder):
            self._tell("stopped")
            raise Stopped
        return [(reply, self._busy.pop(reply.device, -1)) for reply in self._link.receive(seconds)]

    def _free_devices(self) -> list[str]:
        oldest = self.version - self._plan.screening.max_staleness
        self._busy = {device: version for device, version in self._busy.items() if version >= oldest}
        unfit = self._busy.keys() | self._screening.quarantine.held.keys()
        return sorted(set(self._link.devices()) - unfit)

    def _charge(self) -> None:
        """Pay for the round's privacy before anything is asked."""
        privacy, aggregator = self._plan.privacy, self._plan.aggregator
        if privacy is None or self._accountant is None:
            return
        assert isinstance(aggregator, PrivateMeanConfig)
        self._accountant.charge(aggregator.noise_multiplier, privacy.sampling_rate)
        text = self._accountant.to_json()
        write_atomically(self._folder / "privacy.json", lambda file: file.write(text.encode()))

    def _take_early(self, current: OpenRound) -> None:
        """Take what came between two rounds, before anybody is asked again for what is there already.

        A refusal, or a task that was lost, was of a try that is over.
        """
        early, self._early = self._early, []
        for reply, version in early:
            if reply.data is not None:
                if version == current.version:
                    current.expect(reply.device)
                self._take(current, reply, version)

    def _ask(self, current: OpenRound) -> None:
        current.task = self._task()
        for device in self._choose(current.tries.keys()):
            self._send(current, device)

    def _choose(self, asked: Collection[str]) -> list[str]:
        """The devices that are to be asked beside those that have been, in a try of this round before."""
        devices, config = [device for device in self._free_devices() if device not in asked], self._plan.rounds
        if self._plan.privacy is not None:
            return poisson_sample(devices, self._plan.privacy.sampling_rate)
        if config.max_devices is None or len(devices) + len(asked) <= config.max_devices:
            return devices
        count = max(0, config.max_devices - len(asked))
        return sorted(np.random.default_rng().choice(devices, count, replace=False).tolist())

    def _send(self, current: OpenRound, device: str) -> None:
        seconds = self._plan.rounds.seconds * (1 + self._plan.screening.max_staleness)
        self._link.send(device, current.task, seconds=seconds)
        self._busy[device] = current.version
        current.sent(device)

    def _task(self) -> bytes:
        """The round's task: the same bytes each time it is asked, so that a device knows it again."""
        config, manifest = self._plan.rounds, self.history.manifest
        return write_message(
            Task(
                round=self.version + 1,
                run=self.history.run,
                version=self.version,
                manifest=manifest.hash,
                recipe=self._plan.recipe,
                codec=config.up,
                share=config.share,
                seconds=config.seconds,
                proximal=config.proximal,
                payload=encode_flat(self._last.flat, manifest, config.down),
            )
        )

    def _collect(self, current: OpenRound) -> None:
        """Take replies until enough have come, none can come any more, or time is up."""
        deadline = time.monotonic() + self._plan.rounds.seconds
        arrived: list[tuple[Reply, int]] = []
        while True:
            for reply, version in arrived:
                self._take(current, reply, version)
            self._tell("collecting", current)
            left = deadline - time.monotonic()
            if left <= 0 or not self._is_open(current):
                return
            for device in current.lost.keys() & set(self._link.devices()):
                self._send(current, device)
            arrived = self._receive(min(_POLL_SECONDS, left))

    def _is_open(self, current: OpenRound) -> bool:
        """Whether more replies are needed, and may still come."""
        if isinstance(self._plan.aggregator, FedBuffConfig):  # late replies fill the buffer as well as fresh ones
            return len(current.answered) + current.late < self._plan.aggregator.buffer and bool(self._busy)
        needed = math.ceil(self._plan.rounds.quorum * len(current.tries))
        return len(current.answered & current.tries.keys()) < needed and bool(current.expected())

    def _take(self, current: OpenRound, reply: Reply, version: int) -> None:
        if reply.data is not None:
            current.arrived(reply.device, len(reply.data), is_late=version != current.version)
            self._judge(current, self._screening.receive(reply.device, reply.data))
        elif version == current.version:
            current.fail(reply.device, reply.failure, is_lost=reply.is_lost)

    def _judge(self, current: OpenRound, verdicts: list[Verdict]) -> None:
        for verdict in verdicts:
            if isinstance(verdict, Rejected):
                current.reject(verdict)
                continue
            try:
                self._aggregator.add(verdict)
            except UserError as error:  # the spool's disk is full; the round's earlier replies are untouched
                current.fail(verdict.device, str(error), is_lost=False)
            else:
                current.accept(verdict)

    def _complete(self, current: OpenRound, flat: FloatArray) -> Record:
        """Save; a full disk is waited for, as all that the devices did would be lost."""
        record = current.record(self.version + 1, None if self._accountant is None else self._accountant.epsilon)
        completed = Completed(record, flat, self._aggregator.carried, self._screening.as_dict())
        while True:
            try:
                self.history.save(completed)
            except OSError as error:
                self._tell(f"cannot save: {error.strerror}", current)
                self._pause(_FULL_DISK_SECONDS)
            else:
                self._last = completed
                self._forget_releases()
                return record

    def _forget_releases(self) -> None:
        for device in self._released:
            with contextlib.suppress(OSError):  # it would be released once more, that is all
                orders.forget_release(self._folder, device)
        self._released.clear()

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._early += self._receive(min(_POLL_SECONDS, left))

    def _tell(self, phase: str, current: OpenRound | None = None) -> None:
        """Say where the federation stands; a disk that is full must not stop it."""
        status: dict[str, object] = {"phase": phase, "version": self.version, "time": now()}
        status["quarantine"] = dict(self._screening.quarantine.held)
        if current is not None:
            status |= current.as_dict()
        with contextlib.suppress(OSError):
            orders.tell(self._folder, status)


def _open_accountant(folder: Path, plan: Plan) -> Accountant | None:
    if plan.privacy is None:
        return None
    accountant = Accountant(plan.privacy.delta, plan.privacy.max_epsilon)
    with contextlib.suppress(FileNotFoundError):
        accountant.restore((folder / "privacy.json").read_text())
    return accountant
