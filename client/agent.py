"""The agent: owns what learns on a device, answers tasks over its socket, and loses nothing when the power goes."""

import hashlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from client.channel import Frame, Listener
from client.folder import PAUSED, REPLIES, SOCKET, TALLY
from client.tally import Tally
from lowssl_core.files import write_atomically
from lowssl_core.protocol import BadUpdate
from lowssl_core.protocol.messages import Task, Update, read_message, write_message

_STOPPED = "the agent was stopped"
_LOOK_SECONDS = 1.0  # between two looks at what the work waits for
_TELL_SECONDS = 30.0  # between two lines of the log about the same round
_LOG = logging.getLogger(__name__)
_MAX_PAYLOAD = 2**33
_KEPT_REPLIES = 3


class Learner(Protocol):
    """What learns: its own state, on its own disk."""

    def learn(self, task: Task) -> Generator[object, None, Update]:
        """Train as a task asks, yielding between two steps; returns the update.

        A generator that is closed, or that a kill cut off, is begun again with the same task: it goes on from what
        was saved. A new task before the last one's update was asked for again means that nobody wants that one.
        """
        ...

    def status(self) -> dict[str, Any]:
        """How things stand, for people: plain values. Called from another thread."""
        ...


@dataclass
class _Work:
    """A task being worked on; those who ask for the same one wait for it together."""

    key: str
    task: Task
    deadline: float
    done: threading.Event = field(default_factory=threading.Event)
    is_superseded: bool = False
    reply: bytes | None = None
    failure: str = ""


