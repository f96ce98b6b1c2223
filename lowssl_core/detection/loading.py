"""Batches of images with their targets: any step of any epoch, alike for every number of workers and ranks."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lowssl_core.assembly import Assembled, Batches
from lowssl_core.detection.coco import CocoData, Targets
from lowssl_core.detection.recipe import DetectionRecipe
from lowssl_core.distributed import Ranks
from lowssl_core.errors import UserError
from lowssl_core.images import Pixels, decode
from lowssl_core.loader import check_set_aside, load_batches
from lowssl_core.order import Draw, Order, Stream
from lowssl_core.sources import Image


class Sample(NamedTuple):
    """One image to learn from, (3, H, W) uint8, and its targets."""

    image: Tensor
    targets: Targets


class DetectionLoader:
    """The batches of a fine-tuning, each rank's own part of them.

    An image is mirrored or not as a function of seed, epoch and index, and the order is one of seed and epoch, so that
    a run may be resumed at any step.

    Args:
        data: images with something to learn in each.
        recipe: batch, seed, and how many images may be bad.
        ranks: whose part.
        workers: processes that read images.
        device: where batches will go.

    Attributes:
        set_aside: names and reasons of the images that could not be used so far.

    Raises:
        UserError: a batch larger than the data, or one that the ranks cannot share.
    """

    def __init__(
        self, data: CocoData, recipe: DetectionRecipe, ranks: Ranks, *, workers: int, device: torch.device
    ) -> None:
        if recipe.batch_size % ranks.world_size:
            raise UserError(f"batch_size is {recipe.batch_size}: not a multiple of the {ranks.world_size} processes")
        if len(data) < recipe.batch_size:
            raise UserError(f"{data.description}: fewer than one batch, batch_size = {recipe.batch_size}")
        self._data, self._recipe, self._ranks = data, recipe, ranks
        self._workers, self._device = workers, device
        self.steps_per_epoch = len(data) // recipe.batch_size
        self.set_aside: dict[str, str] = {}

    def batches(self, start_step: int) -> Iterator[list[Sample]]:
        """This rank's samples from `start_step` on, counted over all epochs; UserError where too many are bad."""
        recipe, data = self._recipe, self._data
        stream = Stream(recipe.seed)
        draws = Order(
            len(data),
            recipe.batch_size,
            stream,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            start_step=start_step,
        )
        batches = _Samples(data, stream, max_bad=int(recipe.max_bad_fraction * len(data)))
        for assembled in load_batches(batches, draws, workers=self._workers, device=self._device):
            self.set_aside.update(assembled.set_aside)
            check_set_aside(self.set_aside, len(data), recipe.max_bad_fraction)
            assert assembled.batch is not None, "none comes where too many images are bad, and that was refused above"
            yield assembled.batch


class _Samples(Dataset[Assembled[list[Sample]]]):
    """What a worker does: the images of a draw as `Batches` reads them, with the targets of those that were read."""

    def __init__(self, data: CocoData, stream: Stream, *, max_bad: int) -> None:
        self._data = data
        self._images = Batches(data, stream, max_bad=max_bad, make=_decode, pack=list)

    def __getitem__(self, draw: Draw) -> Assembled[list[Sample]]:
        images, set_aside, indices = self._images[draw]
        if images is None:
            return Assembled(None, set_aside, [])
        samples = [
            _sample(pixels, self._data.targets(index), mirrored)
            for (pixels, mirrored), index in zip(images, indices, strict=True)
        ]
        return Assembled(samples, set_aside, indices)


def image_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) uint8 to (3, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _decode(image: Image, rng: np.random.Generator) -> tuple[Pixels, bool]:
    assert isinstance(image, bytes)
    return decode(image), bool(rng.random() < 0.5)


def _sample(pixels: Pixels, targets: Targets, mirrored: bool) -> Sample:
    if not mirrored:
        return Sample(image_tensor(pixels), targets)
    boxes = targets.boxes.clone()
    boxes[:, [0, 2]] = pixels.shape[1] - targets.boxes[:, [2, 0]]
    return Sample(image_tensor(pixels[:, ::-1]), Targets(boxes, targets.labels, targets.masks.flip(2)))
