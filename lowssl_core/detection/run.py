"""One fine-tuning and its judgement, from the first message to the table: the consumer of the detection loop."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torchvision.models.detection import MaskRCNN

from lowssl_core.detection.average_precision import KINDS, NAMES, judge
from lowssl_core.detection.coco import CocoData, check_same_categories
from lowssl_core.detection.fine_tuning import (
    DetectionReport,
    fine_tune,
    load_checkpoint,
    restore,
    save_checkpoint,
    take_checkpoint,
)
from lowssl_core.detection.loading import DetectionLoader
from lowssl_core.detection.network import average_statistics, build_detector, is_synchronised, to_device
from lowssl_core.detection.recipe import DetectionRecipe
from lowssl_core.distributed import Ranks, any_rank, barrier, mean_over_ranks
from lowssl_core.encoder import Encoder
from lowssl_core.errors import UserError
from lowssl_core.evaluation.results import Figures, Results
from lowssl_core.evaluation.subjects import fingerprint, open_subject
from lowssl_core.evaluation.timm_models import untrained
from lowssl_core.interruption import Interruption, StoppedError
from lowssl_core.meter import Meter
from lowssl_core.schedules import Progress

CHECKPOINT = "checkpoint.safetensors"
# Steps between two looks at the losses and at the other ranks, where looking costs a wait for the device.
STEPS_BETWEEN_LOOKS = 10


@dataclass(frozen=True, kw_only=True)
class DetectionOptions:
    """Where a fine-tuning happens, and on what.

    Attributes:
        model: what it starts from, as `open_start` takes it.
        branch: of a checkpoint.
        train, train_images: annotations and images to learn from.
        val, val_images: annotations and images to judge on.
        out: the run's folder.
        resume: whether to go on from the folder's checkpoint.
        device: what it runs on.
        workers: processes that load images.
    """

    model: str
    branch: Literal["student", "teacher"]
    train: Path
    train_images: Path
    val: Path
    val_images: Path
    out: Path
    resume: bool
    device: torch.device
    workers: int

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: wanted a number of processes, 0 or more")


class DetectionRun:
    """A fine-tuning.

    Args:
        recipe: what.
        options: where.
        ranks: this process among its peers; only the first writes and prints.

    Raises:
        UserError: model, data, folder or checkpoint cannot be used.
    """

    def __init__(self, recipe: DetectionRecipe, options: DetectionOptions, ranks: Ranks) -> None:
        self.recipe, self.options, self.ranks = recipe, options, ranks
        self._path = options.out / CHECKPOINT
        if self._path.exists() and not options.resume:
            raise UserError(
                f"--out {options.out} holds a run already; add --resume to go on with it, or take another folder"
            )
        self.train = CocoData(options.train, options.train_images, learnable=True)
        self.val = CocoData(options.val, options.val_images)
        check_same_categories(self.train, self.val)
        self.encoder = open_start(options.model, options.branch, recipe.seed)
        self._start = fingerprint(self.encoder)  # now: the detector trains these weights
        torch.manual_seed(recipe.seed)
        num_categories, width = len(self.train.category_ids), self.encoder.info.width
        detector = build_detector(self.encoder.backbone, width, num_categories, recipe.network)
        self.detector: MaskRCNN = to_device(detector, options.device)
        self.optimizer = recipe.optim.build(self.detector)
        self.loader = DetectionLoader(self.train, recipe, ranks, workers=options.workers, device=options.device)
        self.progress = Progress(step=0, total_steps=recipe.iterations, steps_per_epoch=self.loader.steps_per_epoch)
        self.curve: list[dict[str, float]] = []
        self._reports: list[DetectionReport] = []
        if self._path.exists():
            self._restore()
        if ranks.is_first:
            try:
                options.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--out {options.out}: not a folder that can be written: {error.strerror}") from None

    def _restore(self) -> None:
        checkpoint = load_checkpoint(self._path)
        restore(
            checkpoint,
            self.detector,
            self.optimizer,
            recipe=self.recipe,
            start=self._start,
            data=self.train.hash,
        )
        self.progress = checkpoint.progress
        self.curve = [dict(row) for row in checkpoint.curve]

    def execute(self) -> Results | None:
        """Train to the end and judge; the results on the first rank, None on the others.

        Raises:
            StoppedError: a signal came, to this rank or another; the checkpoint is written.
            UserError: the losses are no numbers any more, or an image to judge on cannot be read.
        """
        self._announce()
        with Interruption() as interruption, contextlib.ExitStack() as stack:
            meter = stack.enter_context(self._meter()) if self.ranks.is_first else None
            batches = self.loader.batches(self.progress.step)
            reports = fine_tune(self.detector, batches, self.optimizer, self.recipe, self.progress)
            for report in reports:
                self.progress = report.progress
                self._reports.append(report)
                if meter:
                    meter.advance(note=self._last_loss())
                if self._is_time_to_look():
                    self._look(interruption)
        if self.loader.set_aside:
            named = ", ".join(f"{name} ({reason})" for name, reason in list(self.loader.set_aside.items())[:5])
            self._say(f"{len(self.loader.set_aside)} unusable training images were replaced by others: {named}")
        return self._judge()

    def _meter(self) -> Meter:
        return Meter("fine-tuning", self.progress.total_steps, "iterations", done=self.progress.step)

    def _announce(self) -> None:
        options, recipe = self.options, self.recipe
        parameters = sum(each.numel() for each in self.detector.parameters()) / 1e6
        self._say(
            f"Mask R-CNN with FPN on {self.encoder.info.backbone}, {parameters:.1f} M parameters, from {self._origin()}"
        )
        self._say(f"train: {self.train.description}; val: {self.val.description}")
        resumed = f", resumed at iteration {self.progress.step}" if self.progress.step else ""
        self._say(
            f"{recipe.iterations} iterations of {recipe.batch_size} images on {self.ranks.world_size} x "
            f"{options.device.type}{resumed}"
        )
        if self.ranks.world_size > 1 and not is_synchronised(options.device):
            self._say(
                "BatchNorm is synchronised on GPUs only: here each process normalizes its part of the batch by itself, "
                "and the mean of their statistics is what is kept"
            )
        if options.resume and not self.progress.step:
            self._say(f"nothing to resume in {options.out}: starting anew")

    def _origin(self) -> str:
        """What the detector started from, for people; only what was trained has branches."""
        info = self.encoder.info
        return f"{info.name} ({info.branch})" if info.method else info.name

    def _say(self, text: str) -> None:
        # Results alone go to standard output.
        if self.ranks.is_first:
            print(text, file=sys.stderr)

    def _is_time_to_look(self) -> bool:
        """Whether to read losses back and ask the other ranks now: each step where that costs nothing."""
        step, monitor = self.progress.step, self.recipe.monitor
        periods = (STEPS_BETWEEN_LOOKS, monitor.log_every, monitor.checkpoint_every, monitor.evaluate_every)
        is_free = self.options.device.type == "cpu" and self.ranks.world_size == 1
        return is_free or self.progress.is_done or any(period and step % period == 0 for period in periods)

    def _last_loss(self) -> str:
        losses = (row["loss"] for row in reversed(self.curve) if "loss" in row)
        return next((f"loss {loss:.3f}" for loss in losses), "")

    def _look(self, interruption: Interruption) -> None:
        """Between two steps: check, log, save, measure; raises StoppedError if the run ends here."""
        step, monitor, is_done = self.progress.step, self.recipe.monitor, self.progress.is_done
        stops = any_rank(bool(interruption.signal_name))
        is_finite = bool(torch.stack([report.loss for report in self._reports]).isfinite().all())
        if any_rank(not is_finite):
            kept = f"the checkpoint before is kept in {self._path}" if self._path.exists() else "none was written yet"
            raise UserError(
                f"the loss is not a number any more at iteration {step}; {kept}. Lower optim.lr or lengthen "
                "optim.warmup_iterations"
            )
        if step % monitor.log_every == 0 or is_done:
            self._log()
        if stops or is_done or step % monitor.checkpoint_every == 0:
            self._save()
        if stops and not is_done:
            self._say(f"the checkpoint of iteration {step} is written: go on with --resume")
            raise StoppedError(interruption.signal_name or "SIGINT")
        if monitor.evaluate_every and step % monitor.evaluate_every == 0 and not is_done:
            self._measure()

    def _log(self) -> None:
        """Append the means since the last row of the curve."""
        names = list(self._reports[0].losses)
        rows = [torch.stack([report.loss, *report.losses.values()]) for report in self._reports]
        means = mean_over_ranks(torch.stack(rows).mean(0)).tolist()
        row = {"iteration": float(self.progress.step), "learning_rate": self._reports[-1].learning_rate}
        self.curve.append(row | dict(zip(["loss", *names], means, strict=True)))
        self._reports = []

    def _save(self) -> None:
        self._unite()
        if self.ranks.is_first:
            checkpoint = take_checkpoint(
                self.detector,
                self.optimizer,
                recipe=self.recipe,
                start=self._start,
                data=self.train.hash,
                progress=self.progress,
                curve=self.curve,
            )
            save_checkpoint(self._path, checkpoint)
        barrier()

    def _unite(self) -> None:
        """One set of BatchNorm statistics for what is saved and judged."""
        if self.ranks.world_size > 1 and not is_synchronised(self.options.device):
            average_statistics(self.detector)

    def _measure(self) -> None:
        """AP on the way, as a row of the curve and a line."""
        self._unite()
        found = judge(self.detector, self.val)
        if found is not None:
            row = {f"{kind} {name}": value for kind in KINDS for name, value in found[kind].items()}
            self.curve.append({"iteration": float(self.progress.step)} | row)
            self._say(f"iteration {self.progress.step}  box AP {row['box AP']:.3f}  mask AP {row['mask AP']:.3f}")

    def _judge(self) -> Results | None:
        found = judge(self.detector, self.val)
        if found is None:
            return None
        info = self.encoder.info
        settings = {
            "recipe": self.recipe.as_dict(),
            "backbone": info.backbone,
            "branch": info.branch,
            "start": self._start,
            "train": {"description": self.train.description, "sha256": self.train.hash},
            "val": {"description": self.val.description, "sha256": self.val.hash},
            "processes": self.ranks.world_size,
            "device": self.options.device.type,
            "set_aside": self.loader.set_aside,
        }
        return Results(
            task="detect",
            model=self.options.model,
            settings=settings,
            rows=[
                Figures(subject=kind, values=found[kind], details={} if kind == "mask" else {"curve": self.curve})
                for kind in KINDS
            ],
            notes=(
                f"{NAMES[0]} is the mean over IoU .50 to .95, AP50 and AP75 at one IoU; APs, APm, APl of objects below "
                "32^2, below 96^2 and above that many pixels",
                f"{self._origin()}, {self.recipe.iterations} iterations of {self.recipe.batch_size} images",
            ),
        )


def open_start(model: str, branch: Literal["student", "teacher"], seed: int) -> Encoder:
    """The encoder that a detector starts from, on the CPU.

    Args:
        model: what `open_subject` takes; "untrained:BACKBONE" has weights of the recipe's seed.
        branch: of a checkpoint.
        seed: see above.

    Raises:
        UserError: no such model, or one without a network to train.
    """
    if model.startswith("untrained:"):
        return untrained(model.removeprefix("untrained:"), seed=seed)
    return open_subject(model, branch=branch).encoder
