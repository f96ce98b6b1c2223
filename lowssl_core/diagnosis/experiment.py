"""Running a diagnosis: each training to its end, its judgement kept beside it, the figure drawn after each."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import lowssl_core
from lowssl_core.compute import choose_device
from lowssl_core.diagnosis.figure import diagnosis_figure
from lowssl_core.diagnosis.outcome import YARDSTICKS, Level, Outcome, Trained
from lowssl_core.diagnosis.plan import DiagnosisOptions, Kind, Sweep, Swept, absolute, default_alpha_of, digest, plan
from lowssl_core.evaluation.results import Results
from lowssl_core.evaluation.tasks import EvaluationOptions, judge_knn, judge_quality
from lowssl_core.files import write_atomically
from lowssl_core.interruption import StoppedError
from lowssl_core.journal import read_metrics
from lowssl_core.pretrain import main as pretrain
from lowssl_core.recipe import Recipe
from lowssl_core.run import CHECKPOINT, ENCODER

# k of k-NN; images, and copies of each, that the label-free figures look at.
NEIGHBORS, IMAGES, COPIES = 20, 1000, 10

Measures = Mapping[str, float]


def run_diagnosis(options: DiagnosisOptions) -> int:
    """Train and judge what is not there yet, drawing after each training; returns an exit status.

    Raises:
        UserError: data, recipe or values cannot be used.
    """
    sweep = plan(options)
    trainings = list(sweep.trainings())
    print(_announcement(sweep, len(trainings)), flush=True)
    trained: dict[tuple[float, int], Trained] = {}
    yardsticks: Mapping[str, Measures] = {}
    picture = options.out / f"{options.kind}.png"
    for done, (swept, seed) in enumerate(trainings):
        folder = sweep.folder(swept, seed)
        is_new = not _is_judged(sweep, folder, with_yardsticks=not yardsticks)
        if is_new:
            print(f"\n{_progress(sweep, swept, seed, trained, len(trainings))}\n", flush=True)
        try:
            if is_new and (status := _train(sweep, swept, seed)):
                return _stopped(status, done, len(trainings))
            subjects = _judge(sweep, folder, with_yardsticks=not yardsticks)
        except StoppedError as stop:
            return _stopped(stop.status, done, len(trainings))
        yardsticks = yardsticks or {name: subjects[name] for name in YARDSTICKS}
        trained[swept.value, seed] = _trained(sweep, swept, seed, subjects["student"])
        if is_new or done == len(trainings) - 1:
            outcome = _outcome(sweep, trained, yardsticks)
            diagnosis_figure(picture, outcome)
            _write_json(sweep, outcome)
    print("\n".join(["", outcome.table(), "", *outcome.findings(), ""]))
    print(f"  {picture}  figure\n  {options.json}  all numbers\n  {options.out / 'runs'}  the trainings")
    return 0


def _train(sweep: Sweep, swept: Swept, seed: int) -> int:
    """Run `lowssl-pretrain` to the end of one training, from where it stopped; returns its exit status."""
    options, folder = sweep.options, sweep.folder(swept, seed)
    arguments = [options.recipe, "--data", options.data, "--out", str(folder), "--device", options.device]
    if (folder / CHECKPOINT).exists():
        arguments.append("--resume")
    if sweep.judged_on != options.data:
        arguments += ["--eval-data", sweep.judged_on]
    for override in (*options.overrides, *swept.overrides(seed)):
        arguments += ["--set", override]
    return pretrain(arguments)


def _judge(sweep: Sweep, folder: Path, *, with_yardsticks: bool) -> dict[str, dict[str, float]]:
    """The measures of a finished training, by subject: "student" and, if wanted, the yardsticks.

    Raises:
        StoppedError: told to stop; what was judged is kept.
    """
    features = folder / "features"
    options = EvaluationOptions(
        model=str(folder / ENCODER),
        data=sweep.options.data,
        eval_data=sweep.judged_on,
        branches=("student",),
        yardsticks=with_yardsticks,
        cache=features,
        device=choose_device(sweep.options.device),
    )
    on_judged = dataclasses.replace(options, data=sweep.judged_on)
    tasks: Mapping[str, Callable[[], Results]] = {
        "quality": lambda: judge_quality(on_judged, images=IMAGES, views=COPIES),
        "knn": lambda: judge_knn(options, (NEIGHBORS,)),
    }
    measures: dict[str, dict[str, float]] = {}
    for task, path in _judgement_files(sweep, folder).items():
        if not _holds(path, with_yardsticks):
            tasks[task]().write_json(path)
        for row in json.loads(path.read_text())["rows"]:
            values = {"knn" if name == f"k = {NEIGHBORS}" else name: value for name, value in row["values"].items()}
            measures.setdefault(row["subject"], {}).update(values)
    shutil.rmtree(features, ignore_errors=True)
    return measures


def _judgement_files(sweep: Sweep, folder: Path) -> dict[str, Path]:
    """Where a training's judgements are kept; what they were judged on is in the names."""
    numbers = (str(number) for number in (NEIGHBORS, IMAGES, COPIES))
    key = digest(absolute(sweep.judged_on), sweep.judged.description, *numbers)
    tasks = ("quality", "knn") if sweep.has_labels else ("quality",)
    return {task: folder / f"{task}-{key}.json" for task in tasks}


