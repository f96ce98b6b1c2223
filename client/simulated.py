"""A device of a simulated federation: what a real one learns by, without Flower, socket or conditions."""

from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from client.arrivals import Arrivals, ArrivalsConfig
from client.learner import Learner, TrainingDivergedError
from client.learner_config import LearnerConfig
from client.rounds import RoundTask
from client.tasks import TaskLearner, train_round
from lowssl_core.errors import UserError
from lowssl_core.protocol.codec import largest_payload
from lowssl_core.protocol.manifest import FloatArray, pack
from lowssl_core.protocol.messages import Task, read_message, write_message
from lowssl_core.recipe import build_dataclass, recipe_from_dict


class Device:
    """A learner on its own folder: images arrive in `images`, all else it keeps in `state`.

    Args:
        folder: the device's.
        name: its id.
        recipe: what is trained, a tree of plain values.
        settings: of `LearnerConfig`, a tree of plain values.
        devices: so many it stands for: it trains on as many times the images, with as many times the steps and the
            memory.

    Raises:
        UserError: settings that cannot be, or a state of another recipe.
    """

    def __init__(
        self, folder: Path, name: str, recipe: Mapping[str, Any], settings: Mapping[str, Any], devices: int = 1
    ) -> None:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        config, state = _multiplied(_config(settings), devices), folder / "state"
        self._arrivals = Arrivals(folder / "images", state, ArrivalsConfig(settle_seconds=0))
        self._learner = Learner(recipe_from_dict(recipe), config, self._arrivals, state)
        self._tasks = TaskLearner(lambda _: self._learner, name, state)

    def close(self) -> None:
        """Close its files; a round that is open goes on from the last state written."""
        self._learner.close()
        self._arrivals.close()

    def answer(self, data: bytes) -> Generator[object, None, bytes]:
        """The bytes of an update for those of a task, yielding after each step.

        Raises:
            BadUpdate: the task is not for this model, there is nothing to learn from, or training diverged.
        """
        task = read_message(Task, data, max_payload=largest_payload(self._learner.manifest))
        update = yield from self._tasks.learn(task)
        # How long it took would make messages of one simulation differ in length from time to time.
        return write_message(replace(update, metrics=replace(update.metrics, seconds=0.0)))

    def train(self, number: int, arrived: FloatArray | None = None) -> Generator[object, None, None]:
        """A round by itself, yielding after each step; one done stays as it is.

        Args:
            number: of the round.
            arrived: (size,) the model to take over first; None: it goes on with its own.

        Raises:
            UserError: training diverged.
        """
        try:
            yield from train_round(self._learner, RoundTask(number=number), arrived)
        except TrainingDivergedError as error:
            raise UserError(f"round {number}: {error}; a lower optim.base_lr may help") from None

    def weights(self) -> FloatArray:
        """(size,) its own model as it is now."""
        return pack(self._learner.method.federated_state(), self._learner.manifest)

    def account(self) -> dict[str, Any]:
        """What came of its last round, plain values; `views` are those that were trained on."""
        outcome = self._learner.outcome()
        per_image = 2 + self._learner.recipe.views.num_locals
        return {
            "steps": outcome.steps,
            "views": outcome.steps * outcome.round.rows * per_image,
            "seconds": outcome.seconds,
            "loss": outcome.loss,
            "mu": outcome.round.mu,
            "drift": outcome.round.drift,
            "memory_images": outcome.round.memory_images,
        }


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings that `Device` would; UserError says why."""
    _config(settings)


def _config(settings: Mapping[str, Any]) -> LearnerConfig:
    try:
        return build_dataclass(LearnerConfig, settings)
    except UserError as error:
        said = str(error).removeprefix("recipe: ").replace("the recipe has", "it has", 1)
        raise UserError(f"federation: learner: {said}") from None


def _multiplied(config: LearnerConfig, devices: int) -> LearnerConfig:
    budget, memory = config.budget, config.memory
    return replace(
        config,
        budget=replace(
            budget,
            new_images=devices * budget.new_images,
            steps=None if budget.steps is None else devices * budget.steps,
        ),
        memory=replace(memory, max_bytes=devices * memory.max_bytes),
    )
