"""Flower's SuperLink: kept running where only this machine reaches it, and told what to do by Flower's commands."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically
from lowssl_core.processes import KeptProcess, free_port, programs_path
from server.federation.bundle import write_bundle
from server.federation.certificates import open_certificate

HOST = "127.0.0.1"
_NAME = "federation"
_UNREACHED = "Connection to the SuperLink is unavailable"  # as Flower's command says it
_COMMAND_SECONDS = 60.0
_START_SECONDS, _ATTEMPTS = 60.0, 5
_CONFIG = """\
[superlink]
default = "{name}"

[superlink.{name}]
address = "{address}"
root-certificates = "{certificate}"
"""


class SuperLinkError(UserError):
    """A SuperLink did not start, or refused what it was told; the message ends with its own words."""


@dataclass(frozen=True)
class Registered:
    """A device that may connect.

    Attributes:
        node: Flower's id of it.
        status: "online", "offline", or "registered" if it never came.
    """

    node: int
    status: str


class SuperLink:
    """A SuperLink on a free port of 127.0.0.1, with devices' keys demanded and its state below a folder.

    Whoever reaches its control API may run code on the server and on every device: it is TLS with a certificate of its
    own, and only `/v1/fleet/*` is passed on to it (`server.federation.fleet`).

    Args:
        folder: of the federation; everything of Flower's is below `folder/flower`.
        port: of 127.0.0.1; None: a free one.
        environment: further variables for the ServerApp that it starts.
    """

    def __init__(self, folder: Path, *, port: int | None = None, environment: dict[str, str] | None = None) -> None:
        self._home = folder.resolve() / "flower"
        self._home.mkdir(parents=True, exist_ok=True)
        self._home.chmod(0o700)
        self.certificate = open_certificate(self._home, "superlink", [HOST])
        self.address = f"{HOST}:{port or free_port()}"
        config = _CONFIG.format(name=_NAME, address=self.address, certificate=self.certificate.path)
        write_atomically(self._home / "config.toml", lambda file: file.write(config.encode()))
        self.process = KeptProcess(
            self._command(),
            environment=flower_environment(self._home) | (environment or {}),
            log=self._home / "superlink.log",
        )

    def __enter__(self) -> Self:
        try:
            self.start()
        except SuperLinkError:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and wait until it answers.

        Raises:
            SuperLinkError: it does not; it goes on being started until `stop`.
        """
        self.process.start()
        self.wait()

    def wait(self, seconds: float = _START_SECONDS) -> None:
        """Wait until it answers: at the start, or after it was started again.

        Raises:
            SuperLinkError: it does not, or ends again and again.
        """
        host, _, port = self.address.rpartition(":")
        end, starts = time.monotonic() + seconds, self.process.starts
        while time.monotonic() < end and self.process.starts <= starts + _ATTEMPTS:
            try:
                socket.create_connection((host, int(port)), timeout=1.0).close()
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise SuperLinkError(f"the SuperLink at {self.address} does not answer: {self.process.tail(5)}")

    def restart(self) -> None:
        """End it, and what it has started; a new one comes up by itself."""
        pid = self.process.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def stop(self) -> None:
        """Stop it, and what it has started."""
        self.process.stop()

    def register(self, public_key: str, name: str) -> int:
        """Let a device connect; returns Flower's id of it.

        Args:
            public_key: of the device, one line in OpenSSH's format.
            name: for people.

        Raises:
            SuperLinkError: the key is not such a key, or is or was registered: Flower forgets none.
        """
        path = self._home / "registering.pub"
        write_atomically(path, lambda file: file.write(public_key.encode()))
        answer = self._tell("supernode", "register", str(path), _NAME, "--name", name)
        path.unlink()
        return int(answer["node-id"])

    def unregister(self, node: int) -> None:
        """Never let a device connect again.

        Raises:
            SuperLinkError: there is no such device.
        """
        unregister_device(self._home.parent, node)

    def devices(self) -> list[Registered]:
        """The devices that may connect. Raises SuperLinkError if it does not answer."""
        return _devices(self._home)

    def start_run(self) -> int:
        """Start the ServerApp; returns the run's id. Raises SuperLinkError if it is refused."""
        # A bundle whose installation was cut off, by a kill or a full disk, is one that Flower takes for whole.
        shutil.rmtree(self._home / "apps", ignore_errors=True)
        bundle = write_bundle(self._home / "bundle")
        return int(self._tell("run", str(bundle), _NAME)["run-id"])

    def _command(self) -> list[str]:
        host, _, port = self.address.rpartition(":")
        certificate = self.certificate
        return [
            "flower-superlink",
            *("--host", host, "--port", port, "--database", str(self._home / "state.db")),
            *("--ssl-ca-certfile", str(certificate.path)),
            *("--ssl-certfile", str(certificate.path), "--ssl-keyfile", str(certificate.key)),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        ]

    def _tell(self, *words: str) -> dict[str, Any]:
        return _tell(self._home, *words)


def registered_devices(folder: Path) -> list[Registered]:
    """The devices that may connect to the federation of a folder, whose SuperLink another process runs.

    Raises:
        SuperLinkError: it does not answer.
    """
    return _devices(folder.resolve() / "flower")


def unregister_device(folder: Path, node: int) -> None:
    """Never let a device connect again to the federation of a folder. Raises SuperLinkError if there is none."""
    _tell(folder.resolve() / "flower", "supernode", "unregister", str(node), _NAME)


def _devices(home: Path) -> list[Registered]:
    nodes = _tell(home, "supernode", "list", _NAME)["nodes"]
    found = [Registered(int(node["node-id"]), str(node["status"]).lower()) for node in nodes]
    return [device for device in found if device.status != "unregistered"]  # Flower lists those for ever


def _tell(home: Path, *words: str) -> dict[str, Any]:
    """Run a command of Flower's, which writes one JSON object."""
    environment = flower_environment(home)
    program = shutil.which("flwr", path=environment["PATH"])
    if program is None:
        raise SuperLinkError("flwr is not installed")
    if not (home / "config.toml").exists():
        raise SuperLinkError("no server runs the federation")
    try:
        done = subprocess.run(
            [program, *words, "--format", "json"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise SuperLinkError(f"flwr {words[0]}: no answer in {_COMMAND_SECONDS:g} s") from None
    except ValueError:
        raise SuperLinkError(f"flwr {words[0]}: {_last_words(done.stdout + done.stderr)}") from None
    if not isinstance(answer, dict) or not answer.get("success"):
        if _UNREACHED in str(answer):
            raise SuperLinkError("no server runs the federation")
        raise SuperLinkError(f"flwr {words[0]}: {_last_words(str(answer))}")
    return answer


def flower_environment(home: Path) -> dict[str, str]:
    """The environment of Flower's programs: their files below `home`, and nothing told to anyone."""
    return {
        **os.environ,
        "PATH": programs_path(),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_COLOR": "1",
        "COLUMNS": "200",  # Flower wraps its error messages to the terminal
    }


def _last_words(text: str) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─]", " ", text)
    return " ".join(plain.split())[-300:] or "it said nothing"
