"""A comparison of runs as tables: facts, results, evaluations and recipe differences, for page and terminal."""

import itertools
import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowssl_core.comparison.notes import Note, common_images
from lowssl_core.comparison.run_folder import SUBJECTS, ComparedRun
from lowssl_core.comparison.runs import MEASURES, Comparison
from lowssl_core.evaluation.results import Results
from lowssl_core.recipe import flat_keys

NAMES_OF_SUBJECTS = {"pixels": "raw pixels", "untrained": "untrained", "student": "student", "teacher": "teacher"}
NOTHING = "-"
TERMINAL_WIDTH = 100
# Words in the name of a figure of which less is better.
LESS_IS_BETTER = {"loss", "error", "ece", "nll", "mse", "rmse", "mae", "seconds", "uniformity"}
# Figures of `lowssl evaluate quality` that are best near 1, or only together with others.
NOT_RANKED = {"alpha_req", "alignment"}


@dataclass(frozen=True)
class Cell:
    """A table's cell, perhaps the best of its column, or changed against the first run's."""

    text: str
    mark: Literal["", "best", "changed"] = ""

    @property
    def plain(self) -> str:
        """The text, with a star at the best."""
        return f"{self.text}*" if self.mark == "best" else self.text


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table for page and terminal.

    Attributes:
        title: a few words.
        columns: a group and a name each; neighbours of one group stand under it, "" is none.
        rows: a head and a cell for each column.
        notes: lines below.
        runs_in: whether columns are named by runs' letters, or rows begin with them.
    """

    title: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    notes: Sequence[str] = ()
    runs_in: Literal["columns", "rows"] = "rows"

    def text(self, width: int = TERMINAL_WIDTH) -> str:
        """Plain text: long cells over several lines, and too many columns in blocks below each other."""
        first = min(max([len(head) for head, _ in self.rows], default=0), width // 3)
        widths = [self._width(column, width - first) for column in range(len(self.columns))]
        blocks: list[list[int]] = [[]]
        for column, needed in enumerate(widths):
            if blocks[-1] and first + sum(2 + widths[each] for each in blocks[-1]) + 2 + needed > width:
                blocks.append([])
            blocks[-1].append(column)
        lines = [self.title, ""]
        for block in blocks if self.rows else ():
            lines += [*self._block(block, first, widths), ""]
        return "\n".join(lines + [part for note in self.notes for part in textwrap.wrap(note, width)]).rstrip()

    def _width(self, column: int, room: int) -> int:
        """As wide as its texts, but no wider than lets four columns, or all, stand side by side."""
        texts = [*self.columns[column], *(cells[column].plain for _, cells in self.rows)]
        return min(max(map(len, texts)), max(12, room // min(4, len(self.columns)) - 2))

    def _block(self, block: Sequence[int], first: int, widths: Sequence[int]) -> list[str]:
        groups = [self.columns[column][0] for column in block]
        groups = [group if index == 0 or groups[index - 1] != group else "" for index, group in enumerate(groups)]
        rows = [("", groups)] if any(groups) else []
        rows.append(("", [self.columns[column][1] for column in block]))
        rows += [(head, [cells[c].plain for c in block]) for head, cells in self.rows]
        lines = []
        for head, texts in rows:
            wrapped = [textwrap.wrap(head, first) or [""]]
            wrapped += [textwrap.wrap(text, widths[column]) or [""] for text, column in zip(texts, block, strict=True)]
            for parts in itertools.zip_longest(*wrapped, fillvalue=""):
                cells = (f"{part:<{widths[column]}}" for part, column in zip(parts[1:], block, strict=True))
                lines.append("  ".join([f"{parts[0]:<{first}}", *cells]).rstrip())
        return lines


def report(comparison: Comparison, found: Sequence[Note]) -> str:
    """All tables and notes as plain text of `TERMINAL_WIDTH` columns."""
    names = [textwrap.fill(f"{run.key}  {run.name}: {run.status}", TERMINAL_WIDTH) for run in comparison.runs]
    marks = {"warning": "! ", "note": "- "}
    told = [
        line
        for note in found
        for line in textwrap.wrap(note.text, TERMINAL_WIDTH, initial_indent=marks[note.level], subsequent_indent="  ")
    ]
    common = common_images(comparison)
    tables = [
        results_table(comparison),
        results_table(comparison, common) if common is not None else None,
        *evaluation_tables(comparison),
        differences_table(comparison),
        summary_table(comparison),
    ]
    blocks = ["\n".join(names), "\n".join(told), *(table.text() for table in tables if table)]
    return "\n\n".join(block for block in blocks if block)


def summary_table(comparison: Comparison) -> Table:
    """Each run's facts, a column for each run."""
    rows: dict[str, Callable[[ComparedRun], object]] = {
        "status": lambda run: run.status,
        "warnings": lambda run: ", ".join(dict.fromkeys(str(row.get("name")) for row in run.warnings)) or "none",
        "data": lambda run: run.data,
        "method": lambda run: run.recipe and run.recipe.method.name,
        "backbone": lambda run: run.recipe and run.recipe.backbone.name,
        "recipe's hash": lambda run: run.recipe_hash,
        "seed": lambda run: run.recipe and run.recipe.seed,
        "images seen": lambda run: f"{run.images:,}",
        "training time, minutes": lambda run: f"{run.seconds / 60:.1f}",
        "images/s": lambda run: run.images_per_second and f"{run.images_per_second:,.0f}",
        "time spent waiting for images": lambda run: None if run.waiting is None else f"{run.waiting:.0%}",
        "global views": lambda run: run.recipe and f"2 x {run.recipe.views.global_size} px",
        "local views": _local_views,
        "mean(PS_l / PS_g)": lambda run: run.views and f"{run.views.ratio:.3f}",
        "matched local size": lambda run: run.views and f"{run.views.matched_size} px",
        "unusable images set aside": lambda run: run.set_aside or None,
        "resumed": lambda run: f"{run.resumes} x" if run.resumes else None,
        "device": lambda run: run.device,
        "versions": lambda run: ", ".join(f"{name} {version}" for name, version in run.versions.items()),
    }
    texts = {name: [_text(of(run)) for run in comparison.runs] for name, of in rows.items()}
    told = {name: cells for name, cells in texts.items() if any(cell != NOTHING for cell in cells)}
    return Table(
        title="Runs",
        columns=_run_columns(comparison),
        runs_in="columns",
        rows=[(name, [Cell(cell) for cell in cells]) for name, cells in told.items()],
        notes=["mean(PS_l / PS_g): pixel scale of local over global views; at 1 they are matched."],
    )


