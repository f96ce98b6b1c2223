"""Rounds of a plain Flower app on Flower's own programs: the yardstick of benchmarks/federation.py."""

import json
import shutil
import subprocess
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from client.identity import open_identity
from client.node import Node
from lowssl_core.errors import UserError
from server.federation.superlink import SuperLink, flower_environment

_APP = Path(__file__).with_name("flower_app.py")
_PYPROJECT = """\
[project]
name = "plain-flower"
version = "1.0.0"
[tool.flwr.app]
publisher = "lowssl"
[tool.flwr.app.components]
serverapp = "flower_app:server"
clientapp = "flower_app:client"
[tool.flwr.app.config]
times = "{times}"
backbone = "{backbone}"
batch = {batch}
devices = {devices}
rounds = {rounds}
"""
_PATIENCE = 600.0  # seconds without a completed round
_POLL = 0.2


def plain_rounds(folder: Path, *, backbone: str, devices: int, rounds: int, batch: int) -> list[float]:
    """Seconds of each round from the second on, by Flower's FedAvg and a ClientApp that trains nothing.

    SuperLink and SuperNodes are LowSSL's own, with keys and TLS, but the devices call the SuperLink itself: there is
    no public server between.

    Args:
        folder: an empty one, for everything.
        backbone: whose weights travel, with the head of MoCo, as Flower's tutorials send them: a float32 array for
            each tensor, through a ClientApp that imports torch; "": one number travels, and there is no torch.
        devices: how many.
        rounds: how many, the first one included.
        batch: of the network that is built.

    Raises:
        UserError: Flower is not installed or does not start, or no round came for ten minutes.
    """
    times, bundle = (folder / "times.json").absolute(), folder / "app"
    bundle.mkdir(parents=True)
    shutil.copy(_APP, bundle)
    settings = {"times": times, "backbone": backbone, "batch": batch, "devices": devices, "rounds": rounds}
    (bundle / "pyproject.toml").write_text(_PYPROJECT.format(**settings))
    with ExitStack() as stack:
        superlink = stack.enter_context(SuperLink(folder / "server"))
        for index in range(1, devices + 1):
            home = folder / f"device {index}"
            home.mkdir()
            identity = open_identity(home)
            superlink.register(identity.public, home.name)
            stack.enter_context(Node(superlink.address, identity, home, certificate=superlink.certificate.path))
        _start(bundle, superlink)
        moments = _wait(times, rounds)
    return [after - before for before, after in pairwise(moments[1:])]


def _start(bundle: Path, superlink: SuperLink) -> None:
    """Start the app; UserError with what Flower says if it does not."""
    environment = flower_environment(superlink.certificate.path.parent)
    command = ["flwr", "run", str(bundle), "federation", "--format", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not json.loads(done.stdout).get("success"):
        raise UserError(f"flwr run: {(done.stderr or done.stdout).strip()[-300:]}")


def _wait(times: Path, rounds: int) -> list[float]:
    """When the app began and when each of its rounds was over."""
    moments: list[float] = []
    deadline = time.monotonic() + _PATIENCE
    while len(moments) <= rounds:
        failed = times.with_suffix(".failed")
        if failed.exists() or time.monotonic() > deadline:
            why = failed.read_text() if failed.exists() else "it says nothing"
            raise UserError(f"the plain Flower app stopped after {max(0, len(moments) - 1)} rounds: {why}")
        time.sleep(_POLL)
        if times.exists() and len(read := json.loads(times.read_text())) > len(moments):
            moments, deadline = read, time.monotonic() + _PATIENCE
    return moments
