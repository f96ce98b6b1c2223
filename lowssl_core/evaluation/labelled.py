"""Batches of labelled images for training with labels: random crops from any step, and evaluation-style centers."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowssl_core.assembly import Batches
from lowssl_core.images import Pixels, decode
from lowssl_core.loader import check_set_aside, load_batches
from lowssl_core.order import Draw, Order, Stream
from lowssl_core.preprocess import Preprocess
from lowssl_core.sources import Image, Source
from lowssl_core.views import PhotometricConfig, ViewsConfig, normalize, read_for_views, render_view

MAX_BAD_FRACTION = 0.01

_NO_COLOR = PhotometricConfig(
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    gray_probability=0.0,
    blur_probability=(0.0, 0.0, 0.0),
    solarize_probability=(0.0, 0.0, 0.0),
)


class Crop:
    """Makes a random crop of one image, (size, size, 3) uint8: RandomResizedCrop, bicubic, and a flip.

    It is the first view of a recipe without color changes; the second one is drawn and never made.

    Args:
        size: of the crop in pixels.
        scale: bounds of its area as a share of the image's.
    """

    def __init__(self, size: int, scale: tuple[float, float]) -> None:
        self._views = ViewsConfig(global_size=size, num_locals=0, global_scale=scale, photometric=_NO_COLOR)
        self._size = size

    def __call__(self, image: Image, rng: np.random.Generator) -> Pixels:
        """One crop that depends on the image and the generator's state alone; BadImage for one that is unusable."""
        pixels, parameters = read_for_views(image, self._views, self._size, rng)
        crop = np.empty((self._size, self._size, 3), np.uint8)
        render_view(pixels, parameters[0], crop)
        return crop


class Center:
    """Makes evaluation-style input of one image, (size, size, 3) uint8."""

    def __init__(self, preprocess: Preprocess) -> None:
        self._preprocess = preprocess

    def __call__(self, image: Image, rng: np.random.Generator) -> Pixels:
        """The center square, without any chance; BadImage for an image that is unusable."""
        return self._preprocess(decode(image) if isinstance(image, bytes) else image)


class LabelledImages:
    """The images of a source with their labels, as normalized batches on a device.

    Args:
        source: labelled images.
        preprocess: of centers; its size is that of crops too.
        crop_scale: bounds of a crop's area as a share of the image's.
        seed: of the order and the crops, which depend on seed, epoch and index alone, as in `Loader`.
        device: where batches go.
        workers: processes that read images; 0: this one.

    Raises UserError, while batches are made, when more than one in a hundred images cannot be used.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        *,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        seed: int,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        self._source = source
        self._preprocess = preprocess
        self._crop_scale = crop_scale
        self._stream = Stream(seed)
        self._device = device
        self._workers = workers
        self._set_aside: dict[str, str] = {}

    def crops(self, batch_size: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches of crops (B, 3, S, S) and labels (B,) from a step on, counted over all epochs.

        A bad image's place is taken by another one, with that one's label.
        """
        order = Order(len(self._source), batch_size, self._stream, rank=0, world_size=1, start_step=start_step)
        batches = self._batches(Crop(self._preprocess.size, self._crop_scale))
        for assembled in load_batches(batches, order, workers=self._workers, device=self._device):
            yield self._finish(assembled.batch, assembled.set_aside, assembled.indices)

    def centers(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once in evaluation style, (B, 3, S, S) and labels (B,), without the bad ones."""
        indices = np.arange(len(self._source))
        draws = [Draw(0, indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]
        batches = self._batches(Center(self._preprocess))
        loaded = load_batches(batches, draws, workers=self._workers, device=self._device)
        for draw, assembled in zip(draws, loaded, strict=True):
            images, labels = self._finish(assembled.batch, assembled.set_aside, assembled.indices)
            # Where another image took a bad one's place, it would count twice.
            own = [place for place, index in enumerate(draw.indices.tolist()) if assembled.indices[place] == index]
            if len(own) < len(labels):
                images, labels = images[own], labels[own]
            if own:
                yield images, labels

    def _batches(self, make: Crop | Center) -> Batches[Pixels, Tensor]:
        max_bad = int(MAX_BAD_FRACTION * len(self._source))
        return Batches(self._source, self._stream, max_bad=max_bad, make=make, pack=_stack)

    def _finish(self, batch: Tensor | None, bad: dict[str, str], indices: list[int]) -> tuple[Tensor, Tensor]:
        self._set_aside |= bad
        check_set_aside(self._set_aside, len(self._source), MAX_BAD_FRACTION)
        assert batch is not None, "none comes where too many images are bad, and that was refused above"
        labels = torch.tensor([self._source.label(index) for index in indices])
        return normalize(batch.to(self._device, non_blocking=True)), labels.to(self._device)


class Subset(Source):
    """Some images of a source, in the order given.

    Args:
        source: of all images.
        indices: of those taken.
    """

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self._source = source
        self._indices = tuple(indices)
        self.description = f"{len(self._indices):,} of {source.description}"
        self.split = source.split
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> Image:
        """Return image `index` of those taken."""
        return self._source.read(self._indices[index])

    def name(self, index: int) -> str:
        """Return the name that it has in the source."""
        return self._source.name(self._indices[index])

    def label(self, index: int) -> int | None:
        """Return its class, or None where there are no labels."""
        return self._source.label(self._indices[index])


def _stack(images: list[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(images))