def results_table(comparison: Comparison, within: int | None = None) -> Table | None:
    """The latest figures of each run, or those after at most `within` images; None where there are none yet."""
    limit = math.inf if within is None else within
    runs = [run for run in comparison.runs if run.quality and (within is None or run.quality[-1]["step"] > 0)]
    columns = [("", "images seen")]
    seen = [max((row["images"] for row in run.quality if row["images"] <= limit), default=0) for run in runs]
    cells = [[Cell(f"{images:,.0f}")] for images in seen]
    for measure, subject in itertools.product(MEASURES, SUBJECTS if within is None else ["student"]):
        values = [run.result(measure, subject, limit) for run in runs]
        if all(value is None for value in values) or (subject == "pixels" and comparison.measured_alike(measure)):
            continue  # what all share is a note
        columns.append((MEASURES[measure], NAMES_OF_SUBJECTS[subject]))
        is_contest = subject in ("student", "teacher") and comparison.measured_alike(measure)
        best = _best(values, digits=_digits(measure)) if is_contest else None
        for row, value in zip(cells, values, strict=True):
            row.append(_figure(value, best, _digits(measure)))
    if len(columns) == 1:
        return None
    return Table(
        title="Results" if within is None else f"Results after at most {within:,} images",
        columns=columns,
        rows=[(run.key, row) for run, row in zip(runs, cells, strict=True)],
        notes=_notes_on_results(comparison) if within is None else (),
    )


def evaluation_tables(comparison: Comparison) -> list[Table]:
    """The results of `lowssl evaluate` in the runs' folders, a table for each task."""
    found = [(run, name, result) for run in comparison.runs for name, result in run.evaluations.items()]
    tasks = dict.fromkeys(result.task for _, _, result in found)
    return [_evaluation_table(task, [each for each in found if each[2].task == task]) for task in tasks]


