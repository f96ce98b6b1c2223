"""The agent on its socket: one reply a task whatever happens, and words for why there is none."""

import contextlib
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_device import MANIFEST, AddingLearner

from client.agent import SOCKET, Agent, Learner
from client.channel import ChannelError, Frame, ask
from client.identity import open_identity, pin_server
from lowssl_core.errors import UserError
from lowssl_core.protocol.codec import decode_flat, encode_flat
from lowssl_core.protocol.messages import Task, Update, read_message, write_message
from server.federation.certificates import open_certificate

PATIENCE = 120.0
START = np.linspace(0.5, 1.5, MANIFEST.size, dtype=np.float32)


def task(round_: int = 1, *, steps: int = 3, seconds: float = 60.0, pause: float = 0.0) -> bytes:
    return write_message(
        Task(
            round=round_,
            run="run",
            version=round_ - 1,
            manifest=MANIFEST.hash,
            recipe={"steps": steps, "seconds": pause},
            codec="fp32",
            seconds=seconds,
            payload=encode_flat(START, MANIFEST, "fp32"),
        )
    )


@contextmanager
def agent_of(learner: Learner, folder: Path, **arguments: Any) -> Iterator[Path]:
    """An agent that runs in a thread; gives its socket."""
    with Agent(lambda: learner, folder, **arguments) as agent:
        thread = threading.Thread(target=agent.run)
        thread.start()
        try:
            yield folder / SOCKET
        finally:
            agent.close()
            thread.join(PATIENCE)
            assert not thread.is_alive()


