"""What a worker process does: read the images of a draw, replace bad ones, and assemble the batch that travels."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lowssl_core.images import BadImage, Pixels
from lowssl_core.order import Draw, Stream
from lowssl_core.sources import Image, Source
from lowssl_core.views import CpuViews, ImageBatch, ViewParameters, ViewsConfig, pack_images, read_for_views

Part = TypeVar("Part")
Batch = TypeVar("Batch")


class PixelBatch(NamedTuple):
    """Finished views before normalization: (2, B, G, G, 3) and (V, B, L, L, 3) uint8."""

    globals: Tensor
    locals: Tensor


class Assembled(NamedTuple, Generic[Batch]):
    """A batch as it leaves a worker, and the names and reasons of the bad images met on the way.

    `indices` tells which images the batch holds: those of the draw, but where one took a bad image's place. No batch
    comes after too many bad images: the loader then stops the run.
    """

    batch: Batch | None
    set_aside: dict[str, str]
    indices: list[int]


class Batches(Dataset[Assembled[Batch]], Generic[Part, Batch]):
    """Batches by draw: `make` turns an image and its random numbers into a part, `pack` a batch's parts into one.

    An image's random numbers are a function of (epoch, index). A bad image's place is taken by the next usable one in
    an order of the place's own, with the place's random numbers, so that a replacement differs from its usual views.
    """

    def __init__(
        self,
        source: Source,
        stream: Stream,
        *,
        max_bad: int,
        make: Callable[[Image, np.random.Generator], Part],
        pack: Callable[[list[Part]], Batch],
    ) -> None:
        self._source = source
        self._stream = stream
        self._max_bad = max_bad
        self._make = make
        self._pack = pack

    def __getitem__(self, draw: Draw) -> Assembled[Batch]:
        parts: list[Part] = []
        indices: list[int] = []
        set_aside: dict[str, str] = {}
        for index in draw.indices.tolist():
            for candidate in self._candidates(draw.epoch, index):
                try:
                    image = self._source.read(candidate)
                    parts.append(self._make(image, self._stream(Stream.VIEWS, draw.epoch, index)))
                    indices.append(candidate)
                    break
                except BadImage as error:
                    set_aside[self._source.name(candidate)] = error.reason
                if len(set_aside) > self._max_bad:
                    return Assembled(None, set_aside, [])
        return Assembled(self._pack(parts), set_aside, indices)

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        yield from self._stream(Stream.REPLACEMENTS, epoch, index).permutation(len(self._source)).tolist()


def assemble_on(
    mode: Literal["cpu", "device"], source: Source, stream: Stream, views: ViewsConfig, local_size: int, max_bad: int
) -> Batches[Any, PixelBatch | ImageBatch]:
    """Return the batches of a source: of finished views (cpu), or of images with their views drawn (device)."""
    if mode == "cpu":
        return Batches(source, stream, max_bad=max_bad, make=CpuViews(views, local_size), pack=_stack)
    return Batches(source, stream, max_bad=max_bad, make=partial(_read, views, local_size), pack=_pad)


def _stack(parts: list[tuple[Pixels, Pixels]]) -> PixelBatch:
    globals_, locals_ = (torch.from_numpy(np.stack(views, axis=1)) for views in zip(*parts, strict=True))
    return PixelBatch(globals_, locals_)


def _read(
    views: ViewsConfig, local_size: int, image: Image, rng: np.random.Generator
) -> tuple[Pixels, list[ViewParameters]]:
    return read_for_views(image, views, local_size, rng)


def _pad(parts: list[tuple[Pixels, list[ViewParameters]]]) -> ImageBatch:
    return pack_images([image for image, _ in parts], [views for _, views in parts])