def _evaluation_table(task: str, found: Sequence[tuple[ComparedRun, str, Results]]) -> Table:
    several = len({run.key for run, _, _ in found}) < len(found)
    rows = [
        (f"{run.key} {row.subject}" + (f", {name}" if several else ""), row.values)
        for run, name, result in found
        for row in result.rows
    ]
    columns = list(dict.fromkeys(column for _, values in rows for column in values))
    settings = [flat_keys(result.settings) for _, _, result in found]
    names = sorted({name for each in settings for name in each})
    different = [name for name in names if any(each.get(name) != settings[0].get(name) for each in settings)]
    best: dict[str, float | None] = {}
    if not different:
        for column in (name for name in columns if name not in NOT_RANKED):
            is_cost = bool(LESS_IS_BETTER & set(column.lower().replace("-", " ").replace("_", " ").split()))
            best[column] = _best([values.get(column) for _, values in rows], least=is_cost)
    remarks = [f"Judged with different settings ({', '.join(different)}): not to be compared."] if different else []
    return Table(
        title=f"Evaluation: {task}",
        columns=[("", column) for column in columns],
        rows=[(head, [_figure(values.get(column), best.get(column)) for column in columns]) for head, values in rows],
        notes=[*remarks, *dict.fromkeys(note for _, _, result in found for note in result.notes)],
    )


def differences_table(comparison: Comparison) -> Table | None:
    """The keys in which the recipes known differ; None where there is nothing to compare."""
    if sum(run.recipe is not None for run in comparison.runs) < 2:
        return None

    first = next(run.key for run in comparison.runs if run.recipe)

    def cell(run: ComparedRun, values: Mapping[str, Any]) -> Cell:
        if not run.recipe:
            return Cell("not known")
        text = json.dumps(values[run.key], ensure_ascii=False) if run.key in values else "absent"
        return Cell(text, "changed" if values.get(run.key) != values.get(first) else "")

    return Table(
        title="Recipe differences",
        columns=_run_columns(comparison),
        runs_in="columns",
        rows=[(key, [cell(run, values) for run in comparison.runs]) for key, values in comparison.differences.items()],
        notes=[
            f"Keys in which recipes differ; the page marks what is not as in {first}."
            if comparison.differences
            else "The recipes known are the same in every key."
        ],
    )


def _notes_on_results(comparison: Comparison) -> list[str]:
    runs = comparison.runs
    lines = [
        "Retrieval: share of images found first among all from a cropped, mirrored, recolored copy. k-NN: share whose "
        "class the 20 nearest name. RankMe: effective rank of the features; fuller is not always better."
    ]
    shared = []
    for measure, name in MEASURES.items():
        value = next((value for run in runs if (value := run.result(measure, "pixels")) is not None), None)
        if value is not None and comparison.measured_alike(measure):
            shared.append(f"{name} {value:.{_digits(measure)}f}")
    if shared:
        lines.insert(0, f"Raw pixels, the yardstick of what needs no learning: {', '.join(shared)}.")
    shares = [(value, run.recipe) for run in runs if run.recipe and (value := run.result("retrieval", "student"))]
    if shares:
        value, recipe = max(shares, key=lambda pair: pair[0])
        error = math.sqrt(value * (1 - value) / recipe.monitor.quality_images)
        count = recipe.monitor.quality_images
        error = math.sqrt(value * (1 - value) / count)
        lines.append(
            f"Shares of at most {count} images: the standard error of {value:.3f} is {error:.3f} or more, and one seed "
            "says nothing of others. Differences of less than twice that mean little."
        )
    return lines


def _local_views(run: ComparedRun) -> str | None:
    if not run.views:
        return None
    if not run.recipe:
        return f"{run.views.local_size} px"
    count = run.recipe.views.num_locals
    return f"{count} x {run.views.local_size} px" if count else "none"


def _run_columns(comparison: Comparison) -> list[tuple[str, str]]:
    return [("", run.key) for run in comparison.runs]


def _best(values: Sequence[float | None], *, least: bool = False, digits: int = 3) -> float | None:
    """The best of a column, where at least two have a figure and these differ in the digits shown."""
    known = [value for value in values if value is not None]
    if len({round(value, digits) for value in known}) < 2:
        return None
    return min(known) if least else max(known)


def _figure(value: float | None, best: float | None, digits: int = 3) -> Cell:
    if value is None:
        return Cell(NOTHING)
    is_best = best is not None and round(value, digits) == round(best, digits)
    return Cell(f"{value:,.{digits}f}", "best" if is_best else "")


def _digits(measure: str) -> int:
    """After the point: shares have three."""
    return 1 if measure == "rankme" else 3


def _text(value: object) -> str:
    return NOTHING if value is None else str(value)
