"""What a comparison of runs says in words: what must not be compared, what went wrong, what differs by design."""

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from lowssl_core.comparison.run_folder import ComparedRun
from lowssl_core.comparison.runs import MEASURES, Comparison

_Value = TypeVar("_Value", bound=Hashable)

# A mean ratio of pixel scales further from 1 than this is worth a word.
MATCHED_WITHIN = 0.1
# Up to this ratio of images seen, runs are of one length: epochs of other batch sizes end at other images.
SAME_LENGTH = 1.05
# Keys of a recipe that change what a loss of a given height means.
KEYS_OF_LOSS = ("alpha", "method.name", "method.outputs", "method.prototypes", "method.queue_length")


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something a reader should know; a warning stands above everything else."""

    level: Literal["warning", "note"]
    text: str


def notes(comparison: Comparison) -> list[Note]:
    """What stands out, warnings first: what must not be compared, what went wrong, what differs by design."""
    runs = comparison.runs
    found = [Note(level="warning", text=text) for text in _incomparable(comparison)]
    for run in runs:
        found += [Note(level="warning", text=f"{run.key} {run.status}.") for _ in range(run.state == "failed")]
        found += [
            Note(level="warning", text=f"{run.key} warned at step {row['step']:,} of {row.get('name')}.")
            for row in run.warnings
            if row.get("name") != "not a number"
        ]
        found += [Note(level="warning", text=f"{run.key}: {problem}.") for problem in run.problems]
    texts = [_unfinished(run) for run in runs if run.state in ("running", "stopped")]
    if (common := common_images(comparison)) is not None:
        texts.append(
            "The runs saw different numbers of images: compare their curves at equal images, and their results at "
            f"{common:,} images, the last point at which all were measured."
        )
    texts += _same_recipes(runs)
    texts += [text for run in runs if (text := _mismatch(run))]
    return found + [Note(level="note", text=text) for text in texts]


def common_images(comparison: Comparison) -> int | None:
    """The images after which all runs were measured, where their last measurements are far apart."""
    last = [run.quality[-1]["images"] for run in comparison.runs if run.quality and run.quality[-1]["step"] > 0]
    return int(min(last)) if last and max(last) > SAME_LENGTH * min(last) else None


def loss_note(comparison: Comparison) -> str | None:
    """Why losses of these runs are not of one scale, or None."""
    causes = [key for key in KEYS_OF_LOSS if key in comparison.differences]
    if not causes:
        return None
    if causes == ["alpha"]:
        return "The runs differ in alpha, which weighs the two parts of the loss: compare the parts."
    return f"The runs differ in {', '.join(causes)}: their losses are not of one scale. Compare shapes, not heights."


def _unfinished(run: ComparedRun) -> str:
    more = "" if run.recipe or run.state != "running" else "; its recipe is known from its first checkpoint on"
    return f"{run.key} has not finished: {run.status}{more}."


def _incomparable(comparison: Comparison) -> Iterator[str]:
    runs = comparison.runs
    alike = all(comparison.measured_alike(measure) for measure in MEASURES)
    if not (comparison.share("data") and comparison.share("data_images")):
        used = comparison.share("data")
        data = _grouped((run.key, f"{run.data}{f' ({run.data_images} used)' * used}") for run in runs if run.data)
        told = "; ".join(f"{', '.join(keys)} on {text}" for text, keys in data.items())
        what = "what separates their figures may be the data" if alike else "their figures may not be compared"
        yield f"The runs trained on different data: {told}. Losses and quality: {what}."
    elif not alike:
        found = [(run.key, run.result("retrieval", "pixels")) for run in runs]
        told = ", ".join(f"{value:.3f} in {key}" for key, value in found if value is not None)
        yield (
            f"Quality was measured on different images (raw pixels reach a retrieval of {told}): these figures may not "
            "be compared. Judge the encoders with lowssl evaluate, on the same images."
        )


def _same_recipes(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """Runs of which chance alone tells the difference."""
    known = [run for run in runs if run.recipe]
    for keys in _grouped((run.key, dataclasses.replace(run.recipe, seed=0)) for run in known if run.recipe).values():
        seeds = [run.recipe.seed for run in known if run.recipe and run.key in keys]
        if len(set(seeds)) > 1:
            told = ", ".join(map(str, seeds))
            yield (
                f"{' and '.join(keys)} have the same recipe, with seeds {told}: what separates them shows how much "
                "is chance."
            )
        elif len(keys) > 1:
            yield f"{' and '.join(keys)} have the same recipe and seed: what separates them is not the recipe."


def _mismatch(run: ComparedRun) -> str | None:
    if not run.views or not (run.recipe and run.recipe.views.num_locals) or abs(run.views.ratio - 1) <= MATCHED_WITHIN:
        return None
    return (
        f"In {run.key} the pixel scale of local views is {run.views.ratio:.2f} times that of global ones; "
        f"at a local size of {run.views.matched_size} px, not {run.views.local_size}, they would match."
    )


def _grouped(pairs: Iterable[tuple[str, _Value]]) -> dict[_Value, list[str]]:
    """The keys of each value."""
    groups: dict[_Value, list[str]] = {}
    for key, value in pairs:
        groups.setdefault(value, []).append(key)
    return groups
