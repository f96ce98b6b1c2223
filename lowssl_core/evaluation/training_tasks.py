"""The tasks that train on labels: linear classifiers on frozen features, and fine-tuning on a share of the labels."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lowssl_core.checkpoint import is_checkpoint, load_checkpoint
from lowssl_core.errors import UserError
from lowssl_core.evaluation.linear import RATES, fit_linear
from lowssl_core.evaluation.linear_protocol import linear_run, paper_config
from lowssl_core.evaluation.results import Figures, Results
from lowssl_core.evaluation.semi import head_layers, label_list, read_list, semi_config, semi_run, write_list
from lowssl_core.evaluation.subjects import Subject, fingerprint
from lowssl_core.evaluation.supervised import Outcome, SupervisedRun
from lowssl_core.evaluation.tasks import EvaluationOptions, LabelledTask, details
from lowssl_core.interruption import Interruption
from lowssl_core.meter import Meter
from lowssl_core.recipe import changed

EPOCHS = 100


def judge_linear(options: EvaluationOptions) -> Results:
    """Linear accuracy on features computed once, the learning rate chosen on held-out training images.

    Raises:
        UserError: see `LabelledTask`.
        StoppedError: told to stop.
    """
    rows = []
    with LabelledTask(options) as task:
        for subject in task.subjects:
            train, test = task.features(subject)
            with Meter(f"{subject.name}: linear", 2 * EPOCHS, "epochs") as meter, Interruption() as asked:
                result = fit_linear(
                    train.values,
                    train.labels(),
                    test.values,
                    test.labels(),
                    epochs=EPOCHS,
                    on_epoch=partial(_count, meter, asked),
                    device=options.device,
                )
            sweep = [asdict(rate) for rate in result.sweep]
            more = {"rate": result.rate, "rate_at_edge": result.at_edge, "sweep": sweep}
            rows.append(
                Figures(
                    subject=subject.name,
                    values=_accuracies(result.top1, result.top5),
                    details=details(subject, train, test) | more,
                )
            )
        return Results(
            task="linear",
            model=options.model,
            settings=task.settings(protocol="fast", epochs=EPOCHS, rates=list(RATES), seed=0),
            rows=rows,
            notes=(
                f"share of {len(task.test):,} images ({task.test.description}) that a linear classifier names right, "
                f"trained on features of {len(task.train):,} images without augmentation, its learning rate chosen on "
                "a tenth of them",
            ),
        )


def judge_linear_paper(
    options: EvaluationOptions, *, overrides: Sequence[str] = (), out: Path | None = None, workers: int = 0
) -> Results:
    """Linear accuracy by the paper's protocol, on augmented images (method.md: "Evaluation").

    Args:
        options: what; `cache` is not used.
        overrides: of `LinearConfig`, "key=value".
        out: folder for the state of training, from which the same call goes on.
        workers: processes that load images.

    Raises:
        UserError: see `LabelledTask`; a subject that is no network, or a wrong override.
        StoppedError: told to stop; the state is in `out`.
    """
    rows: list[Figures] = []
    notes: dict[str, None] = {}
    with LabelledTask(options) as task:
        for subject in task.subjects:
            encoder = subject.encoder
            run = linear_run(
                encoder.backbone,
                encoder.preprocess,
                task.train,
                task.test,
                changed(paper_config(encoder.backbone), overrides),
                checkpoint=_state_path(out, "linear", subject),
                workers=workers,
            )
            outcome = _complete(run, f"{subject.name}: linear")
            values = _accuracies(outcome.top1, outcome.top5)
            rows.append(Figures(subject=subject.name, values=values, details=_account(outcome)))
            notes |= dict.fromkeys(outcome.notes)
        return Results(
            task="linear",
            model=options.model,
            settings=task.settings(protocol="paper", overrides=list(overrides)),
            rows=rows,
            notes=(
                f"share of {len(task.test):,} images ({task.test.description}) that a linear classifier names right, "
                f"trained on augmented images ({task.train.description}) by the paper's protocol",
                *notes,
            ),
        )


def judge_semi(
    options: EvaluationOptions,
    *,
    percents: Sequence[float],
    seed: int = 0,
    names_file: Path | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    workers: int = 0,
) -> Results:
    """Accuracy after fine-tuning on a share of the labels, from the method's own head (method.md: "Evaluation").

    Args:
        options: what; `cache` is not used.
        percents: of the labels, a list of images of each.
        seed: of the lists.
        names_file: a list of images, a name a line, to be used instead.
        overrides: of `SemiConfig`, "key=value".
        out: folder for the lists and the state of training, from which the same call goes on.
        workers: processes that load images.

    Raises:
        UserError: see `LabelledTask`; a subject that is no network, a wrong list, percentage or override.
        StoppedError: told to stop; the state is in `out`.
    """
    for percent in percents:
        if not 0 < percent <= 100:
            raise UserError(f"--percent {percent:g}: wanted numbers above 0, up to 100")
    rows: list[Figures] = []
    notes: dict[str, None] = {}
    with LabelledTask(options) as task:
        lists = _lists(task, percents, seed, names_file, out)
        for subject in task.subjects:
            encoder, head = subject.encoder, _head_of(options.model, subject)
            values: dict[str, float] = {}
            accounts: dict[str, Any] = {"head": "of the method" if head is not None else "none: a plain linear layer"}
            for title, (share, names) in lists.items():
                run = semi_run(
                    encoder.backbone,
                    head,
                    encoder.preprocess,
                    task.train,
                    names,
                    task.test,
                    changed(semi_config(share), overrides),
                    checkpoint=_state_path(out, f"semi-{len(names)}", subject),
                    workers=workers,
                )
                outcome = _complete(run, f"{subject.name}: {title}, {len(names):,} labels")
                values |= {f"{title} {name}": value for name, value in _accuracies(outcome.top1, outcome.top5).items()}
                accounts[title] = _account(outcome) | {"labels": len(names)}
                notes |= dict.fromkeys(f"{title}: {note}" for note in outcome.notes)
            rows.append(Figures(subject=subject.name, values=values, details=accounts))
        return Results(
            task="semi",
            model=options.model,
            settings=task.settings(percents=list(percents), seed=seed, overrides=list(overrides)),
            rows=rows,
            notes=(
                f"share of {len(task.test):,} images ({task.test.description}) named right after fine-tuning the whole "
                f"network on so many of the labels of {task.train.description}",
                *notes,
            ),
        )


def _lists(
    task: LabelledTask, percents: Sequence[float], seed: int, names_file: Path | None, out: Path | None
) -> dict[str, tuple[float, list[str]]]:
    """By title: the share of the labels, and the names of the labelled images."""
    train = task.train
    if names_file is not None:
        listed = read_list(names_file, train)
        return {names_file.stem: (len(listed) / len(train), listed)}
    names = [train.name(index) for index in range(len(train))]
    labels = [label for index in range(len(train)) if (label := train.label(index)) is not None]
    lists = {f"{percent:g} %": (percent / 100, label_list(names, labels, percent / 100, seed)) for percent in percents}
    if out is not None:
        for (_, listed), percent in zip(lists.values(), percents, strict=True):
            write_list(out / f"labels-{percent:g}-seed{seed}.txt", listed)
    return lists


def _head_of(model: str, subject: Subject) -> nn.Sequential | None:
    """The hidden layers of the method's head, where the model is a checkpoint; encoders' files have none."""
    if not is_checkpoint(Path(model)):
        return None
    return head_layers(load_checkpoint(Path(model)), "teacher" if subject.name == "teacher" else "student")


def _state_path(out: Path | None, name: str, subject: Subject) -> Path | None:
    """Where a training keeps its state: weights are told apart, so that one folder serves any number of models."""
    return None if out is None else out / f"{name}-{subject.name}-{fingerprint(subject.embedder)}.safetensors"


def _complete(run: SupervisedRun, label: str) -> Outcome:
    with Interruption() as asked:
        return run.complete(label, asked)


def _account(outcome: Outcome) -> dict[str, Any]:
    """What JSON says of a training."""
    return {
        "loss": outcome.loss,
        "history": [asdict(epoch) for epoch in outcome.history],
        "notes": list(outcome.notes),
        "config": asdict(outcome.config),
    }


def _accuracies(top1: float, top5: float | None) -> dict[str, float]:
    return {"top-1": top1} | ({} if top5 is None else {"top-5": top5})


def _count(meter: Meter, asked: Interruption) -> None:
    meter.advance()
    asked.check()
