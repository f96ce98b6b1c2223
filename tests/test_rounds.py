"""Rounds over a Grid of our own: what devices do, in time, late, wrongly or not at all, and what the model becomes."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from federation_device import MANIFEST, AddingLearner
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

import client.flower
from client.agent import SOCKET, Agent
from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically
from lowssl_core.protocol.codec import decode_flat, encode_flat
from lowssl_core.protocol.manifest import FloatArray
from lowssl_core.protocol.messages import Metrics, Task, Update, read_message, write_message
from server.aggregation import AGGREGATORS
from server.aggregation.means import FedAvgConfig, FedBuffConfig
from server.aggregation.privacy import BudgetSpent, PrivateMeanConfig
from server.aggregation.screening import ScreeningConfig
from server.federation import orders
from server.federation.federation import begin, hold_lock
from server.federation.history import History
from server.federation.plan import Plan, PrivacyConfig, RoundsConfig
from server.federation.rounds import Rounds, Stopped
from server.flower import GridLink, fingerprint, from_record, to_record

START = np.linspace(0.5, 1.5, MANIFEST.size, dtype=np.float32)
PLAIN = Plan(
    rounds=RoundsConfig(seconds=20, down="fp32", up="fp32"), aggregator=FedAvgConfig(momentum=0.0), recipe={"steps": 1}
)

Behavior = Callable[[Task], bytes | None]


class Device:
    """A device in this process: adds a number to the parameters, unless `behave` does something else."""

    def __init__(self, node: int, number: float, weight: float = 10.0) -> None:
        key = ec.generate_private_key(ec.SECP384R1()).public_key()
        self.public_key = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.id = fingerprint(self.public_key)
        self.node, self.number, self.weight = node, number, weight
        self.activated, self.is_online, self.is_held = "once", True, False
        self.behave: Behavior = self.add
        self.tasks: list[Task] = []

    def add(self, task: Task, **changes: Any) -> bytes:
        flat = decode_flat(task.payload, MANIFEST).copy()
        flat[: MANIFEST.trained_size] = self.number
        update = Update(
            round=task.round,
            base_version=task.version,
            device=self.id,
            update_id=f"{self.id}-{task.version}",
            manifest=MANIFEST.hash,
            weight=self.weight,
            metrics=Metrics(steps=1),
            payload=encode_flat(flat, MANIFEST, task.codec, share=task.share),
        )
        return write_message(replace(update, **changes))


class LocalGrid(Grid):
    """Flower's Grid without Flower's processes: a message is answered, once, when its reply is asked for."""

    def __init__(self, devices: Sequence[Device]) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3  # what messages are made with
        self.by_node = {device.node: device for device in devices}
        self.open: dict[str, Message] = {}
        self.sent = 0
        self._lock = threading.Lock()

    def get_nodes(self) -> list[Any]:
        return [
            SimpleNamespace(node_id=node, public_key=device.public_key, last_activated_at=device.activated)
            for node, device in self.by_node.items()
            if device.is_online
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            self.sent += 1
            message.metadata.__dict__["_message_id"] = str(self.sent)
            self.open[str(self.sent)] = message
            ids.append(str(self.sent))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        with self._lock:
            asked = [self.open[id_] for id_ in message_ids if id_ in self.open]
            free = [message for message in asked if not self.by_node[message.metadata.dst_node_id].is_held]
            for message in free:
                del self.open[message.metadata.message_id]
        answers = [self._answer(self.by_node[message.metadata.dst_node_id], message) for message in free]
        return [answer for answer in answers if answer is not None]

    def _answer(self, device: Device, message: Message) -> Message | None:
        if not device.is_online:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "node unavailable"), reply_to=message)
        task = read_message(Task, from_record(message.content), max_payload=2**20)
        device.tasks.append(task)
        try:
            data = device.behave(task)
        except RuntimeError as error:
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)
        return None if data is None else Message(to_record(data), reply_to=message)

    set_run = run = create_message = get_node_ids = send_and_receive = None  # type: ignore[assignment]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "federation"


@contextmanager
def rounds_of(folder: Path, devices: Sequence[Device], plan: Plan = PLAIN) -> Iterator[Rounds]:
    """Rounds over a link of their own, as a new ServerApp has them."""
    begin(folder, MANIFEST, START, plan)
    with closing(GridLink(LocalGrid(devices))) as link:
        yield Rounds(link, folder, Plan.from_json((folder / "plan.json").read_text()), pause_seconds=0.0)


def run(folder: Path, devices: Sequence[Device], until: int, plan: Plan = PLAIN) -> History:
    with rounds_of(folder, devices, plan) as rounds:
        rounds.run(lambda: until)
    return History(folder)


def with_rounds(**changes: Any) -> Plan:
    return replace(PLAIN, rounds=replace(PLAIN.rounds, **changes))


def moved(history: History) -> FloatArray:
    """How far each parameter of the last model is from the start."""
    return history.last().flat[: MANIFEST.trained_size] - START[: MANIFEST.trained_size]


def test_a_round_moves_the_model_by_the_weighted_mean_of_the_deltas(folder: Path) -> None:
    history = run(folder, [Device(1, 0.1, weight=10), Device(2, 0.4, weight=30)], until=3)
    np.testing.assert_allclose(moved(history), 3 * (0.1 * 10 + 0.4 * 30) / 40, rtol=1e-5)
    np.testing.assert_allclose(history.last().flat[MANIFEST.means], START[MANIFEST.means], rtol=1e-5)
    assert [record.version for record in history.records()] == [0, 1, 2, 3]
    assert all(len(record.accepted) == 2 and not record.rejected for record in history.records()[1:])


@pytest.mark.parametrize("name", [name for name in AGGREGATORS if name != "private_mean"])
def test_every_aggregator_runs_rounds(folder: Path, name: str) -> None:
    config = FedBuffConfig(buffer=4) if name == "fedbuff" else AGGREGATORS[name]()
    history = run(folder, [Device(node, 0.1) for node in range(1, 6)], until=2, plan=replace(PLAIN, aggregator=config))
    assert np.isfinite(history.last().flat).all()
    assert (moved(history) > 0.15).all()


def test_a_quorum_closes_a_round_and_the_straggler_counts_in_the_next_one(folder: Path) -> None:
    devices = [Device(1, 0.1), Device(2, 0.1), Device(3, 0.2)]
    devices[2].is_held = True
    with rounds_of(folder, devices, with_rounds(quorum=0.6)) as rounds:
        first = rounds.run_round()
        devices[2].is_held = False
        time.sleep(0.6)
        second = rounds.run_round()
    assert first is not None
    assert second is not None
    assert [len(first.accepted), len(second.accepted)] == [2, 3]
    (late,) = [row for row in second.accepted if row["device"] == devices[2].id]
    assert late["staleness"] == 1
    assert devices[2].id not in second.asked
    discount = 1 / np.sqrt(2)
    expected = 0.1 + (0.1 + 0.1 + 0.2 * discount) / (2 + discount)
    np.testing.assert_allclose(moved(History(folder)), expected, rtol=1e-5)


def test_a_straggler_beyond_the_age_limit_is_dropped_with_the_reason(folder: Path) -> None:
    devices = [Device(1, 0.1), Device(2, 0.1), Device(3, 0.4)]
    devices[2].is_held = True
    plan = replace(with_rounds(quorum=0.6), screening=ScreeningConfig(max_staleness=1))
    with rounds_of(folder, devices, plan) as rounds:
        rounds.run(lambda: 2)
        devices[2].is_held = False
        time.sleep(0.6)
        rounds.run(lambda: 4)
    reasons = [row["reason"] for record in History(folder).records() for row in record.rejected]
    assert reasons == ["too old"]


def test_a_round_that_too_few_answer_is_void_and_its_replies_count_when_sent_again(folder: Path) -> None:
    devices = [Device(1, 0.1), Device(2, 0.2)]
    devices[1].is_held = True
    with rounds_of(folder, devices, with_rounds(seconds=1.0, quorum=1.0)) as rounds:
        assert rounds.run_round() is None
        assert rounds.version == 0
        assert orders.told(folder)["phase"] == "void"
        devices[1].is_held = False
        time.sleep(0.6)
        rounds.run(lambda: 1)
    assert len(History(folder).records()[1].accepted) == 2
    np.testing.assert_allclose(moved(History(folder)), 0.15, rtol=1e-5)
    assert len({write_message(task) for task in devices[0].tasks}) == 1, "the same round is asked with the same bytes"


def payload(trained: float, *, values: int = MANIFEST.size, dtype: str = "<f4") -> bytes:
    """A payload that is not checked before it is sent, of so many values: `trained`, and sound statistics."""
    flat = np.concatenate([np.full(MANIFEST.trained_size, trained), START[MANIFEST.trained_size :]])
    head = encode_flat(START, MANIFEST, "fp32")[: -4 * MANIFEST.size]
    return head + np.resize(flat, values).astype(dtype).tobytes()


BAD: dict[str, tuple[str, Callable[[Device, Task], bytes]]] = {
    "no message": ("message", lambda device, task: b"\xff" * 100),
    "cut off": ("payload", lambda device, task: device.add(task)[:-100]),
    "NaN": ("payload", lambda device, task: device.add(task, payload=payload(np.nan))),
    "Inf": ("payload", lambda device, task: device.add(task, payload=payload(np.inf))),
    "wrong shape": ("payload", lambda device, task: device.add(task, payload=payload(0.1, values=MANIFEST.size - 4))),
    "wrong dtype": ("payload", lambda device, task: device.add(task, payload=payload(0.1, dtype="<f2"))),
    "wrong dtype, larger": ("message", lambda device, task: device.add(task, payload=payload(0.1, dtype="<f8"))),
    "wrong size": ("payload", lambda device, task: device.add(task, payload=payload(0.1)[:-3])),
    "of another model": ("manifest", lambda device, task: device.add(task, manifest="0" * 64)),
    "no weight": ("weight", lambda device, task: device.add(task, weight=0.0)),
    "negative weight": ("weight", lambda device, task: device.add(task, weight=-5.0)),
    "boosted 1000 times": ("norm", lambda device, task: device.add(task, payload=payload(100.0))),
    "boosted 1e30 times": ("norm", lambda device, task: device.add(task, payload=payload(1e29))),
    "sign flipped": ("direction", lambda device, task: device.add(task, payload=payload(-0.1))),
    "another's name": ("sender", lambda device, task: device.add(task, device="someone-else")),
    "from the future": ("from the future", lambda device, task: device.add(task, base_version=task.version + 7)),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_reply_is_recorded_with_its_reason_and_the_run_goes_on_without_it(folder: Path, fault: str) -> None:
    devices = [Device(node, 0.1) for node in range(5)]
    reason, answer = BAD[fault]
    devices[4].behave = lambda task: answer(devices[4], task)
    history = run(folder, devices, until=4)
    assert [record.version for record in history.records()] == [0, 1, 2, 3, 4]
    for record in history.records()[1:4]:
        (rejected,) = record.rejected
        assert (rejected["device"], rejected["reason"]) == (devices[4].id, reason)
        assert rejected["detail"]
    assert all(len(record.accepted) == 4 for record in history.records()[1:])
    assert devices[4].id not in history.records()[4].asked, "after three faults it is not asked any more"
    np.testing.assert_allclose(moved(history), 4 * 0.1, rtol=1e-5)


def test_a_huge_weight_counts_as_much_as_is_believed_and_the_reason_is_recorded(folder: Path) -> None:
    devices = [Device(node, 0.1) for node in range(4)] + [Device(4, 0.2, weight=1e30)]
    history = run(folder, devices, until=2)
    for record in history.records()[1:]:
        (row,) = [row for row in record.accepted if row["device"] == devices[4].id]
        assert row["weight"] == 10 * 10.0  # ten times the median
        assert row["remarks"] == ["weight 1e+30 counted as 1e+05", "weight 1e+05 counted as 100"]
    np.testing.assert_allclose(moved(history), 2 * (0.1 * 40 + 0.2 * 100) / 140, rtol=1e-5)


def test_a_reply_of_an_old_round_does_not_count_again_whatever_it_calls_itself(folder: Path) -> None:
    devices = [Device(node, 0.1) for node in range(5)]
    plan = replace(with_rounds(quorum=0.8), screening=ScreeningConfig(max_staleness=2))
    answers: list[bytes] = []

    def keep(task: Task) -> bytes:
        answers.append(devices[4].add(task))
        return answers[-1]

    devices[4].behave = keep
    run(folder, devices, until=1, plan=plan)
    devices[4].behave = lambda task: answers[0]  # byte for byte
    run(folder, devices, until=2, plan=plan)
    devices[4].behave = lambda task: devices[4].add(task, update_id=f"{devices[4].id}-0")  # as if it were new
    run(folder, devices, until=3, plan=plan)
    devices[4].behave = lambda task: answers[0]
    history = run(folder, devices, until=4, plan=plan)
    reasons = [[(row["device"], row["reason"]) for row in record.rejected] for record in history.records()[1:]]
    assert reasons == [[], *([(devices[4].id, reason)] for reason in ("repeated", "replayed", "too old"))]
    np.testing.assert_allclose(moved(history), 4 * 0.1, rtol=1e-5)


def test_a_device_in_quarantine_is_not_asked_until_a_person_releases_it(folder: Path) -> None:
    devices = [Device(1, 0.1), Device(2, 0.1), Device(3, 0.4)]
    devices[2].behave = lambda task: b"nonsense"
    history = run(folder, devices, until=5)
    asked = [devices[2].id in record.asked for record in history.records()[1:]]
    assert asked == [True, True, True, False, False]
    assert list(orders.told(folder)["quarantine"]) == [devices[2].id]
    devices[2].behave = devices[2].add
    orders.release(folder, devices[2].id)
    assert devices[2].id in [row["device"] for row in run(folder, devices, until=6).records()[6].accepted]


def test_a_release_counts_while_devices_are_waited_for_and_until_a_round_is_saved_with_it(folder: Path) -> None:
    devices = [Device(1, 0.1), Device(2, 0.1)]
    devices[1].behave = lambda task: b"nonsense"
    run(folder, devices, until=3, plan=with_rounds(min_devices=1))
    devices[1].behave = devices[1].add
    with rounds_of(folder, devices) as rounds, ThreadPoolExecutor(1) as pool:  # both are needed
        running = pool.submit(rounds.run_round)
        wait_for_phase(folder, "waiting for devices")
        orders.release(folder, devices[1].id)
        devices[1].is_held = True
        wait_for_phase(folder, "collecting")
        orders.stop(folder)
        with pytest.raises(Stopped):
            running.result(20)
    assert list(History(folder).last().screening["quarantine"]["held"]) == [devices[1].id]  # type: ignore[index]
    (folder / "stop").unlink()
    devices[1].is_held = False
    (*_, record) = run(folder, devices, until=4).records()
    assert {row["device"] for row in record.accepted} == {device.id for device in devices}
    assert orders.releases(folder) == []


def wait_for_phase(folder: Path, phase: str) -> None:
    end = time.monotonic() + 20
    while not orders.told(folder)["phase"].startswith(phase):
        assert time.monotonic() < end, orders.told(folder)
        time.sleep(0.01)


def test_privacy_is_neither_turned_on_nor_off_once_rounds_are_run(tmp_path: Path) -> None:
    private = Plan(
        rounds=PLAIN.rounds,
        screening=ScreeningConfig(comparison=None, max_staleness=0),
        aggregator=PrivateMeanConfig(clip=1.0, noise_multiplier=1.0, expected_replies=2.0),
        privacy=PrivacyConfig(sampling_rate=1.0, delta=1e-5, max_epsilon=1000),
    )
    for name, first, second in (("with", private, PLAIN), ("without", PLAIN, private)):
        folder = tmp_path / name
        begin(folder, MANIFEST, START, second)
        run(folder, [Device(1, 0.1), Device(2, 0.1)], until=1, plan=first)  # before a round it may be
        with pytest.raises(UserError, match=f"its rounds run {name} privacy, which stays so"):
            begin(folder, MANIFEST, START, second)
        assert Plan.from_json((folder / "plan.json").read_text()).privacy == first.privacy
        # The first round is under way, by the plan that it began with.
        begin(tmp_path / "first" / name, MANIFEST, START, first)
        with hold_lock(tmp_path / "first" / name), pytest.raises(UserError, match=f"its rounds run {name} privacy"):
            begin(tmp_path / "first" / name, MANIFEST, START, second)


def test_a_model_that_would_not_be_finite_is_a_void_round_that_says_so(folder: Path) -> None:
    devices = [Device(1, 0.1), Device(2, 0.1)]
    plan = replace(PLAIN, aggregator=FedAvgConfig(rate=1e300))
    with rounds_of(folder, devices, plan) as rounds, np.errstate(over="ignore"):
        assert rounds.run_round() is None
    assert orders.told(folder)["phase"] == "void: the replies that passed gave a model that is not finite"
    assert run(folder, devices, until=1).records()[1].rejected == ()  # by a rate that can be, the same answers count


def test_one_diverged_device_does_not_stop_the_rounds(folder: Path) -> None:
    devices = [Device(1, 0.1), Device(2, 0.3), Device(3, 0.1)]

    def diverged(task: Task) -> bytes:
        flat = decode_flat(task.payload, MANIFEST).copy()
        flat[: MANIFEST.trained_size], flat[MANIFEST.means] = 0.1, 1e25
        return devices[2].add(task, payload=encode_flat(flat, MANIFEST, "fp32"))

    devices[2].behave = diverged
    history = run(folder, devices, until=1)
    assert [row["reason"] for row in history.records()[1].rejected] == ["statistics"]
    np.testing.assert_allclose(moved(history), 0.2, rtol=1e-5)


def test_a_reply_that_flower_cannot_read_costs_the_others_nothing(folder: Path) -> None:
    """The SuperLink has forgotten all replies of a pull when Flower makes objects of them, one after the other."""
    devices = [Device(node, 0.2) for node in range(1, 6)]
    with pytest.raises(ValueError, match="Expecting") as unreadable:
        inflate_object_from_contents("x", {"x": b"Array  3\x00{no"})

    def broken(task: Task) -> bytes:
        raise unreadable.value

    devices[2].behave = broken
    history = run(folder, devices, until=2)
    for record in history.records()[1:]:
        assert {row["device"] for row in record.accepted} == {device.id for device in devices} - {devices[2].id}
        assert list(record.failed) == [devices[2].id]
    np.testing.assert_allclose(moved(history), 0.4, rtol=1e-5)


def test_a_device_that_does_not_answer_in_time_is_free_again(folder: Path) -> None:
    devices = [Device(1, 0.1)]
    devices[0].is_held = True
    with closing(GridLink(LocalGrid(devices))) as link:
        assert link.devices() == [devices[0].id]
        link.send(devices[0].id, b"task", seconds=0.1)
        time.sleep(0.2)
        (reply,) = link.receive(5)
    assert (reply.device, reply.failure, reply.is_lost) == (devices[0].id, "no answer in time", False)


def test_an_exception_on_a_device_is_recorded_and_the_round_goes_on(folder: Path) -> None:
    devices = [Device(1, 0.1), Device(2, 0.1), Device(3, 0.4)]

    def fail(task: Task) -> bytes:
        raise RuntimeError("waiting: battery at 12 %")

    devices[2].behave = fail
    (_, record) = run(folder, devices, until=1).records()
    assert record.failed == {devices[2].id: "waiting: battery at 12 %"}
    assert len(record.accepted) == 2


def test_a_device_that_started_anew_is_asked_again_and_counts_once(folder: Path) -> None:
    devices = [Device(1, 0.1), Device(2, 0.3)]

    def vanish(task: Task) -> bytes | None:
        devices[1].activated = "twice"
        devices[1].behave = devices[1].add
        return None

    devices[1].behave = vanish
    history = run(folder, devices, until=1)
    assert len(devices[1].tasks) == 2
    np.testing.assert_allclose(moved(history), 0.2, rtol=1e-5)


def test_replies_that_a_failing_superlink_has_handed_out_already_are_asked_for_again(folder: Path) -> None:
    devices = [Device(1, 0.1), Device(2, 0.3)]

    class Failing(LocalGrid):
        failures = 1

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            answers = super().pull_messages(message_ids)
            if self.failures:
                self.failures -= 1
                raise RuntimeError("database or disk is full")
            return answers

    begin(folder, MANIFEST, START, PLAIN)
    with closing(GridLink(Failing(devices))) as link:
        Rounds(link, folder, PLAIN, pause_seconds=0.0).run(lambda: 1)
    np.testing.assert_allclose(moved(History(folder)), 0.2, rtol=1e-5)
    (_, record) = History(folder).records()
    assert len(record.accepted) == 2
    assert not record.failed


def test_answers_to_a_void_round_count_in_its_next_try_and_nobody_is_asked_twice(folder: Path) -> None:
    devices = [Device(1, 0.1), Device(2, 0.3)]
    with rounds_of(folder, devices, with_rounds(seconds=1.0)) as rounds:
        for device in devices:
            device.is_held = True
        assert rounds.run_round() is None
        for device in devices:
            device.is_held = False
        records = [rounds.run_round() for _ in range(3)]
    assert [record and (len(record.accepted), record.rejected) for record in records] == [(2, ())] * 3
    assert [[task.round for task in device.tasks] for device in devices] == [[1, 2, 3]] * 2
    assert records[0] is not None
    assert set(records[0].asked) == {device.id for device in devices}


def test_a_refusal_in_a_void_round_is_none_in_the_next_try(folder: Path) -> None:
    devices = [Device(1, 0.1), Device(2, 0.3)]

    def wait(task: Task) -> bytes:
        devices[1].behave = devices[1].add
        raise RuntimeError("waiting: paused")

    with rounds_of(folder, devices, with_rounds(seconds=1.0)) as rounds:
        devices[1].behave, devices[1].is_held = wait, True
        assert rounds.run_round() is None  # one answer is too few
        devices[1].is_held = False
        time.sleep(0.6)
        record = rounds.run_round()
    assert record is not None
    assert (len(record.accepted), record.rejected, record.failed) == (2, (), {})


def test_a_straggler_whose_late_answer_counts_is_waited_for_in_the_round_that_it_is_asked_in(folder: Path) -> None:
    devices = [Device(1, 0.1), Device(2, 0.1), Device(3, 0.2)]
    devices[2].is_held = True
    with rounds_of(folder, devices, with_rounds(quorum=0.6)) as rounds:
        assert rounds.run_round() is not None
        devices[2].is_held = False
        time.sleep(0.6)
        rounds._early += rounds._receive(5)  # as while devices are waited for
        second = rounds.run_round()
    assert second is not None
    assert len(second.asked) == 3
    assert sorted(row["staleness"] for row in second.accepted if row["device"] == devices[2].id)[-1] == 1
    assert len(second.accepted) >= 3


def test_an_update_that_arrives_twice_counts_once(folder: Path) -> None:
    devices = [Device(1, 0.1), Device(2, 0.3)]
    devices[1].behave = lambda task: devices[1].add(replace(task, version=0))
    np.testing.assert_allclose(moved(run(folder, devices, until=1)), 0.2, rtol=1e-5)
    history = run(folder, devices, until=2, plan=with_rounds(seconds=1.0, min_devices=1))
    assert [row["reason"] for row in history.records()[2].rejected] == ["repeated"]
    np.testing.assert_allclose(moved(history), 0.2 + 0.1, rtol=1e-5)


def test_rounds_go_on_from_the_last_whole_round_with_momentum_and_memory(tmp_path: Path) -> None:
    plan = replace(PLAIN, aggregator=FedAvgConfig(momentum=0.9))
    lagging = run(tmp_path / "lagging", [Device(1, 0.1), Device(2, 0.3)], until=4, plan=plan)
    # Versions may be made of rounds that others followed already.
    assert [completed.record.version for number in range(5) if (completed := lagging.load(number))] == [0, 1, 2, 3, 4]
    numbers = [0.01, 0.02, 0.03]
    straight = run(tmp_path / "straight", [Device(node, number) for node, number in enumerate(numbers)], 4, plan)
    devices = [Device(node, number) for node, number in enumerate(numbers)]
    for until in (1, 2, 3, 4):
        cut = run(tmp_path / "cut", devices, until, plan)
    np.testing.assert_allclose(cut.last().flat, straight.last().flat, rtol=1e-6)


@pytest.mark.parametrize("harm", ["no record", "cut record", "cut model", "other model"])
def test_a_round_that_is_not_whole_has_not_happened(folder: Path, harm: str) -> None:
    devices = [Device(1, 0.1), Device(2, 0.1)]
    history = run(folder, devices, until=2)
    last = folder / "rounds" / "000002"
    match harm:
        case "no record":
            (last / "round.json").unlink()
        case "cut record":
            (last / "round.json").write_text((last / "round.json").read_text()[:50])
        case "cut model":
            (last / "model.f32").write_bytes((last / "model.f32").read_bytes()[:-4])
        case "other model":
            (last / "model.f32").write_bytes(bytes((last / "model.f32").stat().st_size))
    assert history.last().record.version == 1
    assert history.records()[1].version == 1
    np.testing.assert_allclose(moved(run(folder, devices, until=2)), 0.2, rtol=1e-5)


def test_a_full_disk_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def write(path: Path, content: Callable[[Any], object]) -> None:
        attempts.append(path)
        if len(attempts) < 3:
            raise OSError(28, "No space left on device")
        write_atomically(path, content)

    devices = [Device(1, 0.1), Device(2, 0.1)]
    with rounds_of(folder, devices) as rounds:
        monkeypatch.setattr("server.federation.history.write_atomically", write)
        monkeypatch.setattr("server.federation.rounds._FULL_DISK_SECONDS", 0.05)
        assert rounds.run_round() is not None
    np.testing.assert_allclose(moved(History(folder)), 0.1, rtol=1e-5)


def test_a_run_that_is_asked_to_stop_stops_and_the_next_order_goes_on(folder: Path) -> None:
    devices = [Device(1, 0.1), Device(2, 0.1)]
    devices[1].is_held = True
    begin(folder, MANIFEST, START, PLAIN)
    orders.order(folder, 2)
    with rounds_of(folder, devices) as rounds:
        threading.Timer(0.5, orders.stop, [folder]).start()
        with pytest.raises(Stopped):
            rounds.run(lambda: orders.ordered(folder))
    assert orders.told(folder)["phase"] == "stopped"
    devices[1].is_held = False
    orders.order(folder, 1)
    assert run(folder, devices, until=orders.ordered(folder)).last().record.version == 1


def test_privacy_is_paid_before_devices_are_asked_and_the_budget_outlives_the_run(folder: Path) -> None:
    plan = replace(
        PLAIN,
        rounds=replace(PLAIN.rounds, seconds=2.0),
        aggregator=PrivateMeanConfig(clip=1.0, noise_multiplier=2.0, expected_replies=2.0),
        screening=ScreeningConfig(max_staleness=0, comparison=None),
        privacy=PrivacyConfig(sampling_rate=1.0, delta=1e-5, max_epsilon=4.0),
    )
    devices = [Device(1, 0.1), Device(2, 0.1)]
    first = run(folder, devices, until=1, plan=plan)
    with pytest.raises(BudgetSpent):
        run(folder, devices, until=10, plan=plan)
    spent = [record.epsilon for record in first.records()[1:]]
    assert spent == sorted(spent)
    assert 0 < spent[-1] <= 4.0
    assert np.isfinite(History(folder).last().flat).all()


def test_a_plan_comes_back_from_json_and_a_broken_one_is_refused() -> None:
    assert Plan.from_json(PLAIN.to_json()) == PLAIN
    for text in ("", "[]", "{}", PLAIN.to_json().replace('"quorum": 1.0', '"quorum": 3.0')):
        with pytest.raises(UserError, match="plan cannot be read"):
            Plan.from_json(text)


def test_another_model_does_not_go_on_in_the_folder_of_a_federation(folder: Path) -> None:
    begin(folder, MANIFEST, START, PLAIN)
    begin(folder, MANIFEST, START, with_rounds(quorum=0.5))
    with pytest.raises(UserError, match="holds another federation"):
        begin(folder, MANIFEST, START + 1, PLAIN)
    with pytest.raises(UserError, match="holds no federation"):
        History(folder / "nowhere")


def test_the_client_app_hands_tasks_to_the_agent_and_updates_or_reasons_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = LocalGrid([])
    task = Task(
        round=1,
        run="run",
        version=0,
        manifest=MANIFEST.hash,
        recipe={"steps": 1},
        codec="fp32",
        seconds=10.0,
        payload=encode_flat(START, MANIFEST, "fp32"),
    )
    message = Message(to_record(write_message(task)), dst_node_id=1, message_type="train")
    grid.push_messages([message])
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    monkeypatch.setenv(client.flower.SOCKET, str(tmp_path / SOCKET))
    away = client.flower.app(message, context)
    assert (away.error.code, "no agent listens" in away.error.reason) == (ErrorCode.CLIENT_APP_CRASHED, True)
    with Agent(lambda: AddingLearner(tmp_path, "a", 0.5), tmp_path) as agent:
        thread = threading.Thread(target=agent.run)
        thread.start()
        try:
            update = read_message(Update, from_record(client.flower.app(message, context).content), max_payload=2**20)
            bad = Message(to_record(b"nonsense"), dst_node_id=1, message_type="train")
            grid.push_messages([bad])
            refused = client.flower.app(bad, context)
        finally:
            agent.close()
            thread.join()
    np.testing.assert_allclose(decode_flat(update.payload, MANIFEST)[:2000], 0.5, rtol=1e-5)
    assert refused.error.reason.startswith("message: ")
