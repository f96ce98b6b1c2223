"""A program kept running beside this one: restarted when it ends, stopped whole, and gone when this one is gone."""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from lowssl_core.errors import UserError

_PAUSES = (1.0, 2.0, 4.0, 8.0, *(15.0,) * 8, 120.0)  # seconds before it is started again, the last one for ever
_STEADY = 60.0  # seconds of running after which an end is no sign of trouble
_POLL = 0.1
_MAX_LOG, _TAIL = 10_000_000, 2**18
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class KeptProcess:
    """A program that is started again whenever it ends, at first after a second, in the end every two minutes.

    Between the two stands a small warden, this module run as a program. When the program ends, when it is to be
    stopped, and when this process dies, however that happens, the warden ends everything that the program has
    started: asked first, killed after a while. Orphans would go on under the identity that their successors use.
    Output is appended to a log, which becomes `NAME.old` at a start at which it has passed 10 MB. For Linux.

    Args:
        command: program and arguments.
        environment: all of its environment; its PATH is where the program is looked for.
        log: where its output goes.
        grace_seconds: between being asked to end and being killed.

    Attributes:
        starts: how many times it was started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        grace_seconds: float = 10.0,
    ) -> None:
        self.command, self.log = list(command), log
        self._grace_seconds = grace_seconds
        self.starts = 0
        self._environment = dict(environment)
        self._warden: subprocess.Popen[bytes] | None = None
        self._is_stopping = threading.Event()
        # The kernel ties a child's life to the thread that made it: this one lives as long as the program is kept.
        self._thread = threading.Thread(target=self._keep, name=f"keeps {self.command[0]}", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The program's process id; None while it does not run."""
        warden = self._warden
        children = [] if warden is None else _children(warden.pid)
        return min(children, default=None)  # started first; what it orphaned comes later

    def start(self) -> None:
        """Begin to keep the program running.

        Raises:
            UserError: there is no such program.
        """
        if shutil.which(self.command[0], path=self._environment.get("PATH")) is None:
            raise UserError(f"{self.command[0]} is not installed")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def stop(self) -> None:
        """End the program and all that it has started."""
        self._is_stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def tail(self, lines: int = 20) -> str:
        """The last lines of its log, of 256 kB at most."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - _TAIL))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def _keep(self) -> None:
        quick_ends = 0
        while not self._is_stopping.is_set():
            began = time.monotonic()
            with contextlib.suppress(OSError):  # no space for its log, no memory for a process: as if it had ended
                self._warden = self._launch()
                self._watch(self._warden)
            self._warden = None
            quick_ends = 1 if time.monotonic() - began > _STEADY else quick_ends + 1
            self._is_stopping.wait(_PAUSES[min(quick_ends, len(_PAUSES)) - 1])

    def _watch(self, warden: subprocess.Popen[bytes]) -> None:
        while warden.poll() is None and not self._is_stopping.wait(_POLL):
            pass
        if warden.poll() is None:
            warden.send_signal(signal.SIGTERM)
            warden.wait()

    def _launch(self) -> subprocess.Popen[bytes]:
        if self.log.exists() and self.log.stat().st_size > _MAX_LOG:
            self.log.replace(self.log.with_name(self.log.name + ".old"))
        self.starts += 1
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", __name__, str(os.getpid()), str(self._grace_seconds), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )


def programs_path() -> str:
    """PATH with the folder of this Python's own programs first, for programs that start each other by name."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at, for a program that is told where to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(ancestor: int) -> list[int]:
    """The processes that descend from one, nearest first."""
    found = _children(ancestor)
    for pid in found:  # grows as it goes
        found += _children(pid)
    return found


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def _guard(keeper: int, grace_seconds: float, command: list[str]) -> None:
    """Be the warden: run `command`, and end with all of its descendants when it ends, or SIGTERM comes.

    It comes from the keeper, and from the kernel when the keeper dies. As their reaper the warden inherits orphans, so
    that nothing that was started escapes, in whatever session it is.
    """
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != keeper:  # it died before it could be watched
        return
    program = os.fork()
    if program == 0:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # should the warden itself be killed
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        os.execvp(command[0], command)
    while signal.sigwait(signals) == signal.SIGCHLD and program not in _reap():
        pass
    deadline = time.monotonic() + grace_seconds
    _signal(descendants(os.getpid()), signal.SIGTERM)
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        _reap()
        time.sleep(_POLL)
    while left:
        _signal(left, signal.SIGKILL)
        time.sleep(_POLL)
        _reap()
        left = descendants(os.getpid())


def _reap() -> set[int]:
    """Take leave of the children that have ended; returns which."""
    ended = set()
    with contextlib.suppress(ChildProcessError):
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            ended.add(pid)
    return ended


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


if __name__ == "__main__":
    _guard(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
