"""Being asked to stop: SIGINT and SIGTERM are heard, and obeyed between two steps by all ranks together."""

import signal
from types import FrameType, TracebackType
from typing import Self


class StoppedError(Exception):
    """Work stopped between two steps because a signal asked for it; what was done is kept.

    Attributes:
        status: the exit status that a shell expects: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, signal_name: str) -> None:
        super().__init__(f"stopped by {signal_name}")
        self.status = 128 + signal.Signals[signal_name]


class Interruption:
    """A context in which SIGINT and SIGTERM only leave word; a second one acts as usual.

    Attributes:
        signal_name: the signal that came, "" while none has.
    """

    def __init__(self) -> None:
        self.signal_name = ""

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise StoppedError if a signal came."""
        if self.signal_name:
            raise StoppedError(self.signal_name)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        signal.signal(number, self._before[signal.Signals(number)])