def _is_judged(sweep: Sweep, folder: Path, *, with_yardsticks: bool) -> bool:
    return all(_holds(path, with_yardsticks) for path in _judgement_files(sweep, folder).values())


def _holds(path: Path, with_yardsticks: bool) -> bool:
    """Whether a judgement is there, with the yardsticks if they are wanted."""
    if not path.exists():
        return False
    subjects = {row["subject"] for row in json.loads(path.read_text())["rows"]}
    return not with_yardsticks or subjects >= set(YARDSTICKS)


def _trained(sweep: Sweep, swept: Swept, seed: int, measures: Measures) -> Trained:
    folder = sweep.folder(swept, seed)
    return Trained(
        measures=measures,
        recipe_hash=dataclasses.replace(swept.recipe, seed=seed).hash(),
        run=folder.relative_to(sweep.options.out).as_posix(),
        seconds=read_metrics(folder, "end")[-1]["seconds"],
    )


def _outcome(sweep: Sweep, trained: Mapping[tuple[float, int], Trained], yardsticks: Mapping[str, Measures]) -> Outcome:
    kind, own = sweep.options.kind, sweep.own
    levels = [
        Level(
            value=swept.value,
            x=swept.measurement.ratio if kind == "pixel-scale" else swept.value,
            name=_name(kind, swept.value),
            measurement=swept.measurement,
            is_own=swept.is_own,
            trained={seed: trained[swept.value, seed] for seed in sweep.seeds if (swept.value, seed) in trained},
        )
        for swept in sweep.swept
    ]
    epochs = f"{own.epochs} epoch{'s' if own.epochs > 1 else ''}"
    return Outcome(
        kind=kind,
        axis=_axis_title(kind, own),
        title=f"{own.method.name} on {own.backbone.name}, {epochs} of {sweep.train.description}",
        judged=sweep.judged.description,
        levels=sorted(levels, key=lambda level: level.x),
        marks=_marks(sweep),
        yardsticks=yardsticks,
    )


def _marks(sweep: Sweep) -> dict[str, float]:
    """Places on the axis worth a line."""
    own = sweep.own
    if sweep.options.kind == "pixel-scale":
        return {"matched": 1.0, "recipe": sweep.own_measurement.ratio}
    if sweep.options.kind == "alpha":
        assert own.alpha is not None, "plan has put in the default"
        return {"default loss": default_alpha_of(own), "recipe": own.alpha}
    return {"recipe": own.views.global_scale[0]} if any(swept.is_own for swept in sweep.swept) else {}


def _axis_title(kind: Kind, own: Recipe) -> str:
    if kind == "pixel-scale":
        return "mean(PS_l / PS_g): source pixels per view pixel, local over global"
    if kind == "alpha":
        return "alpha: weight of the global pairs; local pairs weigh 1 - alpha"
    low, high = own.views.local_scale[0], own.views.global_scale[1]
    return f"s0: locals show {low:g} to s0 of an image, globals s0 to {high:g}"


def _name(kind: Kind, value: float) -> str:
    return f"{value:g} px" if kind == "pixel-scale" else f"{value:.3g}"


def _write_json(sweep: Sweep, outcome: Outcome) -> None:
    options = sweep.options
    document: dict[str, Any] = {
        **outcome.as_dict(),
        "recipe": {"name": options.recipe, "overrides": list(options.overrides), "hash": sweep.own.hash()},
        "data": sweep.train.description,
        "eval_data": sweep.judged.description,
        "settings": {"k": NEIGHBORS, "temperature": 0.07, "images": IMAGES, "copies": COPIES},
        "seeds": list(sweep.seeds),
        "version": lowssl_core.__version__,
    }
    write_atomically(options.json, lambda file: file.write((json.dumps(document, indent=2) + "\n").encode()))


def _stopped(status: int, done: int, total: int) -> int:
    if status in (130, 143):
        print(f"\ninterrupted: {done} of {total} trainings are finished; the same command goes on from here")
    elif status == 1:
        print(f"\nthis training cannot be finished ({done} of {total} are): leave its value out with --values")
    return status


def _announcement(sweep: Sweep, total: int) -> str:
    options = sweep.options
    names = ", ".join(_name(options.kind, swept.value) for swept in sweep.swept)
    seeds = "seed" if len(sweep.seeds) == 1 else "seeds"
    judged = f"judged on {sweep.judged.description}"
    if sweep.judged.description == sweep.train.description:
        judged = "judged on the same images, as no others are held out"
    return "\n".join(
        [
            f"{options.kind} of {options.recipe}: {names}; {len(sweep.seeds)} {seeds} each: {total} trainings",
            f"trained on {sweep.train.description}",
            judged + ("" if sweep.has_labels else ": label-free figures only"),
        ]
    )


def _progress(sweep: Sweep, swept: Swept, seed: int, trained: Mapping[tuple[float, int], Trained], total: int) -> str:
    kind, done = sweep.options.kind, len(trained)
    text = f"training {done + 1} of {total}: {kind} {_name(kind, swept.value)}, seed {seed}"
    if not trained:
        return text
    left = round(fmean(each.seconds for each in trained.values()) * (total - done))
    return f"{text}; about {left // 60}:{left % 60:02} of training left"
