"""The federation of a server: its SuperLink and the run that does what was ordered, both brought back when they die."""

import contextlib
import fcntl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically
from lowssl_core.protocol.manifest import FloatArray, Manifest
from server.federation import orders
from server.federation.history import History
from server.federation.plan import Plan
from server.federation.superlink import SuperLink, SuperLinkError

FOLDER = "LOWSSL_FEDERATION"
"""Environment variable that tells the ServerApp the federation's folder."""

_LOOK_SECONDS = 1.0
_START_SECONDS = 60.0  # that a ServerApp may take from its order to its lock, at first
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 300.0


def begin(folder: Path, manifest: Manifest, flat: FloatArray, plan: Plan) -> History:
    """Start a federation from a model (size,), or change the plan of one that started from the same.

    Raises:
        UserError: the folder holds another federation, or one whose rounds, done or under way, have privacy and would
            have none, or the other way round: its epsilon would be that of some rounds, and read as that of all.
    """
    history, path = History.begin(folder, manifest, flat), folder / "plan.json"
    if path.exists() and (history.newest() > 0 or is_running(folder)):
        was_private = Plan.from_json(path.read_text()).privacy is not None
        if was_private != (plan.privacy is not None):
            had = "with" if was_private else "without"
            raise UserError(f"its rounds run {had} privacy, which stays so: begin another federation in another folder")
    write_atomically(path, lambda file: file.write(plan.to_json().encode()))
    return history


class Federation:
    """Keeps a federation going: a SuperLink, and a run of the ServerApp whenever there are rounds to do.

    Flower fails a run when its SuperLink dies; here a new one goes on from the last completed round. Whether one runs
    is told by a lock that the ServerApp holds, not by Flower.

    Args:
        folder: of the federation, `begin` has made it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.superlink = SuperLink(self.folder, environment={FOLDER: str(self.folder)})
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="federation", daemon=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except UserError:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the SuperLink, and go on with what was ordered.

        Raises:
            UserError: it does not answer yet, but is being tried again; or Flower is not installed.
        """
        try:
            self.superlink.start()
        finally:
            self._thread.start()

    def close(self) -> None:
        """Stop both; a round that is going on is done again after the next start."""
        self._is_stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.superlink.stop()

    def _keep(self) -> None:
        pause, patience = _FIRST_PAUSE, _START_SECONDS
        while not self._is_stopping.wait(_LOOK_SECONDS):
            try:
                if not self._is_due():
                    pause, patience = _FIRST_PAUSE, _START_SECONDS
                    continue
                self._run(patience)
                is_needed_again = self._is_due()
            except (UserError, OSError) as error:  # a full disk, for example: there may be space again
                is_needed_again = True
                with contextlib.suppress(OSError):
                    orders.tell(self.folder, {**orders.told(self.folder), "phase": f"cannot start: {error}"})
            if is_needed_again:
                self._is_stopping.wait(pause)
                pause, patience = min(2 * pause, _LONGEST_PAUSE), min(2 * patience, _LONGEST_PAUSE)

    def _run(self, patience: float) -> None:
        """Start the ServerApp, and wait so many seconds until it runs.

        A SuperLink may have lost what starts its ServerApps, to a full disk or the kernel, without noticing.
        """
        before = orders.told(self.folder)
        self.superlink.wait()
        self.superlink.start_run()
        end = time.monotonic() + patience
        while not is_running(self.folder) and orders.told(self.folder) == before:  # else one has run, and ended
            if self._is_stopping.wait(_LOOK_SECONDS):
                return
            if time.monotonic() > end:
                self.superlink.restart()
                raise SuperLinkError("the SuperLink did not start the run, and is started again")

    def _is_due(self) -> bool:
        """Whether there are rounds to do that nobody does."""
        if orders.is_stopped(self.folder) or is_running(self.folder):
            return False
        wanted = orders.ordered(self.folder)
        return wanted > 0 and wanted > History(self.folder).newest()


def is_running(folder: Path) -> bool:
    """Whether a ServerApp runs the federation."""
    try:
        with hold_lock(folder):
            return False
    except BlockingIOError:
        return True


@contextlib.contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Be the one that runs the federation; BlockingIOError if another is."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
