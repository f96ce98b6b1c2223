"""Fine-tuning a detector: the loop, a generator with a report for each step, and the checkpoints between its steps."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchvision.models.detection import MaskRCNN

from lowssl_core.checkpoint import optimizer_tensors, restore_optimizer, tensors_below
from lowssl_core.detection.loading import Sample
from lowssl_core.detection.recipe import DetectionRecipe, detection_recipe_from_dict
from lowssl_core.distributed import rank, world_size
from lowssl_core.errors import UserError
from lowssl_core.recipe import differences
from lowssl_core.schedules import Progress
from lowssl_core.tensor_file import read_sealed, write_sealed

FORMAT = "lowssl-detection-1"


@dataclass(frozen=True, kw_only=True)
class DetectionReport:
    """What one step did. Tensors are scalars that stay on the device.

    Attributes:
        progress: the clock after the step.
        loss: the sum of the losses, of this rank's part of the batch.
        losses: of the proposals' objectness and boxes, and of the regions' classes, boxes and masks.
        learning_rate: of this step.
    """

    progress: Progress
    loss: Tensor
    losses: Mapping[str, Tensor]
    learning_rate: float


def fine_tune(
    detector: MaskRCNN,
    batches: Iterable[Sequence[Sample]],
    optimizer: Optimizer,
    recipe: DetectionRecipe,
    start: Progress,
) -> Iterator[DetectionReport]:
    """Train `detector`, a step for each batch, until the clock or the batches end.

    Between two reports nothing is half done. Regions are sampled by torch's global generator, which is set anew for
    each step from the recipe's seed, the step and the rank: so a resumed run draws what a straight one does.

    Args:
        detector: on its device; it is put into train mode before each step.
        batches: this rank's samples, wherever they are.
        optimizer: over the detector's parameters (`DetectionOptimConfig.build`).
        recipe: seed and schedule.
        start: the clock before the first step.

    Yields:
        A report after each step.
    """
    model: nn.Module = detector
    if world_size() > 1:
        with warnings.catch_warnings():
            # Newer releases of torch have another name for the option, which the older ones do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            model = DistributedDataParallel(detector, broadcast_buffers=False)
    device = next(detector.parameters()).device
    progress, source = start, iter(batches)
    while not progress.is_done and (samples := next(source, None)) is not None:
        model.train()
        torch.manual_seed(_seed_of_step(recipe.seed, progress.step))
        rate = recipe.optim.learning_rate(progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        images = [sample.image.to(device, non_blocking=True).float() / 255 for sample in samples]
        targets = [
            {name: value.to(device, non_blocking=True) for name, value in sample.targets._asdict().items()}
            for sample in samples
        ]
        optimizer.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = model(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress = progress.advanced()
        yield DetectionReport(
            progress=progress,
            loss=loss.detach(),
            losses={name: value.detach() for name, value in losses.items()},
            learning_rate=rate,
        )


def _seed_of_step(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step, rank())).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True, kw_only=True)
class DetectionCheckpoint:
    """A fine-tuning as it was between two steps.

    Attributes:
        recipe: all that decides the result, but for
        start: what it started from, and
        data: what it learns from, both by hash.
        progress: the clock.
        curve: rows of the loss and of AP so far.
        tensors: the detector's ("detector.") and the optimizer's ("optimizer.PARAMETER.").
    """

    recipe: DetectionRecipe
    start: str
    data: str
    progress: Progress
    curve: Sequence[Mapping[str, float]]
    tensors: Mapping[str, Tensor]


def take_checkpoint(
    detector: MaskRCNN,
    optimizer: Optimizer,
    *,
    recipe: DetectionRecipe,
    start: str,
    data: str,
    progress: Progress,
    curve: Sequence[Mapping[str, float]],
) -> DetectionCheckpoint:
    """The run's state."""
    tensors = {f"detector.{name}": value for name, value in detector.state_dict().items()}
    return DetectionCheckpoint(
        recipe=recipe,
        start=start,
        data=data,
        progress=progress,
        curve=curve,
        tensors=tensors | optimizer_tensors(optimizer),
    )


def save_checkpoint(path: Path, checkpoint: DetectionCheckpoint) -> None:
    """Write a checkpoint atomically: after a crash the file is the old one or the new one, whole."""
    facts: dict[str, Any] = {
        "recipe": checkpoint.recipe.as_dict(),
        "start": checkpoint.start,
        "data": checkpoint.data,
        "progress": asdict(checkpoint.progress),
        "curve": [dict(row) for row in checkpoint.curve],
    }
    write_sealed(path, checkpoint.tensors, format=FORMAT, facts=facts)


def load_checkpoint(path: Path) -> DetectionCheckpoint:
    """Read a checkpoint.

    Raises:
        UserError: no such file, a file of another kind, or a damaged one.
    """
    file = read_sealed(path, format=FORMAT, kind="checkpoint of a detector")
    facts = file.facts
    return DetectionCheckpoint(
        recipe=detection_recipe_from_dict(facts["recipe"]),
        start=facts["start"],
        data=facts["data"],
        progress=Progress(**facts["progress"]),
        curve=facts["curve"],
        tensors=file.tensors,
    )


def restore(
    checkpoint: DetectionCheckpoint,
    detector: MaskRCNN,
    optimizer: Optimizer,
    *,
    recipe: DetectionRecipe,
    start: str,
    data: str,
) -> None:
    """Put a checkpoint's state into a freshly built detector and optimizer.

    Raises:
        UserError: the checkpoint is of another recipe, another start, or other data.
    """
    if changed := differences(checkpoint.recipe, recipe):
        raise UserError(f"the checkpoint was made with another recipe (there, here): {'; '.join(changed)}")
    for name, there, here in (("MODEL", checkpoint.start, start), ("--train", checkpoint.data, data)):
        if there != here:
            raise UserError(f"the checkpoint was made with another {name}: give the same one, or another --out")
    detector.load_state_dict(tensors_below(checkpoint.tensors, "detector."))
    restore_optimizer(optimizer, checkpoint.tensors)