def submit(path: Path, data: bytes) -> "Future[Frame]":
    """Ask for a task's update in another thread."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(ask, path, Frame({"ask": "task"}, data), seconds=PATIENCE)
    pool.shutdown(wait=False)
    return future


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def status(path: Path) -> dict[str, Any]:
    return dict(ask(path, Frame({"ask": "status"}), seconds=PATIENCE).header)


def trainings(folder: Path) -> int:
    journal = folder / "trained.jsonl"
    return len(journal.read_text().splitlines()) if journal.exists() else 0


def test_an_update_holds_what_the_learner_learned(tmp_path: Path) -> None:
    with agent_of(AddingLearner(tmp_path, "a", 0.25), tmp_path) as path:
        answer = ask(path, Frame({"ask": "task"}, task()), seconds=PATIENCE)
    assert answer.header == {"ok": True}
    update = read_message(Update, answer.body, max_payload=2**20)
    delta = decode_flat(update.payload, MANIFEST)
    np.testing.assert_allclose(delta[:2000], 0.25, atol=1e-6)
    np.testing.assert_array_equal(delta[2000:], START[2000:])


def test_the_same_task_gets_the_same_reply_without_training_also_from_another_agent(tmp_path: Path) -> None:
    replies = []
    for _ in range(2):
        with agent_of(AddingLearner(tmp_path, "a", 1), tmp_path) as path:
            replies += [ask(path, Frame({"ask": "task"}, task()), seconds=PATIENCE).body for _ in range(2)]
    assert len(set(replies)) == 1
    assert trainings(tmp_path) == 1


def test_two_that_ask_for_the_same_task_at_once_wait_for_one_training(tmp_path: Path) -> None:
    data = task(pause=0.1)
    with agent_of(AddingLearner(tmp_path, "a", 1), tmp_path) as path:
        answers = [future.result(PATIENCE) for future in [submit(path, data), submit(path, data)]]
    assert answers[0].body == answers[1].body != b""
    assert trainings(tmp_path) == 1


def test_a_newer_task_ends_an_older_one_and_an_older_one_is_refused(tmp_path: Path) -> None:
    with agent_of(AddingLearner(tmp_path, "a", 1), tmp_path) as path:
        second = submit(path, task(2, steps=10_000, pause=0.01))
        wait_for(lambda: status(path)["round"] == 2)
        first = ask(path, Frame({"ask": "task"}, task(1)), seconds=PATIENCE)
        assert (first.header["ok"], first.header["reason"]) == (False, "busy with round 2")
        third = submit(path, task(3))
        assert second.result(PATIENCE).header["reason"] == "round 2 was given up for a newer one"
        assert third.result(PATIENCE).header["ok"]


def test_a_paused_agent_says_so_and_goes_on_when_resumed(tmp_path: Path) -> None:
    with agent_of(AddingLearner(tmp_path, "a", 1), tmp_path) as path:
        assert ask(path, Frame({"ask": "pause"}), seconds=PATIENCE).header["ok"]
        answer = submit(path, task())
        wait_for(lambda: status(path)["stage"] == "training")
        assert status(path)["waiting"] == ["paused"]
        assert not answer.done()
        ask(path, Frame({"ask": "resume"}), seconds=PATIENCE)
        assert answer.result(PATIENCE).header["ok"]
        assert status(path)["waiting"] == []


def test_a_pause_outlives_the_agent(tmp_path: Path) -> None:
    with agent_of(AddingLearner(tmp_path, "a", 1), tmp_path) as path:
        ask(path, Frame({"ask": "pause"}), seconds=PATIENCE)
    with agent_of(AddingLearner(tmp_path, "a", 1), tmp_path) as path:
        assert status(path)["paused"] is True


def test_work_that_must_wait_beyond_the_deadline_is_refused_with_the_reason(tmp_path: Path) -> None:
    with agent_of(AddingLearner(tmp_path, "a", 1), tmp_path, waiting=lambda: ["battery at 12 %"]) as path:
        answer = ask(path, Frame({"ask": "task"}, task(seconds=0.2)), seconds=PATIENCE)
    assert answer.header == {"ok": False, "reason": "waiting: battery at 12 %"}
    assert trainings(tmp_path) == 0


def test_a_learner_that_fails_costs_the_round_and_not_the_agent(tmp_path: Path) -> None:
    class Failing(AddingLearner):
        def learn(self, task: Task) -> Generator[object, None, Update]:
            if task.round == 1:
                raise RuntimeError("out of memory")
            return (yield from super().learn(task))

    with agent_of(Failing(tmp_path, "a", 1), tmp_path) as path:
        first = ask(path, Frame({"ask": "task"}, task(1)), seconds=PATIENCE)
        second = ask(path, Frame({"ask": "task"}, task(2)), seconds=PATIENCE)
    assert first.header == {"ok": False, "reason": "RuntimeError: out of memory"}
    assert second.header["ok"]


def test_small_work_that_runs_out_of_memory_is_tried_again(tmp_path: Path) -> None:
    tries = []

    def look() -> None:
        tries.append(1)
        raise MemoryError

    with agent_of(AddingLearner(tmp_path, "a", 1), tmp_path, at_leisure=look, leisure_seconds=0.01) as path:
        wait_for(lambda: len(tries) >= 2)
        assert ask(path, Frame({"ask": "task"}, task()), seconds=PATIENCE).header["ok"]


def test_a_full_disk_costs_the_round_and_the_learner_is_opened_anew(tmp_path: Path) -> None:
    opened = []

    class Full(AddingLearner):
        def learn(self, task: Task) -> Generator[object, None, Update]:
            if len(opened) == 1:
                raise OSError(28, "No space left on device")
            return (yield from super().learn(task))

    def open_learner() -> Full:
        opened.append(Full(tmp_path, "a", 1))
        return opened[-1]

    with Agent(open_learner, tmp_path) as agent:
        thread = threading.Thread(target=agent.run)
        thread.start()
        first = ask(tmp_path / SOCKET, Frame({"ask": "task"}, task()), seconds=PATIENCE)
        second = ask(tmp_path / SOCKET, Frame({"ask": "task"}, task()), seconds=PATIENCE)
        agent.close()
        thread.join(PATIENCE)
    assert "No space left" in first.header["reason"]
    assert second.header["ok"]
    assert len(opened) == 2


def test_a_reply_that_does_not_fit_on_the_disk_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, write: object) -> None:
        raise OSError(28, "No space left on device")

    with agent_of(AddingLearner(tmp_path, "a", 1), tmp_path) as path:
        with monkeypatch.context() as patch:
            patch.setattr("client.agent.write_atomically", full)
            first = ask(path, Frame({"ask": "task"}, task()), seconds=PATIENCE)
        second = ask(path, Frame({"ask": "task"}, task()), seconds=PATIENCE)
    assert "No space left" in first.header["reason"]
    assert second.header["ok"]


@pytest.mark.parametrize(
    "data", [b"", b"GET / HTTP/1.1\r\n\r\n", b"LAG1" + b"\xff" * 12, b"LAG1" + b"\0\0\0\2" + b"\0" * 8 + b"[]"]
)
def test_what_is_no_frame_gets_no_answer_and_harms_nobody(tmp_path: Path, data: bytes) -> None:
    with agent_of(AddingLearner(tmp_path, "a", 1), tmp_path) as path:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):  # what it did not read is thrown away
                assert connection.recv(1) == b""
        assert status(path)["ok"]


def test_what_is_no_task_is_refused_with_the_reason(tmp_path: Path) -> None:
    with agent_of(AddingLearner(tmp_path, "a", 1), tmp_path) as path:
        answers = [ask(path, Frame({"ask": "task"}, data), seconds=PATIENCE) for data in (b"", task()[:50])]
        other = ask(path, Frame({"ask": "weather"}), seconds=PATIENCE)
    assert all(not answer.header["ok"] and answer.header["reason"].startswith("message: ") for answer in answers)
    assert "weather" in other.header["reason"]


def test_nobody_listens_or_somebody_does_already(tmp_path: Path) -> None:
    with pytest.raises(ChannelError, match="no agent listens at"):
        ask(tmp_path / SOCKET, Frame({"ask": "status"}))
    with agent_of(AddingLearner(tmp_path, "a", 1), tmp_path), pytest.raises(UserError, match="an agent runs already"):
        Agent(lambda: AddingLearner(tmp_path, "a", 1), tmp_path)


def test_an_agent_is_reached_in_a_folder_deeper_than_a_socket_s_address(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120) / ("y" * 120)
    folder.mkdir(parents=True)
    with agent_of(AddingLearner(folder, "a", 1), folder) as path:
        assert ask(path, Frame({"ask": "status"}), seconds=PATIENCE).header["ok"]


_PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from federation_device import AddingLearner
from client.agent import Agent
folder = Path(sys.argv[1])
with Agent(lambda: AddingLearner(folder, "a", 1), folder) as agent:
    agent.run()
"""


