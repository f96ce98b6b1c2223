"""Training with labels, for the protocols that need it: random crops, a loss, test accuracy, and exact resumption."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lowssl_core.checkpoint import optimizer_tensors, restore_optimizer, tensors_below
from lowssl_core.errors import UserError
from lowssl_core.evaluation.labelled import LabelledImages
from lowssl_core.evaluation.linear import count_right
from lowssl_core.evaluation.training_config import TrainingConfig
from lowssl_core.interruption import Interruption
from lowssl_core.meter import Meter
from lowssl_core.preprocess import Preprocess
from lowssl_core.schedules import Progress, cosine
from lowssl_core.sources import Source
from lowssl_core.tensor_file import read_sealed, tensors_hash, write_sealed

FORMAT = "lowssl-supervised-1"
TEST_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """One epoch: its number from 1, its mean loss and its learning rate; accuracies where it was tested.

    `top5` is None for up to five classes as well.
    """

    epoch: int
    loss: float
    learning_rate: float
    top1: float | None = None
    top5: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step: the clock after it, its loss (a scalar that stays on the device) and learning rate.

    `epoch` is there where the step was an epoch's last.
    """

    progress: Progress
    loss: Tensor
    learning_rate: float
    epoch: EpochReport | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run comes to.

    Attributes:
        top1: share of test images whose class comes first, at the end (not the best of all epochs).
        top5: share whose class is among the first five; None for up to five classes.
        loss: mean of the last epoch.
        history: every epoch.
        notes: what a reader of the figures must know, a line each.
        config: as it ran, the batch lowered where there were fewer images.
    """

    top1: float
    top5: float | None
    loss: float
    history: tuple[EpochReport, ...]
    notes: tuple[str, ...]
    config: TrainingConfig


class SupervisedRun:
    """A run that trains a classifier on labelled images; it can be stopped between steps and goes on exactly.

    Args:
        model: what is trained, on its device: from images (B, 3, S, S), or the features of `frozen`, to scores (B, C).
        config: how.
        train: labelled images.
        test: others of the same classes (`check_same_classes`), seen as evaluation sees them.
        preprocess: of the test images; its size is the crops' as well.
        frozen: a network in evaluation mode whose features (B, D) the model gets; None: the model gets images.
        notes: lines to stand with the result.
        checkpoint: where the state is written after each epoch, and read from where it exists; None: it is not kept.
        workers: processes that read images.

    Attributes:
        progress: the clock.
        notes: those given, and what had to be changed.

    Raises:
        UserError: fewer than two images, or the checkpoint of another run.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        *,
        train: Source,
        test: Source,
        preprocess: Preprocess,
        frozen: nn.Module | None = None,
        notes: Sequence[str] = (),
        checkpoint: Path | None = None,
        workers: int = 0,
    ) -> None:
        if len(train) < 2:
            raise UserError(f"{train.description}: training takes at least 2 images")
        self.config = config.fitted(len(train))
        self.notes = tuple(notes)
        if config != self.config:
            self.notes += (
                f"batch {config.batch_size} lowered to {self.config.batch_size}, all the training images; the learning "
                f"rate with it, from {config.learning_rate:.4g} to {self.config.learning_rate:.4g}",
            )
        self._model, self._frozen = model, frozen
        self._device = next(model.parameters()).device
        self._optimizer = self.config.build(model)
        self._images = LabelledImages(
            train, preprocess, seed=config.seed, crop_scale=config.crop_scale, device=self._device, workers=workers
        )
        self._test_images = LabelledImages(test, preprocess, seed=config.seed, device=self._device, workers=workers)
        self._num_classes = len(train.classes or ())
        steps = len(train) // self.config.batch_size
        self.progress = Progress(step=0, total_steps=steps * config.epochs, steps_per_epoch=steps)
        self._history: list[EpochReport] = []
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)  # the sum over the epoch so far
        self._random: Mapping[str, Tensor] = {}
        self._checkpoint = checkpoint
        # What a checkpoint must agree with: the settings, the images, and the weights that training starts from.
        identity = asdict(self.config) | asdict(preprocess)
        identity |= {
            "data": _names_hash(train),
            "test data": _names_hash(test),
            "weights": _weights_hash(model, frozen),
        }
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        if checkpoint is not None and checkpoint.exists():
            self._restore(checkpoint)

    def steps(self) -> Iterator[StepReport]:
        """Take the steps that are left, yielding after each; between two of them nothing is half done.

        Raises:
            UserError: the loss is no number any more, or too many images cannot be used.
        """
        if self._random:
            torch.set_rng_state(self._random["cpu"])
            if "cuda" in self._random and self._device.type == "cuda":
                torch.cuda.set_rng_state(self._random["cuda"], self._device)
            self._random = {}
        elif self.progress.step == 0:
            torch.manual_seed(self.config.seed)
        batches = self._images.crops(self.config.batch_size, self.progress.step)
        while not self.progress.is_done:
            yield self._step(*next(batches))

    def complete(self, label: str, interruption: Interruption) -> Outcome:
        """Take the steps that are left, showing progress as `label`.

        Raises:
            StoppedError: a signal asked for it; the checkpoint is written.
            UserError: as `steps`.
        """
        note = ""
        with Meter(label, self.progress.total_steps, "steps", done=self.progress.step) as meter:
            for report in self.steps():
                if report.epoch:
                    note = _note(report.epoch)
                meter.advance(note=note)
                if interruption.signal_name:
                    self.save()
                    interruption.check()
        return self.outcome()

    def outcome(self) -> Outcome:
        """What the finished run comes to."""
        assert self.progress.is_done, "steps are left"
        last = self._history[-1]
        assert last.top1 is not None, "the last epoch is always tested"
        return Outcome(
            top1=last.top1,
            top5=last.top5,
            loss=last.loss,
            history=tuple(self._history),
            notes=self.notes,
            config=self.config,
        )

    def save(self) -> None:
        """Write the checkpoint, where one is kept."""
        if self._checkpoint is None:
            return
        tensors = {f"model.{name}": value for name, value in self._model.state_dict().items()}
        tensors |= optimizer_tensors(self._optimizer)
        tensors |= {"loss": self._loss, "random.cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self._device)
        facts = {
            "identity": self._identity,
            "progress": asdict(self.progress),
            "history": [asdict(report) for report in self._history],
        }
        write_sealed(self._checkpoint, tensors, format=FORMAT, facts=facts)

    def test(self) -> tuple[float, float | None]:
        """Top-1 and top-5 on the test images that can be read; top-5 is None for up to five classes."""
        self._model.eval()
        right = torch.zeros(2, dtype=torch.int64, device=self._device)
        count = 0
        with torch.inference_mode():
            for images, labels in self._test_images.centers(TEST_BATCH):
                scores = self._model(images if self._frozen is None else self._frozen(images).float())
                right += torch.stack([count_right(scores, labels, first) for first in (1, 5)])
                count += len(labels)
        if count == 0:
            raise UserError("not one of the test images can be read")
        top1, top5 = (right.double() / count).tolist()
        return top1, top5 if self._num_classes > 5 else None

    def _step(self, images: Tensor, labels: Tensor) -> StepReport:
        config, progress = self.config, self.progress
        rate = cosine(progress.epoch, config.epochs, config.learning_rate, config.final_lr)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self._model(self._inputs(images)), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._loss += loss.detach()
        self.progress = progress.advanced()
        ends = self.progress.step % progress.steps_per_epoch == 0
        epoch = self._end_epoch(rate) if ends else None
        return StepReport(progress=self.progress, loss=loss.detach(), learning_rate=rate, epoch=epoch)

    def _inputs(self, images: Tensor) -> Tensor:
        """What the model gets of images."""
        if self._frozen is None:
            return images
        with torch.inference_mode():  # in parts: a batch of thousands of images would not fit into a GPU
            features = torch.cat([self._frozen(part).float() for part in torch.split(images, TEST_BATCH)])
        return features.clone()  # a plain tensor: one of inference mode cannot be trained on

    def _end_epoch(self, rate: float) -> EpochReport:
        number, loss = self.progress.epoch, float(self._loss) / self.progress.steps_per_epoch
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self._model.parameters()]))
        if not (np.isfinite(loss) and norms.isfinite().all()):
            raise UserError(
                f"epoch {number}: the loss or the weights are no numbers any more: the learning rate, {rate:g}, is too "
                "high; lower base_lr"
            )
        is_tested = self.progress.is_done or number % self.config.test_every_epochs == 0
        top1, top5 = self.test() if is_tested else (None, None)
        report = EpochReport(epoch=number, loss=loss, learning_rate=rate, top1=top1, top5=top5)
        self._history.append(report)
        self._loss.zero_()
        self.save()
        return report

    def _restore(self, path: Path) -> None:
        file = read_sealed(path, format=FORMAT, kind="checkpoint of an evaluation")
        facts = file.facts
        there, here = facts["identity"], self._identity
        changed = [
            f"{key} ({there.get(key)}, {here.get(key)})" for key in here | there if there.get(key) != here.get(key)
        ]
        if changed:
            raise UserError(f"{path} is of another run (there, here): {', '.join(changed)}; give another folder")
        self._model.load_state_dict(tensors_below(file.tensors, "model."))
        restore_optimizer(self._optimizer, file.tensors)
        self._loss.copy_(file.tensors["loss"])
        self._random = tensors_below(file.tensors, "random.")
        self.progress = Progress(**facts["progress"])
        self._history = [EpochReport(**row) for row in facts["history"]]


