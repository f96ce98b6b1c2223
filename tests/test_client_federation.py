"""A device as people set it up: joined by a token from a pipe, images dropped in, and a round that begins by itself."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import pytest
from federation_server import Site, site
from test_client_process import SETTINGS

from lowssl_core.photos import open_photos
from lowssl_core.processes import descendants
from server.federation.history import History
from server.federation.joins import Device, list_devices

PLAN = """\
[rounds]
min_devices = 1
seconds = 90

[aggregator]
name = "fedavg"
momentum = 0.0

[schedule]
devices = 1
new_images = 20

[versions]
promote = false
"""
CAP = 300_000


@dataclass
class Person:
    """Who has a server, and sets up a device."""

    site: Site
    agents: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.site.root / "camera"

    def client(self, *words: str, said: str = "") -> str:
        command = [sys.executable, "-m", "client.main", *words, "--folder", str(self.folder)]
        return subprocess.run(command, input=said, capture_output=True, text=True, check=True).stdout

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.client("status", "--json")))

    def run(self) -> "subprocess.Popen[bytes]":
        root = self.site.root
        (root / "images").mkdir()
        settings = SETTINGS.format(steps=4, metered=root / "metered").replace(
            "[images]", "rescan_seconds = 1\n[images]"
        )
        (root / "device.toml").write_text(f"{settings}bytes_per_second = {CAP}\n")
        command = [sys.executable, "-m", "client.main", "run", "--images", str(root / "images")]
        command += ["--config", str(root / "device.toml"), "--folder", str(self.folder)]
        # A proxy of the machine's is none for the device, nor is an exception from it one from the cap.
        nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
        with (root / "device.log").open("ab") as log:
            agent = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | nowhere)
        self.agents.append(agent)
        return agent

    def drop_in(self, name: str, images: int) -> None:
        """Images that come all at once."""
        folder = self.site.root / name
        folder.mkdir()
        for index in range(images):
            cv2.imwrite(str(folder / f"{index:02d}.png"), open_photos().read(7 * index)[..., ::-1])
        folder.rename(self.site.root / "images" / name)

    def heard(self) -> Device:
        with self.site.registry() as registry:
            return list_devices(registry.database)[0]


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    with site(tmp_path) as made:
        made.begin(plan=PLAN)
        made.start()
        person = Person(made)
        yield person
        for agent in person.agents:
            for pid in (agent.pid, *descendants(agent.pid)):
                os.kill(pid, signal.SIGKILL)
            agent.wait()


def connections_to(port: int, pids: list[int]) -> set[int]:
    """Which of the processes have a connection to a port of this machine."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    inodes = {f"socket:[{row[9]}]" for row in rows if row[2] == f"0100007F:{port:04X}"}
    found = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                if os.readlink(link) in inodes:
                    found.add(pid)
            except OSError:
                continue
    return found


def test_a_device_tells_of_new_images_and_trains_in_the_round_that_follows_over_a_capped_line(person: Person) -> None:
    made = person.site
    # The SuperLink is still starting: joining waits for it.
    words = ("join", f"https://127.0.0.1:{made.port}", "--fingerprint", made.fingerprint, "--name", "camera")
    assert "camera" in person.client(*words, "--token", "-", said=made.token() + "\n")

    agent = person.run()
    made.wait_for(lambda: (person.status()["agent"] or {}).get("connection", {}).get("open"))
    assert person.heard().told is None, "nothing new, nothing to tell"
    assert History(made.folder).newest() == 0

    person.drop_in("monday", 24)
    made.wait_for(lambda: person.heard().new_images == 24)
    assert person.status()["news"]["new_images"] == 24
    speaking: set[int] = set()

    def is_done() -> bool:
        speaking.update(connections_to(made.port, [agent.pid, *descendants(agent.pid)]))
        return History(made.folder).newest() == 1

    made.wait_for(is_done)
    assert speaking == {agent.pid}, "Flower's processes reach the server through the agent, which holds the cap, alone"
    record = History(made.folder).last().record
    assert [row["device"] for row in record.accepted] == [person.heard().id]

    # 16 of them were learned from, and the server hears of that: too few are left for another round.
    made.wait_for(lambda: person.heard().new_images == 8)
    facts = person.status()
    assert facts["images"]["learned"] == 16
    assert facts["news"]["new_images"] == 8
    assert re.search(r"news +the server was told of 8 new images \d+ seconds ago", person.client("status"))
    assert History(made.folder).newest() == 1

    agent.send_signal(signal.SIGTERM)
    assert agent.wait(30) == 0
    person.agents.clear()
    assert "told the server of 24 new images" in (made.root / "device.log").read_text()
