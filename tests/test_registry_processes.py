"""Several real processes on one registry, and processes killed in the middle of what they do."""

import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from postgres import new_database
from registry_data import Place, check_whole, description, report
from sqlalchemy import text

from lowssl_core.errors import UserError
from server.registry import pruning
from server.registry.registry import Registry, open_registry
from server.registry.version import Version

# Children are forked from a process that has imported what takes long and nothing else: without torch and its threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["server.registry.registry", "server.database.migrations.running", "psycopg", "pytest", "onnx"]
)

ACTIONS = {"add": 5, "promote": 4, "judge": 2, "refuse": 1, "rollback": 3, "prune": 2}
REFUSALS = ("serves", "judged against", "could serve", "no version", "were pruned")

Told = list[tuple[str, str]]


def work(place: Place, scratch: Path, seed: int, seconds: float, size: int, pipe: Connection) -> None:
    """What a child does: operations by chance until its time is over, each told when it is done.

    There are few contents, so that versions share files, and what nothing names is removed without waiting an hour, so
    that imports and pruning meet.
    """
    pruning.UNNAMED_AGE = timedelta(0)
    rng = random.Random(seed)
    registry = open_registry(place)
    pipe.send(("ready", ""))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        (action,) = rng.choices([*ACTIONS], [*ACTIONS.values()])
        name = f"v{rng.randint(1, max(1, len(registry.versions())))}"
        try:
            pipe.send((action, operate(registry, action, name, scratch / str(seed), rng, size)))
        except UserError as error:
            if not any(words in str(error) for words in REFUSALS):
                raise


def operate(registry: Registry, action: str, name: str, file: Path, rng: random.Random, size: int) -> str:
    """Do one thing; returns the version that it was done to."""
    who = f"process {file.name}"
    if action == "add":
        paths = {role: file.with_suffix(f".{role}") for role in ("onnx", "encoder")}
        for path in paths.values():
            path.write_bytes(bytes([rng.randrange(5)]) * size)
        return registry.add(kind="imported", description=description(), files=paths, who=who).name
    if action == "promote":
        return registry.promote(name, who=who).name
    if action == "judge":
        serving = registry.serving()
        against = None if serving is None else serving.name
        return registry.promote(name, who=who, report=report(name, passed=True, against=against)).name
    if action == "refuse":
        return registry.refuse(name, who=who).name
    if action == "rollback":
        return registry.rollback(who=who).name
    registry.prune(keep=rng.randrange(3), who=who)
    return ""


class Worker:
    """A child process at work on a registry."""

    def __init__(self, place: Place, scratch: Path, *, seed: int, seconds: float, size: int) -> None:
        self._pipe, theirs = PROCESSES.Pipe(duplex=False)
        self.process = PROCESSES.Process(target=work, args=(place, scratch, seed, seconds, size, theirs))
        self.process.start()
        theirs.close()

    def wait_for(self, count: int) -> Told:
        """What it says was done, the first `count` things."""
        assert self._pipe.recv() == ("ready", "")
        return [self._pipe.recv() for _ in range(count)]

    def told(self) -> Told:
        """What it says was done, from here until its end."""
        told = []
        with self._pipe:
            while True:
                try:
                    told.append(self._pipe.recv())
                except EOFError:  # also in the middle of a word, where it was killed
                    break
        self.process.join(timeout=60)
        return [(action, name) for action, name in told if action != "ready"]


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(tmp_path / "data", None if request.param == "sqlite" else new_database())


@pytest.fixture
def start(place: Place, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts workers, none of which outlives the test."""
    with ExitStack() as stack:

        def start(seed: int, *, seconds: float, size: int) -> Worker:
            worker = Worker(place, tmp_path, seed=seed, seconds=seconds, size=size)
            stack.callback(worker.process.join)
            stack.callback(worker.process.kill)
            return worker

        yield start


def check_told(place: Place, told: Told) -> list[Version]:
    """The registry is whole, and whatever a process said was done is in it."""
    registry = open_registry(place)
    check_whole(registry)
    happened = Counter((event.action, event.version) for event in registry.events())
    claimed = Counter(("promote" if action == "judge" else action, name) for action, name in told if action != "prune")
    assert not claimed - happened, "an update was lost"
    versions = registry.versions()
    registry.close()
    return versions


def test_processes_that_start_together_on_nothing_agree_on_one_registry(
    place: Place, start: Callable[..., Worker]
) -> None:
    workers = [start(seed, seconds=0, size=1) for seed in range(4)]
    for worker in workers:
        assert worker.told() == []
        assert worker.process.exitcode == 0
    check_told(place, [])


def test_four_processes_at_once_lose_nothing_and_break_nothing(place: Place, start: Callable[..., Worker]) -> None:
    workers = [start(seed, seconds=4, size=50_000) for seed in range(4)]
    told = [one for worker in workers for one in worker.told()]
    assert [worker.process.exitcode for worker in workers] == [0] * 4
    versions = check_told(place, told)
    counts = Counter(action for action, _ in told)
    assert counts["add"] == len(versions), "each that was added has a number of its own"
    assert set(counts) == set(ACTIONS)


def test_a_registry_is_whole_whenever_a_process_is_killed(place: Place, start: Callable[..., Worker]) -> None:
    rng = random.Random(11)
    told: Told = []
    for seed in range(24):
        worker = start(seed, seconds=60, size=1_000_000)
        told += worker.wait_for(rng.randrange(5))
        time.sleep(rng.uniform(0, 0.05))
        worker.process.kill()
        told += worker.told()
        assert worker.process.exitcode == -9
        check_told(place, told)
    assert len(told) > 24
    registry = open_registry(place)
    if place.database_url is None:
        with registry.database.read() as session:
            assert session.scalar(text("PRAGMA integrity_check")) == "ok"
            assert session.execute(text("PRAGMA foreign_key_check")).all() == []
    # What the killed ones left behind goes when it is old, and nothing else.
    files = place.data_dir / "files"
    old = time.time() - 3700
    for path in files.rglob("*"):
        os.utime(path, (old, old))
    registry.prune(keep=0, who="a test")
    check_whole(registry)
    named = {file.sha256 for version in registry.versions() for file in version.files.values()}
    assert {path.name for path in files.rglob("*") if path.is_file()} == named
    registry.close()


def test_a_registry_can_be_read_while_another_writes(place: Place) -> None:
    registry, other = open_registry(place), open_registry(place)
    with other.database.write():
        assert registry.versions() == []
        assert registry.serving() is None
    registry.close()
    other.close()