def start_program(folder: Path) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, str(folder), str(Path(__file__).parent)])
    try:
        wait_for(lambda: (folder / SOCKET).exists() and is_alive(folder))
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process


def is_alive(folder: Path) -> bool:
    try:
        return bool(status(folder / SOCKET)["ok"])
    except ChannelError:
        return False


def test_an_agent_killed_at_any_moment_answers_a_task_once(tmp_path: Path) -> None:
    """Killed in training, between training and reply, and after it: each task's reply is always the same bytes."""
    generator = np.random.default_rng(0)
    data = task(steps=4, pause=0.02)
    replies = set()
    for _ in range(6):
        process = start_program(tmp_path)
        answer = submit(tmp_path / SOCKET, data)
        time.sleep(generator.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        with contextlib.suppress(ChannelError):  # it was killed before it had answered
            replies.add(answer.result(PATIENCE).body)
    process = start_program(tmp_path)
    try:
        before = trainings(tmp_path)
        replies.add(ask(tmp_path / SOCKET, Frame({"ask": "task"}, data), seconds=PATIENCE).body)
        replies.add(ask(tmp_path / SOCKET, Frame({"ask": "task"}, data), seconds=PATIENCE).body)
        assert trainings(tmp_path) <= before + 1
    finally:
        process.kill()
        process.wait()
    assert len(replies) == 1


def test_a_key_is_made_once_private_and_names_the_device(tmp_path: Path) -> None:
    first, second = open_identity(tmp_path), open_identity(tmp_path)
    assert first == second
    assert first.public.startswith("ecdsa-sha2-nistp384 ")
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o600
    assert open_identity(tmp_path / "other").device != first.device
    first.path.chmod(0o644)
    with pytest.raises(UserError, match="can be read by others"):
        open_identity(tmp_path)
    first.path.write_text("no key")
    first.path.chmod(0o600)
    with pytest.raises(UserError, match="holds no private key"):
        open_identity(tmp_path)


@contextmanager
def tls_server(folder: Path) -> Iterator[int]:
    """A TLS server that shakes hands; gives its port."""
    certificate = open_certificate(folder, "server", ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.path, certificate.key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                    with context.wrap_socket(connection, server_side=True) as secured:
                        secured.recv(1)
                except OSError:
                    if listener.fileno() < 0:
                        return

        thread = threading.Thread(target=serve)
        thread.start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(PATIENCE)


def test_a_server_is_pinned_and_another_one_is_noticed(tmp_path: Path) -> None:
    with tls_server(tmp_path / "one") as port:
        pinned = pin_server(tmp_path, "127.0.0.1", port)
        assert pinned.read_text() == (tmp_path / "one" / "server.pem").read_text()
        assert pin_server(tmp_path, "127.0.0.1", port) == pinned
        with pytest.raises(UserError, match="this is another server"):
            pin_server(tmp_path, "127.0.0.1", port, fingerprint="00" * 32)
        context = ssl.create_default_context(cafile=str(pinned))
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1"),
        ):
            pass
    with tls_server(tmp_path / "two") as port, pytest.raises(UserError, match="not the one it showed before"):
        pin_server(tmp_path, "127.0.0.1", port)
    with pytest.raises(UserError, match="cannot be reached over TLS"):
        pin_server(tmp_path, "127.0.0.1", port, seconds=1.0)
