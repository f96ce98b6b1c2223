"""The global model of the demonstration's federation, judged after each round as it comes."""

import time
from collections.abc import Callable

from lowssl_core.errors import UserError
from lowssl_core.protocol.manifest import FloatArray
from server.federation.history import History, Record
from server.simulation.judge import Judge

_PATIENCE_SECONDS = 1000.0  # a round's deadline, and some more


def accuracy(judge: Judge, flat: FloatArray) -> float:
    """The k-NN accuracy of a model (size,) on all images that a judge asks for, 0 to 1."""
    return float(judge.accuracies(flat) @ judge.shares)


class GlobalModel:
    """Looks for completed rounds, each of which is told of and judged once.

    Args:
        history: of the federation.
        judge: of its models.
        rounds: how many there will be.
        on_round: told of a completed round at once: what comes next waits for it.
        report: told of a completed round and its model's accuracy, 0 to 1.

    Attributes:
        accuracies: after each completed round, 0 to 1.
    """

    def __init__(
        self,
        history: History,
        judge: Judge,
        rounds: int,
        *,
        on_round: Callable[[int], None],
        report: Callable[[Record, float], None],
    ) -> None:
        self._history, self._judge, self._rounds = history, judge, rounds
        self._on_round, self._report = on_round, report
        self.accuracies: list[float] = []
        self._moved = time.monotonic()

    @property
    def is_done(self) -> bool:
        """Whether all rounds are judged."""
        return len(self.accuracies) >= self._rounds

    def look(self) -> None:
        """Judge what is new, if anything.

        Raises:
            UserError: no round was completed for longer than one may take.
        """
        if self.is_done:
            return
        number = len(self.accuracies) + 1
        completed = self._history.load(number) if self._history.newest() >= number else None
        if completed is None:
            if time.monotonic() - self._moved > _PATIENCE_SECONDS:
                raise UserError(f"round {number} was not completed in {_PATIENCE_SECONDS:.0f} seconds")
            return
        self._moved = time.monotonic()
        self._on_round(number)
        self.accuracies.append(accuracy(self._judge, completed.flat))
        self._report(completed.record, self.accuracies[-1])
