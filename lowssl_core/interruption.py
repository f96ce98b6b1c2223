"""Being asked to stop: SIGINT and SIGTERM are heard, and obeyed between two steps by all ranks together."""

import signal
from types import FrameType, TracebackType
from typing import Self


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

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        signal.signal(number, self._before[signal.Signals(number)])
