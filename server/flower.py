"""Everything of Flower on the server: its ServerApp, and the link to the devices over its messages."""

import contextlib
import hashlib
import os
import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from logging import ERROR, INFO
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from flwr.app import Array, ArrayRecord, Context, Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from lowssl_core.errors import UserError
from server.federation import orders
from server.federation.federation import FOLDER, hold_lock
from server.federation.plan import Plan
from server.federation.rounds import Reply, Rounds, Stopped

_KEY = "lowssl"  # of the record that carries a message's bytes, and of the one array in it
_POLL_SECONDS = 0.5
_LOOK_SECONDS = 2.0  # between two looks at which devices are there
_BATCH, _THREADS = 8, 16
_LOCK_SECONDS = 120.0
_LOSSES = (
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds that were ordered for the federation of the environment's folder."""
    folder = Path(os.environ[FOLDER])
    with _alone(folder), contextlib.closing(GridLink(grid)) as link:
        try:
            rounds = Rounds(link, folder, Plan.from_json((folder / "plan.json").read_text()))
            rounds.run(lambda: orders.ordered(folder))
        except Stopped:
            log(INFO, "stopped as asked")
        except UserError as error:  # a budget that is spent, a folder that cannot be used: nothing to try again
            log(ERROR, "%s", error)
            orders.stop(folder)
            orders.tell(folder, {**orders.told(folder), "phase": f"ended: {error}"})
        except Exception as error:  # a bug, or a SuperLink that left: told here, as Flower's own log is hard to find
            orders.tell(folder, {**orders.told(folder), "phase": f"failed: {type(error).__name__}: {error}"})
            raise


@dataclass
class _Sent:
    """A message under way: to whom, since which of the device's starts, until when its reply is taken."""

    device: str
    activated: str
    expires: float
    is_being_pulled: bool = False


class GridLink:
    """The devices behind a Flower Grid, each known by its key's fingerprint.

    Replies are pulled by threads, few at a time: a reply whose upload was cut holds up a pull for three minutes, and
    one that Flower cannot read loses all that were pulled with it. A device that a failed pull was for is sent its
    message again, and that reply is pulled alone. A device that has started anew since it was sent a message has lost
    it: Flower delivers each once.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._nodes: dict[str, tuple[int, str]] = {}  # device: Flower's id of it, time of its last start
        self._looked = -_LOOK_SECONDS
        self._sent: dict[str, _Sent] = {}
        self._alone: set[str] = set()  # devices whose replies are pulled one by one
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._pullers = ThreadPoolExecutor(_THREADS, thread_name_prefix="pull")

    def close(self) -> None:
        """Pull no more."""
        self._pullers.shutdown(wait=False, cancel_futures=True)

    def devices(self) -> Sequence[str]:
        """The devices that are online."""
        if time.monotonic() - self._looked >= _LOOK_SECONDS:
            self._nodes = {
                fingerprint(node.public_key): (node.node_id, node.last_activated_at) for node in self._grid.get_nodes()
            }
            self._looked = time.monotonic()
        return list(self._nodes)

    def send(self, device: str, data: bytes, *, seconds: float) -> None:
        """Send a task; a device that is not there any more gives a reply that says so."""
        if device not in self._nodes:
            self._replies.put(Reply(device, failure="offline", is_lost=True))
            return
        node, activated = self._nodes[device]
        message = Message(to_record(data), dst_node_id=node, message_type=MessageType.TRAIN, ttl=seconds)
        ids = list(self._grid.push_messages([message]))
        if not ids or not ids[0]:
            self._replies.put(Reply(device, failure="the SuperLink did not take the task", is_lost=True))
            return
        self._sent[ids[0]] = _Sent(device, activated, time.monotonic() + seconds)

    def receive(self, seconds: float) -> list[Reply]:
        """What has come since the last call, waiting up to `seconds` for something."""
        deadline = time.monotonic() + seconds
        while True:
            self._give_up()
            self._pull()
            with contextlib.suppress(queue.Empty):
                return [
                    self._replies.get(timeout=min(_POLL_SECONDS, max(0.0, deadline - time.monotonic()))),
                    *self._rest(),
                ]
            if time.monotonic() >= deadline:
                return []

    def _rest(self) -> Iterator[Reply]:
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._replies.get_nowait()

    def _give_up(self) -> None:
        """Forget messages that nobody will answer."""
        self.devices()
        for id_, sent in list(self._sent.items()):
            _, activated = self._nodes.get(sent.device, (0, sent.activated))
            if activated != sent.activated:
                self._sent.pop(id_, None)  # a thread that pulls may have been faster
                self._replies.put(Reply(sent.device, failure="started anew", is_lost=True))
            elif time.monotonic() > sent.expires and self._sent.pop(id_, None) is not None:
                self._replies.put(Reply(sent.device, failure="no answer in time"))

    def _pull(self) -> None:
        waiting = [(id_, sent.device) for id_, sent in list(self._sent.items()) if not sent.is_being_pulled]
        together = [id_ for id_, device in waiting if device not in self._alone]
        batches = [together[start : start + _BATCH] for start in range(0, len(together), _BATCH)]
        batches += [[id_] for id_, device in waiting if device in self._alone]
        for batch in batches:
            self._mark(batch, is_being_pulled=True)
            self._pullers.submit(self._pull_batch, batch)

    def _pull_batch(self, ids: list[str]) -> None:
        try:
            for message in self._grid.pull_messages(ids):
                sent = self._sent.pop(message.metadata.reply_to_message_id, None)
                if sent is None:
                    continue
                self._alone.discard(sent.device)
                reply = _reply(sent.device, message)
                if reply.is_lost:
                    self._looked = -_LOOK_SECONDS  # whether it is there is not what it was at the last look
                self._replies.put(reply)
        except Exception as error:  # the SuperLink's disk is full, for example; it may have handed a reply out already
            for id_ in ids:
                if (sent := self._sent.pop(id_, None)) is not None:
                    self._alone.add(sent.device)
                    self._replies.put(Reply(sent.device, failure=_first_line(str(error)), is_lost=True))
        finally:
            self._mark(ids, is_being_pulled=False)

    def _mark(self, ids: list[str], *, is_being_pulled: bool) -> None:
        for id_ in ids:
            if (sent := self._sent.get(id_)) is not None:
                sent.is_being_pulled = is_being_pulled


def to_record(data: bytes) -> RecordDict:
    """Bytes as the content of a message: an array, because arrays travel in pieces of 5 MB, each tried again."""
    array = Array(dtype="uint8", shape=(len(data),), stype="bytes", data=data)
    return RecordDict({_KEY: ArrayRecord({_KEY: array})})


def from_record(content: RecordDict) -> bytes:
    """The bytes that `to_record` made a record of; ValueError if it is another one."""
    try:
        return bytes(content.array_records[_KEY][_KEY].data)
    except KeyError:
        raise ValueError("a message without LowSSL's record") from None


def fingerprint(public_key: bytes) -> str:
    """A device's id, from its public key as PEM: as the device itself derives it."""
    key = serialization.load_pem_public_key(public_key)
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()[:32]


def _reply(device: str, message: Message) -> Reply:
    if message.has_error():
        error: Error = message.error
        return Reply(device, failure=_first_line(error.reason), is_lost=error.code in _LOSSES)
    try:
        return Reply(device, from_record(message.content))
    except ValueError as error:
        return Reply(device, failure=str(error))


def _first_line(text: str | None) -> str:
    return (text or "no reason given").strip().splitlines()[0][:300]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the federation's lock: the ServerApp of a SuperLink that was killed may not have noticed yet."""
    with contextlib.ExitStack() as stack:
        end = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                stack.enter_context(hold_lock(folder))
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise UserError(f"another process runs the federation in {folder}") from None
                time.sleep(_POLL_SECONDS)
        yield
