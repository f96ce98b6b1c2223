"""What the demonstration's federation is compared with: its devices alone, and one that has all images."""

import contextlib
import multiprocessing
import multiprocessing.connection
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from lowssl_core.errors import UserError
from server.demonstration.global_model import accuracy
from server.simulation.courses import COURSES, CourseName, World
from server.simulation.judge import Judge
from server.simulation.link import Watch

_COURSES: tuple[CourseName, ...] = ("alone", "pooled")


class Yardsticks:
    """Trains both on the images of a world by the code of real devices, each in a process of its own.

    Both are gone when the context is left.

    Args:
        world: what they have in common with the federation.
        judge: of models.
        folder: of what they keep while they train.

    Attributes:
        alone: by device, the accuracies of its model after each round, 0 to 1.
        pooled: those of the model that has all images.
    """

    def __init__(self, world: World, judge: Judge, folder: Path) -> None:
        self.alone: dict[str, list[float]] = {name: [] for name in world.streams}
        self.pooled: list[float] = []
        self._rounds = world.rounds
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._processes, self._results = [], []
        for name in _COURSES:
            results, sender = context.Pipe(duplex=False)
            # Daemons end with this process, should it fail.
            process = context.Process(target=_train, args=(name, world, judge, folder, sender), name=name, daemon=True)
            self._processes.append(process)
            self._results.append(results)

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.terminate()
            process.join()

    @property
    def done(self) -> int:
        """Rounds of both that are judged."""
        return min(map(len, self.alone.values())) + len(self.pooled)

    @property
    def total(self) -> int:
        """Rounds of both that there will be."""
        return len(_COURSES) * self._rounds

    def look(self) -> None:
        """Take in what has come.

        Raises:
            UserError: training diverged, or one of them ended in some other way.
        """
        for process, results in zip(self._processes, self._results, strict=True):
            with contextlib.suppress(EOFError):  # it has ended, and all that it sent is taken
                while results.poll():
                    self._take(results.recv())
            if process.exitcode not in (None, 0):
                raise UserError(f"the comparison with {process.name} training ended with status {process.exitcode}")

    def _take(self, accuracies: dict[str, float] | float | str) -> None:
        if isinstance(accuracies, str):
            raise UserError(accuracies)
        if isinstance(accuracies, float):
            self.pooled.append(accuracies)
            return
        for name, judged in accuracies.items():
            self.alone[name].append(judged)


def _train(
    name: CourseName, world: World, judge: Judge, folder: Path, results: multiprocessing.connection.Connection
) -> None:
    """Train one of them, and send what each round came to."""
    torch.set_num_threads(1)
    watch = Watch(on_step=lambda: None, on_device=lambda: None)
    try:
        with closing(COURSES[name](world, folder / name, watch)) as course:
            for number in range(1, world.rounds + 1):
                course.run_round(number)
                if course.has_shared:
                    results.send(accuracy(judge, course.shared()))
                else:
                    results.send({device: accuracy(judge, flat) for device, flat in course.own().items()})
    except UserError as error:
        results.send(str(error))