class Agent:
    """Answers, over a Unix socket, one task at a time and any number of other questions.

    A question is {"ask": "task"} with the task's bytes, or "status", "pause", "resume"; an answer {"ok": true} with
    what was asked for, or {"ok": false, "reason": ...}. The reply to a task is on disk before it is sent: the same
    task, byte for byte, gets the same reply, after any crash, without any training.

    Args:
        open_learner: opens what learns; used by the thread that calls `run` alone, but for its `status`. Called again
            after an OSError (a full disk): what a learner holds is then not what is on disk.
        folder: of the agent's state: the socket, the last replies, and whether it is paused.
        waiting: why work must wait now, in words; nothing if it may go on. Asked between two steps.
        at_leisure: small work, done by the thread that calls `run` after each task, and while there is none now and
            then.
        leisure_seconds: how often.
        about: what else its status tells. Called from another thread.
    """

    def __init__(
        self,
        open_learner: Callable[[], Learner],
        folder: Path,
        *,
        waiting: Callable[[], Sequence[str]] = lambda: (),
        at_leisure: Callable[[], object] = lambda: None,
        leisure_seconds: float = 60.0,
        about: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._open_learner, self._waiting = open_learner, waiting
        self._at_leisure, self._leisure_seconds, self._about = at_leisure, leisure_seconds, about
        self._learner: Learner | None = open_learner()
        self._replies, self._paused = folder / REPLIES, folder / PAUSED
        self._replies.mkdir(parents=True, exist_ok=True)
        self._tally = Tally(folder / TALLY)
        self._changed = threading.Condition()
        self._work: _Work | None = None
        self._reasons: list[str] = []
        self._is_closed = False
        self._listener = Listener(folder / SOCKET, self._answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End: the work in hand stops between two steps, and whoever waits for it is told."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._listener.close()

    def run(self) -> None:
        """Work on tasks as they come, until `close`."""
        pause = self._leisure_seconds
        while True:
            with self._changed:
                if self._work is None and not self._is_closed:
                    self._changed.wait(pause)
                work = self._work
                if self._is_closed:
                    self._finish(work, failure=_STOPPED)
                    return
            if work is None:
                self._take_leisure()
                pause = self._leisure_seconds
                continue
            pause = 0.0
            try:
                update = self._train(work)
            except _Ended as end:
                self._finish(work, failure=str(end))
            except BadUpdate as error:
                self._finish(work, failure=str(error))
            except OSError as error:
                self._learner = None
                self._finish(work, failure=str(error))
            except Exception as error:
                self._finish(work, failure=f"{type(error).__name__}: {error}")
            else:
                self._finish(work, reply=update)

    def _take_leisure(self) -> None:
        try:
            if not self._waiting():
                self._at_leisure()
        except (OSError, ValueError, MemoryError, sqlite3.Error) as error:
            _LOG.warning("%s", error or type(error).__name__)

    def _train(self, work: _Work) -> bytes:
        _LOG.info("round %d: begun", work.task.round)
        learner = self._learner = self._learner or self._open_learner()
        steps = learner.learn(work.task)
        told = time.monotonic()
        try:
            while True:
                self._wait_until_allowed(work)
                try:
                    next(steps)
                except StopIteration as stop:
                    return self._keep(work.key, stop.value)
                if time.monotonic() - told > _TELL_SECONDS:
                    told = time.monotonic()
                    status = learner.status()
                    _LOG.info(
                        "round %d: step %s of %s", work.task.round, *map(status.get, ("round_step", "round_steps"))
                    )
        finally:
            steps.close()

    def _wait_until_allowed(self, work: _Work) -> None:
        """Come back when work may go on.

        Raises:
            _Ended: it is not wanted any more, or it must wait beyond the round's deadline.
        """
        while True:
            if work.is_superseded:
                raise _Ended(f"round {work.task.round} was given up for a newer one")
            if self._is_closed:
                raise _Ended(_STOPPED)
            reasons = self._why()
            if reasons != self._reasons:
                _LOG.info("round %d: %s", work.task.round, f"waits: {', '.join(reasons)}" if reasons else "goes on")
            self._reasons = reasons
            if not reasons:
                return
            if time.monotonic() > work.deadline:
                raise _Ended(f"waiting: {', '.join(self._reasons)}")
            with self._changed:
                self._changed.wait(_LOOK_SECONDS)

    def _why(self) -> list[str]:
        """Why work waits."""
        return [*(["paused"] if self._paused.exists() else []), *self._waiting()]

    def _keep(self, key: str, update: Update) -> bytes:
        """Put a reply on disk, and drop the oldest ones."""
        reply = write_message(update)
        self._tally.answer(key, update)
        write_atomically(self._replies / key, lambda file: file.write(reply))
        kept = sorted(self._replies.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime_ns)
        for path in kept[:-_KEPT_REPLIES]:
            path.unlink()
        _LOG.info("round %d: answered after %d steps", update.round, update.metrics.steps)
        return reply

    def _finish(self, work: _Work | None, *, reply: bytes | None = None, failure: str = "") -> None:
        if failure and work is not None:
            _LOG.warning("round %d: not answered: %s", work.task.round, failure)
            if failure != _STOPPED:
                self._tally.refuse(work.task.round, failure)
        with self._changed:
            if work is not None:
                work.reply, work.failure = reply, failure
                work.done.set()
                if self._work is work:
                    self._work = None
            self._reasons = []

    def _answer(self, question: Frame) -> Frame:
        match question.header.get("ask"):
            case "task":
                return self._answer_task(question.body)
            case "status":
                return Frame({"ok": True, **self._status()})
            case "pause":
                write_atomically(self._paused, lambda file: None)
                return Frame({"ok": True})
            case "resume":
                self._paused.unlink(missing_ok=True)
                with self._changed:
                    self._changed.notify_all()
                return Frame({"ok": True})
            case other:
                return Frame({"ok": False, "reason": f"the agent does not know {other!r}"})

    def _answer_task(self, data: bytes) -> Frame:
        key = hashlib.sha256(data).hexdigest()
        try:
            return Frame({"ok": True}, (self._replies / key).read_bytes())
        except FileNotFoundError:
            pass
        try:
            task = read_message(Task, data, max_payload=_MAX_PAYLOAD)
        except BadUpdate as error:
            return Frame({"ok": False, "reason": str(error)})
        work = self._take_on(key, task)
        if isinstance(work, str):
            return Frame({"ok": False, "reason": work})
        work.done.wait()
        return Frame({"ok": False, "reason": work.failure}) if work.reply is None else Frame({"ok": True}, work.reply)

    def _take_on(self, key: str, task: Task) -> _Work | str:
        """The work on a task, begun or joined, or why there is none."""
        with self._changed:
            while (work := self._work) is not None and work.key != key and not self._is_closed:
                if work.task.run == task.run and work.task.round > task.round:
                    return f"busy with round {work.task.round}"
                work.is_superseded = True  # the server that sends a newer task has given the older one up
                self._changed.notify_all()
                self._changed.wait(_LOOK_SECONDS)
            if self._is_closed:
                return _STOPPED
            if work is None:
                work = self._work = _Work(key, task, time.monotonic() + task.seconds)
                self._changed.notify_all()
            return work

    def _status(self) -> dict[str, Any]:
        work = self._work
        status: dict[str, Any] = {
            "stage": "idle" if work is None else "training",
            "round": None if work is None else work.task.round,
            "paused": self._paused.exists(),
            "waiting": self._reasons or self._why(),
            "rounds": self._tally.as_dict(),
        }
        learner = self._learner
        return status | self._about() | {"learner": {} if learner is None else learner.status()}


class _Ended(Exception):  # noqa: N818 - what happened
    """Work on a task ends without an update; the message says why."""
