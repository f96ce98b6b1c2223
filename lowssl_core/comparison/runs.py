"""Runs side by side: read from their folders, named, and the keys in which their recipes differ."""

import dataclasses
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowssl_core.comparison.run_folder import METRICS, SUBJECTS, ComparedRun, is_run, read_run
from lowssl_core.errors import UserError
from lowssl_core.recipe import flat_keys
from lowssl_core.run import CHECKPOINT

MEASURES = {"retrieval": "Retrieval", "knn": "k-NN", "rankme": "RankMe"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: in the order given.
        differences: for each key in which the recipes known differ, its value by run; absent ones are left out.
    """

    runs: Sequence[ComparedRun]
    differences: Mapping[str, Mapping[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        flat = {run.key: flat_keys(run.recipe.as_dict()) for run in self.runs if run.recipe}
        keys = sorted({key for recipe in flat.values() for key in recipe})
        differing = {
            key: {run: recipe[key] for run, recipe in flat.items() if key in recipe}
            for key in keys
            if any(recipe.get(key) != next(iter(flat.values())).get(key) for recipe in flat.values())
        }
        object.__setattr__(self, "differences", differing)

    def share(self, attribute: str) -> bool:
        """Whether all runs that know an attribute have the same value of it."""
        values = [getattr(run, attribute) for run in self.runs if getattr(run, attribute) is not None]
        return all(value == values[0] for value in values)

    def measured_alike(self, measure: str) -> bool:
        """Whether a measure was taken of all runs on the same images.

        Runs do not record on which images quality is measured; the figures of raw pixels tell.
        """
        for name in (measure, "rankme"):
            values = [value for run in self.runs if (value := run.result(name, "pixels")) is not None]
            if any(not math.isclose(value, values[0], rel_tol=1e-3) for value in values):
                return False
        return True


def read_runs(folders: Sequence[Path]) -> Comparison:
    """Read the folders of runs; one that is given twice counts once.

    Raises:
        UserError: a folder that is missing or no run's, none at all, or more than there are letters.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    if not 1 <= len(unique) <= len(string.ascii_uppercase):
        raise UserError(f"{len(unique)} runs given: compare takes 1 to {len(string.ascii_uppercase)}")
    for folder in unique:
        _check_is_run(folder)
    names = [_printable(name) for name in unique_names([folder.resolve() for folder in unique])]
    labelled = zip(string.ascii_uppercase, names, unique, strict=False)
    return Comparison(runs=[read_run(key, name, folder) for key, name, folder in labelled])


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, and as many parts before it as tell those of the same name apart."""
    depths = [1] * len(folders)
    while True:
        names = ["/".join(folder.parts[-depth:]) for folder, depth in zip(folders, depths, strict=True)]
        if len(set(names)) == len(names):
            return names
        depths = [depth + (names.count(name) > 1) for depth, name in zip(depths, names, strict=True)]


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """All of a comparison as a tree of plain values."""
    runs = []
    for run in comparison.runs:
        plain = {entry.name: getattr(run, entry.name) for entry in dataclasses.fields(run)}
        plain |= {
            "recipe": run.recipe.as_dict() if run.recipe else None,
            "views": dataclasses.asdict(run.views) if run.views else None,
            "evaluations": {name: dataclasses.asdict(result) for name, result in run.evaluations.items()},
            "images_per_second": run.images_per_second,
            "waiting": run.waiting,
            "results": {
                measure: {subject: run.result(measure, subject) for subject in SUBJECTS} for measure in MEASURES
            },
        }
        runs.append(plain)
    return {
        "runs": runs,
        "differences": comparison.differences,
    }


def _printable(name: str) -> str:
    """A file's name without the bytes that are no text."""
    return name.encode(errors="replace").decode()


def _check_is_run(folder: Path) -> None:
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the run's folder: {folder.parent}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give folders that lowssl-pretrain wrote (its --out)")
    if is_run(folder):
        return
    inside = sorted(each.name for each in folder.iterdir() if each.is_dir() and is_run(each))
    hint = f"; it holds the runs {', '.join(inside[:5])}{' ...' if inside[5:] else ''}: give those" if inside else ""
    raise UserError(f"{folder} is no run of lowssl-pretrain: it has neither {METRICS} nor {CHECKPOINT}{hint}")
