"""A server and its devices on this machine: programs that are started and steered by the commands people use."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from lowssl_core.errors import UserError
from lowssl_core.processes import KeptProcess

_ADDRESS = re.compile(r"API +(https://\S+)/embed")
_FINGERPRINT = re.compile(r"(?:[0-9A-F]{2}:){31}[0-9A-F]{2}")
_POLL_SECONDS = 0.2
_SERVER_SECONDS = 120.0  # that it may take to say where it is, on a machine that is busy
_GRACE_SECONDS = 25.0  # agents cut themselves off after 20


class Processes:
    """A server with a federation and its devices, on this machine; all are gone when the context is left.

    Args:
        server: the server's folder.
        folder: of the devices, `NAME/state` and `NAME/images` each, and of all logs.
        config: the devices' settings.
        check: called while something is waited for; may raise to stop.

    Attributes:
        address: of the server, once it runs.
    """

    def __init__(self, server: Path, folder: Path, config: Path, check: Callable[[], None]) -> None:
        self._data, self._folder, self._config, self._check = server, folder, config, check
        self._kept: dict[str, KeptProcess] = {}
        self._fingerprint = ""
        self.address = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Devices take their leave before their server goes.
        devices = [kept for name, kept in self._kept.items() if name != "server"]
        with ThreadPoolExecutor(max(1, len(devices))) as pool:
            list(pool.map(KeptProcess.stop, devices))
        if "server" in self._kept:
            self._kept["server"].stop()

    def start_server(self, probe: Path | None = None) -> None:
        """Start the server, and wait until it says where it is.

        Args:
            probe: folder of the images that its gate looks at; None: those that come along.

        Raises:
            UserError: it does not; the log is named.
        """
        arguments = ("--data-dir", str(self._data), "--port", "0", "--federation")
        # One worker, that does not measure how it would be fastest: nobody asks for embeddings.
        environment = {
            "LOWSSL_SERVER_WORKERS": "1",
            "LOWSSL_SERVER_EXECUTION": "pool",
            "LOWSSL_SERVER_HOST": "127.0.0.1",
        }
        if probe is not None:
            environment["LOWSSL_SERVER_PROBE"] = str(probe.absolute())
        server = self._keep("server", "server.main", *arguments, environment=environment)
        end = time.monotonic() + _SERVER_SECONDS
        while (found := _ADDRESS.search(said := server.tail(100))) is None:
            if time.monotonic() > end:
                raise UserError(f"the server does not say where it is; its words are in {server.log}")
            self.check()
            time.sleep(_POLL_SECONDS)
        self.address = found[1]
        fingerprint = _FINGERPRINT.search(said)
        assert fingerprint is not None, "a server with a federation shows its certificate"
        self._fingerprint = fingerprint[0]

    def token(self, uses: int) -> str:
        """A token that so many devices may join by."""
        return self.lowssl("token", "--uses", str(uses)).strip()

    def start_device(self, name: str, token: str) -> None:
        """Join a device, and let it run on what is in its folder of images.

        Raises:
            UserError: it cannot join.
        """
        state, images = self.state(name), self.images(name)
        trust = ("--token", token, "--fingerprint", self._fingerprint)
        run(self.check, "-m", "client.main", "join", self.address, *trust, "--name", name, "--folder", str(state))
        arguments = ("run", "--folder", str(state), "--images", str(images), "--config", str(self._config))
        self._keep(name, "client.main", *arguments)

    def order(self, rounds: int) -> None:
        """Order so many rounds more."""
        self.lowssl("round", "--count", str(rounds))

    def lowssl(self, *words: str) -> str:
        """What `lowssl federation` prints, on the server's folder; raises as `run`."""
        return run(self.check, "-m", "lowssl_core.command_line", "federation", *words, "--data-dir", str(self._data))

    def check(self) -> None:
        """Raise UserError if a program has ended, and what the caller's own check raises."""
        self._check()
        for name, kept in self._kept.items():
            if kept.starts > 1:
                said = kept.tail(1) or "it said nothing"
                raise UserError(f"{name} ended: {said} (its words are in {kept.log})")

    def pids(self) -> dict[str, int]:
        """The process ids of the programs that run, "server" and the devices' names."""
        return {name: pid for name, kept in self._kept.items() if (pid := kept.pid) is not None}

    def state(self, name: str) -> Path:
        """A device's own folder."""
        return self._folder / name / "state"

    def images(self, name: str) -> Path:
        """The folder where a device's images arrive."""
        return self._folder / name / "images"

    def log(self, name: str) -> Path:
        """Where a program's words go."""
        return self._folder / f"{name}.log"

    def _keep(self, name: str, module: str, *arguments: str, environment: dict[str, str] | None = None) -> KeptProcess:
        command = [sys.executable, "-m", module, *arguments]
        log = self.log(name)
        log.unlink(missing_ok=True)
        kept = KeptProcess(
            command,
            environment={**os.environ, **(environment or {})},
            log=log,
            grace_seconds=_GRACE_SECONDS,
        )
        kept.start()
        self._kept[name] = kept
        return kept


def run(check: Callable[[], None], *arguments: str) -> str:
    """Run Python with some arguments; returns what it printed.

    Args:
        check: called while it runs; may raise, which ends it.
        arguments: of Python.

    Raises:
        UserError: it failed; its last words are in it.
    """
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while True:
                try:
                    printed, errors = process.communicate(timeout=_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    check()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        said = (errors or printed).strip().splitlines() or ["it said nothing"]
        raise UserError(f"{_named(arguments)} failed: {said[-1]}")
    return printed


def _named(arguments: Sequence[str]) -> str:
    """A program by the words that tell it apart."""
    return " ".join(arguments[1:4])
