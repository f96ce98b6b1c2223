"""A federation's tasks, answered by the learner: rounds go on where they were cut off, updates stay the same."""

import sqlite3
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

from client.learner import Learner, TrainingDivergedError
from client.rounds import Outcome, RoundTask
from lowssl_core.errors import UserError
from lowssl_core.protocol import BadUpdate
from lowssl_core.protocol.codec import decode_flat, encode_flat
from lowssl_core.protocol.manifest import FloatArray, Manifest
from lowssl_core.protocol.messages import Metrics, Task, Update
from lowssl_core.recipe import Recipe, differences, recipe_from_dict
from lowssl_core.tensor_file import read_sealed, write_sealed
from lowssl_core.train import Report

_FORMAT = "lowssl-residual-1"


class TaskLearner:
    """What an agent, or a simulation, has learn: a task in, an update out.

    The learner is opened with the first task, whose recipe says what is trained.

    Args:
        open_learner: opens the device's learner for a recipe; called again after a disk or
            the memory was full.
        device: the device's id.
        folder: for `residual.safetensors`, what the updates' codec has lost so far.
    """

    def __init__(self, open_learner: Callable[[Recipe], Learner], device: str, folder: Path) -> None:
        self._open_learner, self._device, self._folder = open_learner, device, folder
        self._learner: Learner | None = None

    def close(self) -> None:
        """Close the learner."""
        if self._learner is not None:
            self._learner.close()
            self._learner = None

    def learn(self, task: Task) -> Generator[Report, None, Update]:
        """Train as a task asks, a report after each step; returns the update.

        Closed or killed and begun again with the same task, it goes on from where it was or what was saved; after its
        end it gives the same update once more. A newer task takes its place.

        Raises:
            BadUpdate: a task for another model, or one that nothing could be learned from; where training diverged,
                the next global model is taken over whole.
            UserError, OSError: as `Learner` raises them.
        """
        try:
            learner = self._open(task)
            asked = RoundTask(number=task.round, run=task.run, version=task.version, proximal=task.proximal)
            outcome = yield from train_round(learner, asked, decode_flat(task.payload, learner.manifest))
        except TrainingDivergedError as error:
            raise BadUpdate(f"round {task.round}: {error}") from None
        except (OSError, MemoryError, RuntimeError, sqlite3.Error):  # a full disk, or PyTorch without memory in a step
            self.close()  # what it holds in memory is not what is on disk
            raise
        if learner.state.starts_over:
            raise BadUpdate(f"round {task.round}: it was abandoned, as training diverged")
        if not outcome.steps:
            raise BadUpdate(f"round {task.round}: there is nothing to learn from yet: no image, new or remembered")
        return self._update(learner, task, outcome)

    def status(self) -> dict[str, Any]:
        """How things stand, for people; it reads what the learner's thread writes, and no more than that."""
        learner = self._learner
        if learner is None or (plan := learner.state.round) is None:
            return {}
        return {
            "step": learner.progress.step,
            "round": plan.task.number,
            "round_step": learner.progress.step - plan.first_step,
            "round_steps": plan.steps,
            "new_images": plan.new_images,
            "memory_images": plan.memory_images,
            "mu": plan.mu,
            "drift": plan.drift,
            "alarm": plan.alarm,
        }

    def _open(self, task: Task) -> Learner:
        """The learner; BadUpdate says why it cannot do this task."""
        try:
            recipe = recipe_from_dict(task.recipe)
        except UserError as error:
            raise BadUpdate(f"task: {error}") from None
        learner = self._learner = self._learner or self._open_learner(recipe)
        if changed := differences(recipe, learner.recipe):
            raise BadUpdate(f"task: of another recipe (there, here): {'; '.join(changed)}")
        if task.manifest != learner.manifest.hash:
            raise BadUpdate("task: its manifest is of another model")
        return learner

    def _update(self, learner: Learner, task: Task, outcome: Outcome) -> Update:
        name = f"{self._device}-{task.run}-{task.version}"
        residual = Residual(self._folder / "residual.safetensors", learner.manifest)
        return Update(
            round=task.round,
            base_version=task.version,
            device=self._device,
            update_id=name,
            manifest=task.manifest,
            weight=float(outcome.images),
            metrics=Metrics(
                steps=outcome.steps,
                seconds=round(outcome.seconds, 3),
                new_images=outcome.images - outcome.replayed_images,
                replayed_images=outcome.replayed_images,
                loss=outcome.loss,
                drift=outcome.round.drift,
            ),
            payload=residual.encode(learner.delta(), task, name),
        )


def train_round(learner: Learner, asked: RoundTask, arrived: FloatArray | None) -> Generator[Report, None, Outcome]:
    """Begin the round that is asked for, or go on with it, take its steps and finish it; one done stays as it is.

    Cut off between two steps, the state is saved.

    Args:
        learner: what learns; another round that is open is finished first, with the steps that it took.
        asked: the round.
        arrived: (size,) the global model that came with it, or None.

    Raises:
        TrainingDivergedError: the round was abandoned.
        UserError, OSError: as `Learner` raises them.
    """
    state = learner.state
    if state.round is None or state.round.task != asked:
        if state.is_open:
            learner.finish_round()
        learner.begin_round(arrived, asked)
    if learner.state.is_open:
        try:
            yield from learner.steps()
            learner.finish_round()
        except TrainingDivergedError:
            learner.abandon_round()
            raise
        except GeneratorExit:
            learner.save()
            raise
    return learner.outcome()


class Residual:
    """What a lossy codec has lost of the updates so far, on disk, to be sent with the next one.

    e <- (delta + e) - C(delta + e) (Karimireddy et al. 2019). Kept with it is the update that it was last encoded for
    and what it becomes after that: until another update is encoded, the same one gives the same bytes.

    Args:
        path: the file.
        manifest: of the updates.

    Raises:
        UserError: a damaged file.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._manifest = path, manifest
        self._run = self._update = ""
        self._before = self._after = self._nothing()
        if path.exists():
            file = read_sealed(path, format=_FORMAT, kind="residual of lowssl-client")
            before, after = (file.tensors[name].numpy() for name in ("before", "after"))
            if before.shape == self._before.shape:  # else it is of another model
                self._run, self._update = file.facts["run"], file.facts["update"]
                self._before, self._after = before, after

    def encode(self, delta: FloatArray, task: Task, update: str) -> bytes:
        """The payload for what a device sends, (size,), with what was lost before, by the task's codec.

        A server that asks for another update has taken the last one, or given it up; another run is of other models.

        Raises:
            BadUpdate: a value that is not finite.
            OSError: the disk is full.
        """
        if task.run != self._run:
            self._run, self._before, self._update = task.run, self._nothing(), ""
        elif update != self._update:
            self._before = self._after
        trained = slice(self._manifest.trained_size)
        wanted = delta.copy()
        wanted[trained] += self._before
        payload = encode_flat(wanted, self._manifest, task.codec, share=task.share)
        if update != self._update:
            self._update, self._after = update, (wanted - decode_flat(payload, self._manifest))[trained]
            tensors = {"before": torch.from_numpy(self._before), "after": torch.from_numpy(self._after)}
            write_sealed(self._path, tensors, format=_FORMAT, facts={"run": self._run, "update": update})
        return payload

    def _nothing(self) -> FloatArray:
        return torch.zeros(self._manifest.trained_size).numpy()
