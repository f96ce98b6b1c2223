"""Disks that are really full: devices and rounds say so, lose nothing, and go on as soon as there is space."""

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from small_disk import SmallDisk, small_disk
from test_client_kills import PATIENCE, Device, forks, model, state_of, task_of, untimed, update_of
from test_rounds import PLAIN, moved, rounds_of
from test_rounds import Device as Answering

from lowssl_core.protocol.codec import decode_flat
from server.aggregation.robust import MedianConfig
from server.federation import orders
from server.federation.history import History

# Bytes that are left. In the first round of a device: nothing for the index of its images; too little for its memory;
# for its state; and for its state once the optimizer has moments, which is after steps were taken.
SPARES = (0, 40_000, 1_000_000, 20_000_000)


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    with small_disk(tmp_path_factory.mktemp("d") / "m", 128_000_000) as disk:
        yield disk


def refuse(device: Device, task: bytes) -> None:
    answer = device.submit(task).result(PATIENCE).header
    assert answer["ok"] is False
    assert "No space left on device" in answer["reason"]
    assert "move it away" not in answer["reason"]
    assert device.stage() == "idle"


def fill_while_it_trains(disk: SmallDisk, device: Device, task: bytes) -> None:
    answer = device.submit(task)
    while not device.stage().startswith("step "):
        assert not answer.done()
    disk.fill()
    header = answer.result(PATIENCE).header
    assert not header["ok"]
    assert "No space left on device" in header["reason"]


def test_a_device_with_a_full_disk_says_so_and_later_answers_as_one_that_always_had_space(
    disk: SmallDisk, tmp_path: Path
) -> None:
    manifest, flat = model()
    with forks() as outside, forks(disk.enter) as inside:
        spacious, cramped = Device(tmp_path / "spacious", outside), Device(disk.path / "a", inside)
        for device in (spacious, cramped):
            device.receive(0)
            device.start()
        for round_ in range(2):
            for device in (spacious, cramped):
                device.receive(round_)
            task = task_of(round_, flat, manifest)
            expected = update_of(spacious.submit(task).result(PATIENCE))
            for spare in SPARES:
                disk.fill(spare)
                refuse(cramped, task)
                disk.empty()
            fill_while_it_trains(disk, cramped, task)
            disk.empty()
            assert untimed(update_of(cramped.submit(task).result(PATIENCE))) == untimed(expected)
            flat = flat + decode_flat(expected.payload, manifest)
        cramped.kill()
        # SQLite does not open files on a disk that is mounted elsewhere.
        shutil.copytree(disk.path / "a", tmp_path / "cramped", ignore=shutil.ignore_patterns("*.sock"))
    (tensors, facts), (wanted, wanted_facts) = state_of(tmp_path / "cramped"), state_of(spacious.folder)
    assert facts == wanted_facts
    assert [name for name, value in tensors.items() if not torch.equal(value, wanted[name])] == []


def test_a_reply_for_which_there_is_no_space_is_not_sent_and_is_the_same_later(disk: SmallDisk, tmp_path: Path) -> None:
    manifest, flat = model()
    task = task_of(0, flat, manifest)
    with forks() as program:
        spacious, cramped = Device(tmp_path / "spacious", program), Device(tmp_path / "cramped", program)
        for device in (spacious, cramped):
            device.receive(0)
        (cramped.folder / "replies").symlink_to(disk.path)
        for device in (spacious, cramped):
            device.start()
        disk.fill(spare=100_000)
        refuse(cramped, task)
        assert [path.name for path in disk.path.iterdir()] == [".ballast"], "nothing half written stays"
        disk.empty()
        answers = [update_of(device.submit(task).result(PATIENCE)) for device in (spacious, cramped)]
    assert untimed(answers[0]) == untimed(answers[1])


def wait_for_phase(folder: Path, start: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not str(orders.told(folder).get("phase")).startswith(start):
        assert time.monotonic() < deadline, orders.told(folder)
        time.sleep(0.02)


def once_told(folder: Path, phase: str, do: Callable[[], None]) -> threading.Thread:
    def wait() -> None:
        wait_for_phase(folder, phase)
        do()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_round_that_cannot_be_saved_waits_for_space(disk: SmallDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.federation.rounds._FULL_DISK_SECONDS", 0.1)
    devices = [Answering(1, 0.1), Answering(2, 0.3)]
    folder = disk.path / "federation"
    with rounds_of(folder, devices) as rounds:
        disk.fill(spare=2 * 4096)  # for what is told, not for a model of 8 kB and its record
        thread = once_told(folder, "cannot save: No space left on device", disk.empty)
        rounds.run(lambda: 2)
        thread.join()
    history = History(folder)
    assert [record.version for record in history.records()] == [0, 1, 2]
    np.testing.assert_allclose(moved(history), 2 * 0.2, rtol=1e-5)
    assert [len(device.tasks) for device in devices] == [2, 2], "nobody had to train again"


def test_replies_that_cannot_be_kept_make_a_round_void_until_there_is_space(disk: SmallDisk) -> None:
    devices = [Answering(node, 0.1 * node) for node in (1, 2, 3)]
    folder = disk.path / "federation"
    with rounds_of(folder, devices, dataclasses.replace(PLAIN, aggregator=MedianConfig())) as rounds:
        disk.fill(spare=2 * 4096)
        assert rounds.run_round() is None
        told = orders.told(folder)
        assert told["phase"] == "void"
        assert set(told["failed"]) == {device.id for device in devices}
        assert all("cannot be kept: No space left on device" in why for why in told["failed"].values())
        disk.empty()
        rounds.run(lambda: 1)
    np.testing.assert_allclose(moved(History(folder)), 0.2, rtol=1e-5)
