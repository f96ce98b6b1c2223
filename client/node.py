"""Flower's SuperNode: kept running beside the agent, its files below the device's folder, ended with it."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from client.folder import SOCKET as SOCKET_NAME
from client.identity import Identity
from client.throttle import Throttle
from lowssl_core.processes import KeptProcess, free_port, programs_path

_HOST = "127.0.0.1"
# What flower-supernode writes when it starts, and when the server has let it in.
_BEGINS, _CONNECTED = "Starting Flower SuperNode", "SuperNode ID:"
# What it says for as long as the server is away, and when it is back.
_RETRIES, _BACK = "Connection attempt failed", "Connection successful"
_LAST_LINES = 500
_INSTALLED_SECONDS = 3.0  # that Flower takes to install a bundle, and much more
_PART_BYTES, _PART_SECONDS = 2**20, 5
_FAILURE = re.compile(r"\bfailed\b|ERROR|WARN", re.IGNORECASE)
_COLOR, _LEVEL = re.compile(r"\x1b\[[0-9;]*m"), re.compile(r"^(ERROR|WARNING)\s*:\s*")
_AGENT = "LOWSSL_AGENT"  # as in client.flower, which imports Flower


class Node:
    """Connects a device to a server, and hands the server's messages to the agent in the same folder.

    It is started again whenever it ends: a server that does not know the device's key yet is tried for ever, and one
    that was not told that the device had gone lets it in after a minute. It ends when this process does, however that
    happens.

    Args:
        server: host and port of the server, "HOST:PORT"; it speaks TLS.
        identity: the device's.
        folder: of the device; the agent's socket is in it, Flower's files are below `folder/flower`.
        certificate: that the server's is checked by: its own, or its authority's; None: the well-known authorities.
        throttle: what the server is reached by; None: directly. Proxies of the environment are not used.
    """

    def __init__(
        self,
        server: str,
        identity: Identity,
        folder: Path,
        *,
        certificate: Path | None = None,
        throttle: Throttle | None = None,
    ) -> None:
        home = folder.resolve() / "flower"
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o700)
        self._apps = home / "apps"
        roots = [] if certificate is None else ["--root-certificates", str(certificate)]
        self.process = KeptProcess(
            [
                "flower-supernode",
                *("--superlink", server, *roots),
                *("--auth-supernode-private-key", str(identity.path)),
                *("--host", _HOST, "--port", str(free_port())),
            ],
            environment={
                **_without_proxies(os.environ),
                **_sending(throttle),
                "PATH": programs_path(),
                "FLWR_HOME": str(home),
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_UPDATE_CHECK": "1",
                _AGENT: str(folder.resolve() / SOCKET_NAME),
            },
            log=home / "supernode.log",
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to connect, and stay connected. Raises UserError if Flower is not installed."""
        self.process.start()

    def trouble(self) -> str:
        """Why the device is not connected, by what Flower said last; "" if it is."""
        said = _COLOR.sub("", self.process.tail(_LAST_LINES)).rpartition(_BEGINS)[2].splitlines()
        is_running = self.process.pid is not None
        reached = max((number for number, line in enumerate(said) if _CONNECTED in line or _BACK in line), default=None)
        since = said if reached is None else said[reached + 1 :]
        is_known = reached is not None or len(said) >= _LAST_LINES
        if is_running and is_known and not any(_RETRIES in line for line in since):
            return ""
        failures = [line for line in since if _FAILURE.search(line)]
        return f"not connected: {_LEVEL.sub('', failures[-1]).strip()}" if failures else "not connected yet"

    def mend(self) -> None:
        """Remove a bundle whose installation a full disk or a kill cut off: Flower takes it for whole, for ever."""
        for folder in self._apps.glob("*"):
            with contextlib.suppress(OSError):
                is_old = time.time() - folder.stat().st_mtime > _INSTALLED_SECONDS
                file = folder / "pyproject.toml"  # all that is in it
                if is_old and not (file.exists() and file.stat().st_size):
                    shutil.rmtree(folder)

    def stop(self) -> None:
        """End the connection and everything that serves it."""
        self.process.stop()


def _without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment less its proxies: joining goes by none, and Flower's calls on this machine must not."""
    return {name: value for name, value in environment.items() if not name.lower().endswith("_proxy")}


def _sending(throttle: Throttle | None) -> dict[str, str]:
    """Flower's settings for a way that may be slow: in small parts, one after the other, and through the throttle.

    Flower gives each part 30 seconds and tries it again for ever; its own parts of 5 MiB, two at a time, never get
    through below some 350 kB/s. What has been sent of a message is thrown away 180 seconds after its last part.
    """
    part, proxy = _PART_BYTES, {}
    if throttle is not None:
        part, proxy = min(part, _PART_SECONDS * throttle.bytes_per_second), {"HTTPS_PROXY": throttle.url}
    return {
        "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(part),
        "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES": "1",
        **proxy,
    }
