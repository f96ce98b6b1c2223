"""A federation on real processes whose disks run full: the server's, with its SuperLink, and a device's."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from federation_server import Site, site
from small_disk import SmallDisk, small_disk

from client.identity import open_identity
from lowssl_core.processes import descendants
from server.federation import orders
from server.federation.history import History

PLAN = """\
[rounds]
seconds = 30
min_devices = 1

[aggregator]
name = "fedavg"
momentum = 0.0
"""
TOKEN = "from lowssl_core.command_line import main; main()"


@pytest.fixture(scope="module")
def server_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    with small_disk(tmp_path_factory.mktemp("s") / "m", 200_000_000) as disk:
        yield disk


@pytest.fixture(scope="module")
def device_disk(tmp_path_factory: pytest.TempPathFactory, server_disk: SmallDisk) -> Iterator[SmallDisk]:
    with small_disk(tmp_path_factory.mktemp("d") / "m", 20_000_000, beside=server_disk) as disk:
        yield disk


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, server_disk: SmallDisk, device_disk: SmallDisk
) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("site"), server_disk.enter) as made:
        made.data.symlink_to(server_disk.path)
        (made.root / "garden").symlink_to(device_disk.path)
        made.begin(plan=PLAN)
        made.start()
        # SQLite does not open files on a disk that is mounted elsewhere.
        words = ["federation", "token", "--uses", "2", "--data-dir", str(made.data)]
        command = [*server_disk.enter, sys.executable, "-c", TOKEN, *words]
        token = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
        for name, enter in (("kitchen", ()), ("garden", device_disk.enter)):
            made.join(name, token)
            made.start_device(name, seconds=3.0, enter=enter)
        yield made


def device(federation: Site, name: str) -> str:
    return open_identity(federation.root / name).device


def is_collecting(federation: Site) -> bool:
    status = orders.told(federation.folder)
    return status.get("phase") == "collecting" and len(status["asked"]) == 2


def version_of(federation: Site, round_: int) -> str | None:
    with federation.client() as client:
        rows = client.get("/v1/federation/history").json()["rounds"]
    return {row["round"]: row["version"] for row in rows}.get(round_)


def test_a_device_whose_disk_is_full_is_missed_with_the_reason_and_counts_again_later(
    federation: Site, device_disk: SmallDisk
) -> None:
    federation.wait_for(lambda: is_online(federation, 2))
    device_disk.fill()
    federation.lowssl("round")
    federation.wait_for(lambda: History(federation.folder).newest() == 1)
    record = History(federation.folder).records()[1]
    assert [row["device"] for row in record.accepted] == [device(federation, "kitchen")]
    assert "No space left on device" in record.failed[device(federation, "garden")]
    # Of Flower's bundle an empty file was installed, which it would take for the whole of it.
    federation.wait_for(lambda: not list((device_disk.path / "flower" / "apps").glob("*")))
    device_disk.empty()
    federation.lowssl("round")
    federation.wait_for(lambda: History(federation.folder).newest() == 2)
    devices = {device(federation, name) for name in ("kitchen", "garden")}
    assert {row["device"] for row in History(federation.folder).records()[2].accepted} == devices


def is_online(federation: Site, devices: int) -> bool:
    with federation.client() as client:
        rows = client.get("/v1/federation/devices").json()["devices"]
    return [row["status"] for row in rows] == ["online"] * devices


def superlink(federation: Site) -> int:
    assert federation.process is not None
    for pid in descendants(federation.process.pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if words[1].endswith(b"/flower-superlink"):
                return pid
    raise AssertionError("there is no SuperLink")


def test_a_server_whose_disk_is_full_goes_on_when_there_is_space(federation: Site, server_disk: SmallDisk) -> None:
    before = History(federation.folder).newest()
    federation.lowssl("round")
    federation.wait_for(lambda: is_collecting(federation))
    begun = len(federation.log.read_text())
    server_disk.fill()
    os.kill(superlink(federation), signal.SIGKILL)
    federation.wait_for(lambda: '"status":503' in federation.log.read_text()[begun:])
    with federation.client() as client:
        assert client.get("/healthz").status_code == 200
    server_disk.empty()
    federation.wait_for(lambda: History(federation.folder).newest() == before + 1)
    record = History(federation.folder).last().record
    assert len(record.accepted) == 2
    assert np.isfinite(History(federation.folder).last().flat).all()
    federation.wait_for(lambda: version_of(federation, before + 1) is not None)
