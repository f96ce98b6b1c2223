"""The tasks that judge features: from what a user names to the results of each subject."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from lowssl_core.errors import UserError
from lowssl_core.evaluation.features import BATCH, Features, FeatureStore
from lowssl_core.evaluation.results import Figures, Results
from lowssl_core.evaluation.subjects import (
    BRANCHES,
    BranchName,
    Embedder,
    Subject,
    check_same_classes,
    fingerprint,
    open_subjects,
)
from lowssl_core.images import Pixels
from lowssl_core.interruption import Interruption
from lowssl_core.meter import Meter
from lowssl_core.neighbors import knn_accuracies
from lowssl_core.quality import label_free_quality, retrieval_copies
from lowssl_core.sources import open_source
from lowssl_core.sources.memory import load_images
from lowssl_core.sources.opening import open_held_out

NEIGHBORS = (10, 20, 100, 200)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is judged, on what.

    Attributes:
        model: as `open_subjects` takes it.
        data: images to learn from (bank, training), as `open_source` takes them.
        eval_data: images to score on; None: the test split of `data`, or else its validation split.
        branches: of a checkpoint, those wanted.
        yardsticks: whether raw pixels and the untrained network are judged beside it.
        cache: folder where features are kept for the next call; None: they go at the end.
        device: where networks run.
    """

    model: str
    data: str
    eval_data: str | None = None
    branches: Sequence[BranchName] = BRANCHES
    yardsticks: bool = False
    cache: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class LabelledTask:
    """Subjects, and labelled images to learn from and to score on; a context manager that keeps features.

    Raises:
        UserError: data or model cannot be used, labels are missing, or classes differ.
    """

    def __init__(self, options: EvaluationOptions) -> None:
        self.options = options
        self.train = open_source(options.data)
        self.test = open_source(options.eval_data) if options.eval_data else open_held_out(options.data)
        check_same_classes(self.train, self.test)
        if self.train.description == self.test.description and (options.eval_data or options.data) == options.data:
            raise UserError(f"--data and --eval-data are the same images ({self.train.description}): give others")
        self.subjects = open_subjects(
            options.model,
            branches=options.branches,
            recalibrate_on=self.train,
            device=options.device,
            yardsticks=options.yardsticks,
        )
        self._store = FeatureStore(options.cache)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._store)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def features(self, subject: Subject) -> tuple[Features, Features]:
        """The subject's features of the training and of the test images."""
        options = self.options
        train = self._store.features(
            subject.embedder, self.train, origin=options.data, label=f"{subject.name}: training images"
        )
        origin = options.eval_data or options.data
        test = self._store.features(subject.embedder, self.test, origin=origin, label=f"{subject.name}: test images")
        return train, test

    def settings(self, **more: Any) -> dict[str, Any]:
        """What the results were measured on."""
        return {"data": self.train.description, "eval_data": self.test.description, **more}


def judge_knn(options: EvaluationOptions, ks: Sequence[int] = NEIGHBORS) -> Results:
    """k-NN accuracy of the test images among the training images, for each of `ks`.

    Raises:
        UserError: see `LabelledTask`.
        StoppedError: told to stop.
    """
    with LabelledTask(options) as task:
        rows = []
        for subject in task.subjects:
            train, test = task.features(subject)
            with Meter(f"{subject.name}: neighbors", len(train.values), "images") as meter, Interruption() as asked:
                accuracies = knn_accuracies(
                    train.values,
                    train.labels(),
                    test.values,
                    test.labels(),
                    ks=ks,
                    device=options.device,
                    on_chunk=partial(_count, meter, asked),
                )
            values = {f"k = {k}": accuracy for k, accuracy in accuracies.items()}
            rows.append(Figures(subject=subject.name, values=values, details=details(subject, train, test)))
        return Results(
            task="knn",
            model=options.model,
            settings=task.settings(ks=list(ks), temperature=0.07),
            rows=rows,
            notes=(
                f"share of {len(test.values):,} images ({task.test.description}) whose class wins the vote of "
                f"their k nearest among {len(train.values):,} ({task.train.description}), each weighing "
                "exp(cosine / .07)",
            ),
        )


