"""The answers to a federation's tasks: the same to the bit after any cut, with nothing of a delta lost for good."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from test_client_learner import CONFIG, Device, models, recipe_of

from client.learner import Learner
from client.rounds import RoundTask
from client.tasks import TaskLearner, train_round
from lowssl_core.protocol import BadUpdate
from lowssl_core.protocol.codec import decode_flat, encode_flat
from lowssl_core.protocol.manifest import FloatArray
from lowssl_core.protocol.messages import Task, Update, write_message
from lowssl_core.recipe import Recipe


class Answering:
    """A device of the learner's tests, and tasks for it."""

    def __init__(self, root: Path, recipe: Recipe | None = None) -> None:
        self.device = Device(root, recipe or recipe_of("moco"))
        self.device.receive(0, 10)
        self.models = models(self.device)
        self.tasks = self._tasks()

    def _tasks(self) -> TaskLearner:
        return TaskLearner(lambda _: self.device.learner, "camera", self.device.root / "state")

    def lose_power(self) -> None:
        self.device.lose_power()
        self.tasks = self._tasks()

    def task(self, number: int, model: FloatArray, **changes) -> Task:
        manifest = self.device.learner.manifest
        asked = {"round": number, "run": "run", "version": number - 1, "manifest": manifest.hash, "codec": "int8"}
        asked |= {
            "recipe": self.device.recipe.as_dict(),
            "seconds": 60.0,
            "payload": encode_flat(model, manifest, "fp32"),
        }
        return Task(**asked | changes)

    def answer(self, task: Task, *, stop_after: int | None = None) -> Update | None:
        """The update; None where work was stopped after so many steps."""
        with closing(self.tasks.learn(task)) as work:
            taken = 0
            while taken != stop_after:
                try:
                    next(work)
                except StopIteration as stop:
                    return stop.value
                taken += 1
        return None


@pytest.fixture
def answering(tmp_path) -> Answering:
    return Answering(tmp_path / "one")


def bytes_but_for_seconds(update: Update) -> bytes:
    fields = {name: getattr(update, name) for name in Update.__dataclass_fields__}
    return write_message(Update(**fields | {"metrics": type(update.metrics)(steps=update.metrics.steps)}))


def test_an_answer_is_the_same_after_a_stop_a_power_cut_and_when_asked_for_again(answering, tmp_path):
    other = Answering(tmp_path / "other")
    for number, model in enumerate(answering.models, start=1):
        straight = answering.answer(answering.task(number, model))
        task = other.task(number, model)
        assert other.answer(task, stop_after=1) is None
        assert other.answer(task, stop_after=1) is None  # in the same process
        other.lose_power()
        assert other.answer(task, stop_after=1) is None
        answers = [other.answer(task), other.answer(task)]
        other.lose_power()
        answers.append(other.answer(task))
        assert [bytes_but_for_seconds(each) for each in answers] == [bytes_but_for_seconds(straight)] * 3
        assert straight.metrics.steps == 4
        assert straight.weight == straight.metrics.new_images + straight.metrics.replayed_images


@pytest.mark.parametrize("codec", ["int8", "top-k"])
def test_what_a_codec_loses_comes_with_the_next_update(answering, codec):
    # e <- (delta + e) - C(delta + e), and C(delta + e) is sent: a plain oracle, over power cuts and repeated tasks.
    manifest = answering.device.learner.manifest
    trained, lost = slice(manifest.trained_size), np.zeros(manifest.trained_size, dtype=np.float32)
    for number in range(1, 4):
        task = answering.task(number, answering.models[number % 2], codec=codec, share=0.05)
        update = answering.answer(task)
        wanted = answering.device.learner.delta()
        wanted[trained] += lost
        assert update.payload == encode_flat(wanted, manifest, codec, share=0.05)
        answering.lose_power()
        assert answering.answer(task) == update
        lost = (wanted - decode_flat(update.payload, manifest))[trained]
        assert np.linalg.norm(lost) > 0


def test_another_run_begins_with_nothing_lost(answering, tmp_path):
    answering.answer(answering.task(1, answering.models[0], codec="top-k"))
    update = answering.answer(answering.task(1, answering.models[1], run="another"))
    learner = answering.device.learner
    assert update.payload == encode_flat(learner.delta(), learner.manifest, "int8")
    assert update.update_id == "camera-another-0"


def test_a_task_that_cannot_be_done_is_refused_with_the_reason(answering, tmp_path):
    model = answering.models[0]
    recipe = answering.device.recipe.as_dict()
    for changes, said in (
        ({"manifest": "0" * 64}, "task: its manifest is of another model"),
        ({"recipe": recipe | {"alpha": 0.2}}, "task: of another recipe .there, here.: alpha: 0.2, 0.4"),
        ({"recipe": recipe | {"speed": 1}}, "task: recipe: unknown key speed"),
        ({"payload": b"short"}, "payload"),
    ):
        with pytest.raises(BadUpdate, match=said):
            answering.answer(answering.task(1, model, **changes))
    empty = Device(tmp_path / "empty", recipe_of("moco"))
    tasks = TaskLearner(lambda _: empty.learner, "camera", empty.root / "state")
    with pytest.raises(BadUpdate, match="nothing to learn from"):
        next(tasks.learn(answering.task(1, model)))
    # Nothing of that was learned, or keeps the next task from being done.
    assert answering.answer(answering.task(1, model)).metrics.steps == 4


def test_a_task_that_diverged_fails_again_rather_than_sending_half_a_round(tmp_path):
    wild = Answering(tmp_path, recipe_of("moco", name="sgd", base_lr=1e12, warmup_steps=0))
    for _ in range(2):
        with pytest.raises(BadUpdate, match="round 1: "):
            wild.answer(wild.task(1, wild.models[0]))
    wild.lose_power()
    with pytest.raises(BadUpdate, match="round 1: it was abandoned, as training diverged"):
        wild.answer(wild.task(1, wild.models[0]))


def test_a_round_by_itself_is_what_the_learner_does(answering, tmp_path):
    device = Device(tmp_path / "other", recipe_of("moco"))
    device.receive(0, 10)
    device.run(1)
    work = train_round(answering.device.learner, RoundTask(number=1), None)
    next(work)
    work.close()  # saved
    answering.lose_power()
    for _ in train_round(answering.device.learner, RoundTask(number=1), None):
        pass
    assert isinstance(answering.device.learner, Learner)
    assert CONFIG.budget.steps == answering.device.learner.progress.step
    np.testing.assert_array_equal(answering.device.learner.delta(), device.learner.delta())
