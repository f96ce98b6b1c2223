"""A run's folder as lowssl-pretrain leaves it, read in whatever state it is: what it is, how it stands, its curves."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowssl_core.checkpoint import Checkpoint, load_checkpoint
from lowssl_core.errors import UserError
from lowssl_core.evaluation.results import Figures, Results
from lowssl_core.recipe import Recipe
from lowssl_core.run import CHECKPOINT
from lowssl_core.views import Measurement

METRICS = "metrics.jsonl"
SUBJECTS = ("pixels", "untrained", "student", "teacher")
# Lines of a run that lives come at least this often, in seconds, and within so many of its usual intervals.
SILENCE, SILENT_INTERVALS = 120.0, 5.0
# What a row must have, as finite numbers, to be shown.
_NUMBERS = {
    "train": ("step", "images", "seconds", "loss", "global_loss", "local_loss"),
    "quality": ("step", "images", "seconds"),
    "end": ("step", "images", "seconds"),
    "warning": ("step",),
    "start": ("step",),
}

State = Literal["done", "running", "stopped", "failed"]
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One run, as far as its folder tells; what it does not tell (yet) is None or empty.

    Attributes:
        key: its letter in tables and charts.
        name: its folder's name, with as many parents as make it unique.
        state: how it stands, and `status` the same in words.
        step: optimizer steps done.
        total_steps: of how many.
        images: seen, each epoch anew.
        seconds: spent on steps.
        data: what it was trained on, in words, and `data_images` how many images that is.
        recipe: all that decides its result; None without a checkpoint, which comes with the first epochs.
        recipe_hash: tells its recipe from others.
        views: what its views are on its data.
        device: what it runs on, with the number of processes.
        versions: of the software.
        resumes: how often it was taken up again.
        set_aside: images found unusable.
        training: rows of losses, each with "images", "loss", "global_loss", "local_loss".
        quality: rows of quality, each with "images" and some of "retrieval", "knn", "rankme".
        warnings: each with "step", "name" and "message".
        evaluations: results of `lowssl evaluate` that lie in its folder, by file name.
        problems: what of its folder could not be read, in words.
    """

    key: str
    name: str
    state: State
    status: str
    step: int
    total_steps: int | None
    images: int
    seconds: float
    data: str | None
    data_images: int | None
    recipe: Recipe | None
    recipe_hash: str | None
    views: Measurement | None
    device: str | None
    versions: Mapping[str, str]
    resumes: int
    set_aside: int
    training: Sequence[Row]
    quality: Sequence[Row]
    warnings: Sequence[Row]
    evaluations: Mapping[str, Results]
    problems: Sequence[str]

    @property
    def images_per_second(self) -> float | None:
        """Over all steps so far."""
        return self.images / self.seconds if self.seconds else None

    @property
    def waiting(self) -> float | None:
        """Share of the steps' time spent on waiting for images, a mean over the rows of losses."""
        shares = [row["waiting"] for row in self.training if is_number(row.get("waiting"))]
        return sum(shares) / len(shares) if shares else None

    def result(self, measure: str, subject: str, within: float = math.inf) -> float | None:
        """The latest figure of one of `SUBJECTS` by one of `MEASURES`, with at most `within` images seen."""
        untrained = [row for row in self.quality if row["step"] == 0]
        trained = [row for row in self.quality if row["step"] > 0 and row["images"] <= within]
        rows, name = {
            "pixels": (untrained, f"pixels_{measure}"),
            "untrained": (untrained, measure),
            "student": (trained, measure),
            "teacher": (trained, f"teacher_{measure}"),
        }[subject]
        value = rows[-1].get(name) if rows else None
        return float(value) if value is not None and is_number(value) else None


def is_run(folder: Path) -> bool:
    """Whether lowssl-pretrain has written into a folder."""
    return any((folder / name).is_file() for name in (METRICS, CHECKPOINT))


def read_run(key: str, name: str, folder: Path) -> ComparedRun:
    """Read a run's folder, whatever state it is in; what cannot be read becomes a problem in words."""
    problems: list[str] = []
    rows = _read_rows(folder / METRICS, problems)
    checkpoint = _read_checkpoint(folder / CHECKPOINT, problems)
    facts: Mapping[str, Any] = checkpoint.facts if checkpoint else {}
    start: Row = rows["start"][-1] if rows["start"] else {}
    position = _position(rows, checkpoint)
    state, status = _status(folder, rows, checkpoint, position["step"])
    if not (folder / CHECKPOINT).exists() and state != "running":
        problems.append(f"{CHECKPOINT} is missing: its recipe and its number of steps are not known")
    data = start.get("data") or facts.get("data") or {}
    aside = rows["set_aside"][-1].get("images") if rows["set_aside"] else ()
    ranks = start.get("ranks", 1)
    device = start.get("device")
    return ComparedRun(
        key=key,
        name=name,
        state=state,
        status=status,
        step=position["step"],
        total_steps=checkpoint.progress.total_steps if checkpoint else None,
        images=position["images"],
        seconds=position["seconds"],
        data=data.get("description"),
        data_images=data.get("images"),
        recipe=checkpoint.recipe if checkpoint else None,
        recipe_hash=checkpoint.recipe.hash() if checkpoint else start.get("recipe"),
        views=_measurement(start.get("views") or facts.get("views")),
        device=f"{ranks} x {device}" if device and ranks > 1 else device,
        versions=start.get("versions") or {},
        resumes=max(0, len(rows["start"]) - 1),
        set_aside=len(aside or ()),
        training=rows["train"],
        quality=rows["quality"],
        warnings=rows["warning"],
        evaluations=_read_evaluations(folder, problems),
        problems=problems,
    )


