"""Progress of long work on standard error: a live bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 10.0


class Meter:
    """How far one piece of work is; a context manager.

    Results go to standard output, so that a table or JSON can be piped on; progress goes to standard error. Work of
    under ten seconds leaves no plain line at all.

    Args:
        label: what is being done, a few words.
        total: of what is counted.
        unit: what is counted, a plural.
        done: how many were done before, when work is resumed.
    """

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0) -> None:
        self._label, self._total, self._unit, self._done = label, total, unit, done
        self._began = self._last_line = time.monotonic()
        self._done_before = done
        console = Console(file=sys.stderr, soft_wrap=True, highlight=False)
        self._console = console
        self._live: Progress | None = None
        if console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn()
            self._live = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._task = self._live.add_task(label, total=total, completed=done)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more as done; `note` says something of the moment, such as a loss."""
        self.move_to(self._done + count, note)

    def move_to(self, done: int, note: str = "") -> None:
        """Count `done` in all as done."""
        self._done = done
        text = f"{self._label}  {note}" if note else self._label
        if self._live:
            self._live.update(self._task, completed=self._done, description=text)
            return
        now = time.monotonic()
        if now - self._last_line > PLAIN_LINE_SECONDS:
            self._last_line = now
            pace = (now - self._began) / max(1, self._done - self._done_before)
            left = round(pace * (self._total - self._done))
            self._console.print(
                f"{text}  {self._done:,}/{self._total:,} {self._unit}, {left // 60}:{left % 60:02} left", markup=False
            )