def new_classifier(width: int, num_classes: int, seed: int) -> nn.Linear:
    """A linear layer from (B, width) to (B, num_classes) with weights from N(0, .01) and biases at 0."""
    layer = nn.Linear(width, num_classes)
    with torch.no_grad():
        layer.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
        layer.bias.zero_()
    return layer


@torch.inference_mode()
def feature_width(network: nn.Module, size: int) -> int:
    """How long the features are that a network in evaluation mode makes of images of `size` pixels."""
    device = next(network.parameters()).device
    return int(network(torch.zeros(1, 3, size, size, device=device)).shape[1])


def _names_hash(source: Source) -> str:
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(f"{source.name(index)} {source.label(index)}\n".encode())
    return f"{len(source)} images, {digest.hexdigest()[:12]}"


def _weights_hash(model: nn.Module, frozen: nn.Module | None) -> str:
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    if frozen is not None:
        state |= {f"frozen.{name}": value for name, value in frozen.state_dict().items()}
    return tensors_hash({name: value.cpu().contiguous() for name, value in state.items()})[:12]


def _note(epoch: EpochReport) -> str:
    tested = f", top-1 {epoch.top1:.3f}" if epoch.top1 is not None else ""
    return f"epoch {epoch.epoch}: loss {epoch.loss:.3f}{tested}"
