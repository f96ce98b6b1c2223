"""Flower's SuperNode: kept running beside the agent, its files below the device's folder, ended with it."""

import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from client.agent import SOCKET as SOCKET_NAME
from client.identity import Identity
from lowssl_core.processes import KeptProcess, programs_path

_HOST = "127.0.0.1"
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
    """

    def __init__(self, server: str, identity: Identity, folder: Path, *, certificate: Path | None = None) -> None:
        home = folder.resolve() / "flower"
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o700)
        roots = [] if certificate is None else ["--root-certificates", str(certificate)]
        self.process = KeptProcess(
            [
                "flower-supernode",
                *("--superlink", server, *roots),
                *("--auth-supernode-private-key", str(identity.path)),
                *("--host", _HOST, "--port", str(_free_port())),
            ],
            environment={
                **os.environ,
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

    def stop(self) -> None:
        """End the connection and everything that serves it."""
        self.process.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])
