"""Power cuts: an agent killed at random moments ends where one that ran straight through ends, to the bit."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from test_client_learner import PHOTOS, recipe_of

from client.channel import ChannelError, Frame, ask
from client.contents import count_arrivals, count_memory, looked_at
from client.folder import ARRIVALS, MEMORY, SOCKET
from lowssl_core.backbones import BackboneConfig
from lowssl_core.protocol.codec import decode_flat, encode_flat
from lowssl_core.protocol.manifest import Manifest, manifest_of, pack
from lowssl_core.protocol.messages import Task, Update, read_message, write_message
from lowssl_core.tensor_file import read_tensors

PATIENCE = 60.0
ROUNDS, KILLS_PER_ROUND = 3, 12
RECIPE = dataclasses.replace(recipe_of("moco"), backbone=BackboneConfig(name="resnet_tiny"))


@contextmanager
def forks(enter: Sequence[str] = ()) -> Iterator["subprocess.Popen[str]"]:
    """The program that starts agents, as a command behind `enter`."""
    command = [*enter, sys.executable, str(Path(__file__).with_name("learning_device.py"))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as program:
        try:
            yield program
        finally:
            assert program.stdin is not None
            program.stdin.close()
            program.wait(PATIENCE)


class Device:
    """A folder, the agent on it, and the answers that it gave."""

    def __init__(self, folder: Path, program: "subprocess.Popen[str]") -> None:
        self.folder, self._program, self._pid = folder, program, 0
        self._pool = ThreadPoolExecutor(1)

    def start(self, spare: int | None = None) -> None:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write(f"{self.folder} {spare or ''}\n")
        self._program.stdin.flush()
        self._pid = int(self._program.stdout.readline())
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(ChannelError):
                ask(self.folder / SOCKET, Frame({"ask": "status"}), seconds=PATIENCE)
                return
            assert time.monotonic() < deadline, "the agent does not come up"
            time.sleep(0.005)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            while True:  # a process that is being killed may still write
                os.kill(self._pid, 0)
                time.sleep(0.001)

    def submit(self, task: bytes) -> "Future[Frame]":
        return self._pool.submit(ask, self.folder / SOCKET, Frame({"ask": "task"}, task), seconds=PATIENCE)

    def receive(self, round_: int) -> None:
        (self.folder / "images").mkdir(exist_ok=True, parents=True)
        for index in range(12 * round_, 12 * round_ + 12):
            cv2.imwrite(str(self.folder / "images" / f"{index:03d}.png"), PHOTOS().read(5 * index)[..., ::-1])

    def stage(self) -> str:
        with contextlib.suppress(ChannelError):
            status = ask(self.folder / SOCKET, Frame({"ask": "status"}), seconds=PATIENCE).header
            learner = status["learner"]
            is_training = status["stage"] == "training" and learner.get("round") == status["round"]
            return f"step {learner['round_step']}" if is_training else str(status["stage"])
        return "away"


def model() -> tuple[Manifest, np.ndarray]:
    """A first global model."""
    torch.manual_seed(1)
    method = RECIPE.method.build(RECIPE.backbone, RECIPE.data.batch_size)
    manifest = manifest_of(method)
    return manifest, pack(method.federated_state(), manifest)


def task_of(round_: int, flat: np.ndarray, manifest: Manifest) -> bytes:
    return write_message(
        Task(
            round=round_,
            run="run",
            version=round_,
            manifest=manifest.hash,
            recipe=RECIPE.as_dict(),
            codec="int8",
            seconds=600.0,
            proximal=0.1,
            payload=encode_flat(flat, manifest, "fp32"),
        )
    )


def update_of(answer: Frame) -> Update:
    assert answer.header["ok"], answer.header
    return read_message(Update, answer.body, max_payload=2**24)


def untimed(update: Update) -> Update:
    """An update without how long it took."""
    return dataclasses.replace(update, metrics=dataclasses.replace(update.metrics, seconds=0.0))


def state_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    learner, residual = read_tensors(folder / "learner.safetensors"), read_tensors(folder / "residual.safetensors")
    facts = dict(learner.facts)
    facts["state"] = {**facts["state"], "seconds": None}
    del facts["hash"]  # of the seconds too
    with looked_at(folder / ARRIVALS) as arrivals, looked_at(folder / MEMORY) as memory:
        facts["counts"] = (count_arrivals(arrivals), count_memory(memory))
        facts["keys"] = memory.execute("SELECT key, staged FROM images ORDER BY id").fetchall()
    return {**learner.tensors, **{f"residual.{name}": value for name, value in residual.tensors.items()}}, facts


def test_an_agent_killed_36_times_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    manifest, start = model()
    random = np.random.default_rng(0)
    moments: list[str] = []
    with forks() as program:
        straight, killed = Device(tmp_path / "straight", program), Device(tmp_path / "killed", program)
        for device in (straight, killed):
            device.receive(0)
            device.start()
        flat = start
        for round_ in range(ROUNDS):
            for device in (straight, killed):
                device.receive(round_)
            task = task_of(round_, flat, manifest)
            began = time.monotonic()
            expected = update_of(straight.submit(task).result(PATIENCE))
            seconds = time.monotonic() - began
            replies = set()
            for _ in range(KILLS_PER_ROUND):
                answer = killed.submit(task)
                time.sleep(random.uniform(0, seconds / 2))  # it goes on from the last write: soon it is at the end
                moments.append(killed.stage())
                killed.kill()
                with contextlib.suppress(ChannelError):  # it was killed before it had answered
                    replies.add(answer.result(PATIENCE).body)
                killed.start()
            answer = killed.submit(task).result(PATIENCE)
            assert untimed(update_of(answer)) == untimed(expected)
            assert {*replies, answer.body} == {answer.body}
            flat = flat + decode_flat(expected.payload, manifest)
        tally = [
            ask(device.folder / SOCKET, Frame({"ask": "status"})).header["rounds"] for device in (straight, killed)
        ]
    assert len(moments) == 36
    assert len(set(moments)) > 5, moments
    assert [counts["answered"] for counts in tally] == [ROUNDS, ROUNDS]
    (tensors, facts), (wanted, wanted_facts) = state_of(killed.folder), state_of(straight.folder)
    assert facts == wanted_facts
    assert tensors.keys() == wanted.keys()
    assert [name for name, value in tensors.items() if not torch.equal(value, wanted[name])] == []


def test_a_round_for_which_the_memory_does_not_suffice_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    manifest, start = model()
    task = task_of(0, start, manifest)
    with forks() as program:
        rich, poor = Device(tmp_path / "rich", program), Device(tmp_path / "poor", program)
        for device, spare in ((rich, None), (poor, 80_000_000)):
            device.receive(0)
            device.start(spare)
        expected = update_of(rich.submit(task).result(PATIENCE))
        refused = poor.submit(task).result(PATIENCE).header
        assert not refused["ok"]
        assert "allocate" in refused["reason"] or "MemoryError" in refused["reason"]
        poor.kill()
        poor.start()
        assert untimed(update_of(poor.submit(task).result(PATIENCE))) == untimed(expected)