def _read_rows(path: Path, problems: list[str]) -> dict[str, list[Row]]:
    """The rows of the folder's latest run by kind; damaged lines are counted among the problems."""
    rows: dict[str, list[Row]] = {kind: [] for kind in (*_NUMBERS, "set_aside")}
    if not path.is_file():
        problems.append(f"{METRICS} is missing: no curves, no results")
        return rows
    damaged = 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line, parse_constant=_drop)
            kind = row["kind"]
            is_whole = all(is_number(row[name]) for name in _NUMBERS.get(kind, ()))
        except (ValueError, TypeError, KeyError):
            is_whole = False
        if not is_whole:
            damaged += 1
        elif kind == "start" and row["step"] == 0:
            # The folder had a run without a checkpoint before: rows of its first step are still here.
            rows = {each: [] for each in rows} | {"start": [row]}
        elif kind in rows:
            rows[kind].append(row)
    if damaged:
        lines = "1 damaged line" if damaged == 1 else f"{damaged} damaged lines"
        problems.append(f"{METRICS} has {lines}, left out here")
    return rows


def _read_checkpoint(path: Path, problems: list[str]) -> Checkpoint | None:
    if not path.exists():
        return None
    try:
        return load_checkpoint(path)
    except UserError as error:
        problems.append(f"its checkpoint cannot be used: {str(error).replace(str(path), CHECKPOINT)}")
        return None


def _read_evaluations(folder: Path, problems: list[str]) -> dict[str, Results]:
    found: dict[str, Results] = {}
    needed = {"task", "model", "settings", "rows"}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(), parse_constant=_drop)
            if not isinstance(content, dict) or not needed <= content.keys():
                continue  # some other file of the run
            rows = [
                Figures(subject=str(row["subject"]), values=dict(row["values"]), details=dict(row.get("details", {})))
                for row in content["rows"]
            ]
            if not all(is_number(value) for row in rows for value in row.values.values()):
                raise ValueError("a figure is no number")
            found[path.name] = Results(
                task=str(content["task"]),
                model=str(content["model"]),
                settings=dict(content["settings"]),
                rows=rows,
                notes=[str(note) for note in content.get("notes", ())],
            )
        except (ValueError, TypeError, KeyError, AttributeError, OSError):
            problems.append(f"{path.name} is damaged or no file of lowssl evaluate, left out here")
    return found


def _position(rows: Mapping[str, Sequence[Row]], checkpoint: Checkpoint | None) -> dict[str, Any]:
    """The furthest that rows or checkpoint tell of: step, images, seconds."""
    places = [row for kind in ("train", "quality", "end") for row in rows[kind]]
    if checkpoint:
        step = checkpoint.progress.step
        images, seconds = step * checkpoint.recipe.data.batch_size, checkpoint.facts["seconds"]
        places.append({"step": step, "images": images, "seconds": seconds})
    return dict(max(places, key=lambda row: row["step"], default={"step": 0, "images": 0, "seconds": 0.0}))


def _status(
    folder: Path, rows: Mapping[str, Sequence[Row]], checkpoint: Checkpoint | None, step: int
) -> tuple[State, str]:
    if rows["end"] or (checkpoint and checkpoint.progress.is_done):
        return "done", "done"
    total = f" of {checkpoint.progress.total_steps:,}" if checkpoint else ""
    if bad := [row["step"] for row in rows["warning"] if row.get("name") == "not a number"]:
        return "failed", f"failed at step {bad[-1]:,}{total}: not a number"
    if not (folder / METRICS).is_file():
        return "stopped", f"stopped at step {step:,}{total}"
    last = (folder / METRICS).stat().st_mtime
    age = max(0.0, time.time() - last)
    steps = [row["seconds"] for row in rows["train"][-2:]]
    usual = steps[1] - steps[0] if len(steps) == 2 else SILENCE
    # Between epochs only a run that was told to stop writes a checkpoint, as the last thing it does.
    was_told = bool(
        checkpoint
        and checkpoint.progress.step == step
        and step % checkpoint.progress.steps_per_epoch
        and (folder / CHECKPOINT).stat().st_mtime >= last
    )
    if age < max(SILENCE, SILENT_INTERVALS * usual) and not was_told:
        return "running", f"running, at step {step:,}{total}, last heard of {_duration(age)} ago"
    return "stopped", f"stopped at step {step:,}{total}"


def _measurement(values: Mapping[str, Any] | None) -> Measurement | None:
    try:
        return Measurement(**values) if values else None
    except TypeError:
        return None  # of another version


def is_number(value: object) -> bool:
    """Whether a value that was read is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _drop(constant: str) -> None:
    """NaN and infinities, which JSON does not have, as what is absent."""


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