def judge_quality(options: EvaluationOptions, *, images: int, views: int, seed: int = 0) -> Results:
    """Label-free quality on a bare folder (`label_free_quality`).

    Args:
        options: what; `eval_data` is not looked at.
        images: how many images, drawn by `seed`.
        views: how many augmented copies of each.
        seed: of the draw.

    Raises:
        UserError: data or model cannot be used, or too few images can be read.
        StoppedError: told to stop.
    """
    source = open_source(options.data)
    subjects = open_subjects(
        options.model,
        branches=options.branches,
        recalibrate_on=source,
        device=options.device,
        yardsticks=options.yardsticks,
    )
    # A view may show a third of an image: twice the network's input is as much as it can see of it.
    largest = 2 * max(subject.embedder.preprocess.resize for subject in subjects)
    pixels, _, set_aside = load_images(source, limit=images, seed=seed, shrink_to=largest)
    if len(pixels) < 2:
        raise UserError(f"{source.description}: {len(pixels)} readable images; this takes at least 2")
    rows = []
    for subject in subjects:
        with Meter(f"{subject.name}: images and views", len(pixels) * (1 + views), "images") as meter:
            features = _embed(subject.embedder, pixels, meter)
            copies = [_embed(subject.embedder, retrieval_copies(pixels, seed=copy), meter) for copy in range(views)]
        try:
            values = label_free_quality(features, np.stack(copies, axis=1))
        except ValueError as error:  # features that are not finite
            raise UserError(f"{options.model}, {subject.name}: {error}: the weights are broken") from None
        more = {"width": subject.embedder.info.width, "fingerprint": fingerprint(subject.embedder)}
        rows.append(Figures(subject=subject.name, values=values, details=more))
    return Results(
        task="quality",
        model=options.model,
        settings={
            "data": source.description,
            "images": len(pixels),
            "views": views,
            "seed": seed,
            "set_aside": len(set_aside),
        },
        rows=rows,
        notes=_QUALITY_NOTES,
    )


_QUALITY_NOTES = (
    "retrieval: share of images found first from a cropped, mirrored, recolored copy. More is better.",
    "rankme, lidar: effective rank of features, and of what tells images apart beyond their views. More is better, at "
    "the same width and number of images; lidar says little with fewer images than features are wide.",
    "alpha_req: decay of the spectrum; near 1 is best, far above 1 few directions carry everything.",
    "alignment: squared distance of two views of one image. Less is better, unless uniformity is near 0.",
    "uniformity: log mean exp(-2 squared distance) of two images. Less is better; 0 is a collapse.",
    "feature_deviation: spread over directions; 1: even, 0: the same answer for every image.",
)


def details(subject: Subject, train: Features, test: Features) -> dict[str, Any]:
    """What JSON says of a subject beside its figures."""
    return {
        "width": subject.embedder.info.width,
        "fingerprint": train.model,
        "train_images": len(train.values),
        "test_images": len(test.values),
        "set_aside": {**train.set_aside, **test.set_aside},
    }


def _embed(embedder: Embedder, images: Sequence[Pixels] | Iterator[Pixels], meter: Meter) -> NDArray[np.float32]:
    """Features (N, D) of images, which come one at a time."""
    rows: list[NDArray[np.float32]] = []
    batch: list[Pixels] = []
    with Interruption() as asked:
        for image in images:
            batch.append(embedder.preprocess(image))
            if len(batch) == BATCH:
                rows.append(embedder.embed_inputs(np.stack(batch)).numpy())
                meter.advance(len(batch))
                batch = []
                asked.check()
    if batch:
        rows.append(embedder.embed_inputs(np.stack(batch)).numpy())
        meter.advance(len(batch))
    return np.concatenate(rows)


def _count(meter: Meter, asked: Interruption, done: int) -> None:
    meter.move_to(done)
    asked.check()
