"""What a run tells: a live line on a terminal or plain lines elsewhere, metrics as JSON lines and for TensorBoard."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard.writer import SummaryWriter

from lowssl_core import schedules
from lowssl_core.files import write_atomically

PLAIN_LINE_SECONDS = 10.0


class Journal:
    """The record of a run in a folder: `metrics.jsonl`, TensorBoard events, and what a person sees.

    Use as a context manager. Rows of `metrics.jsonl` are objects with a "kind": "start", "train", "quality",
    "warning", "set_aside" or "end"; those of steps carry "step", "epoch", "images" seen and "seconds" trained.

    Args:
        folder: where the files go.
        start: the clock; rows after it, of steps that a stopped run took in vain, are dropped.
    """

    def __init__(self, folder: Path, start: schedules.Progress) -> None:
        self._path = folder / "metrics.jsonl"
        _drop_rows_after(self._path, start.step)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start.step)
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._last_line = -math.inf
        self._live: Progress | None = None
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._live.add_task("starting", total=start.total_steps, completed=start.step)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        self._file.close()
        self._board.close()

    def say(self, text: str) -> None:
        """Show a line."""
        self._console.print(text, markup=False)

    def write(self, kind: str, row: Mapping[str, Any]) -> None:
        """Append a row to `metrics.jsonl`."""
        self._file.write(json.dumps({"kind": kind, **row}) + "\n")
        self._file.flush()

    def step(self, progress: schedules.Progress, row: Mapping[str, float]) -> None:
        """Record a stretch of training: means over the steps since the last one, and speeds."""
        self.write("train", row)
        self._plot("train", progress.step, row)
        line = (
            f"epoch {row['epoch']:.2f}  step {progress.step}/{progress.total_steps}  loss {row['loss']:.4f} "
            f"(global {row['global_loss']:.4f}, local {row['local_loss']:.4f})  "
            f"{row['images_per_second']:.0f} images/s  waiting {row['waiting']:.0%}"
        )
        if self._live:
            self._live.update(self._task, completed=progress.step, description=line)
        elif time.monotonic() - self._last_line > PLAIN_LINE_SECONDS or progress.is_done:
            self._last_line = time.monotonic()
            left = (progress.total_steps - progress.step) * row["seconds_per_step"]
            self.say(f"{line}  {_duration(left)} left")

    def quality(self, progress: schedules.Progress, row: Mapping[str, float]) -> None:
        """Record a measurement of quality."""
        self.write("quality", row)
        self._plot("quality", progress.step, row)
        figures = "  ".join(f"{name} {row[name]:.3f}" for name in ("retrieval", "knn", "rankme") if name in row)
        self.say(f"epoch {row['epoch']:.2f}  {figures}")

    def warn(self, progress: schedules.Progress, name: str, message: str) -> None:
        """Record and show a warning."""
        self.write("warning", {"step": progress.step, "name": name, "message": message})
        self.say(f"WARNING at step {progress.step}: {name}: {message}")

    def _plot(self, prefix: str, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name not in ("step", "epoch"):
                self._board.add_scalar(f"{prefix}/{name}", value, step)


def read_metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind in a run's `metrics.jsonl`, in order."""
    rows = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed while writing it
        if row.get("step", 0) <= step and row["kind"] != "end":
            kept.append(line)
    write_atomically(path, lambda file: file.write("".join(f"{line}\n" for line in kept).encode()))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
