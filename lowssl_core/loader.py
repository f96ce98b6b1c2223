"""Batches of views from a source: any step of any epoch, alike for every number of workers and ranks."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lowssl_core.errors import UserError
from lowssl_core.images import BadImage
from lowssl_core.sources import Source
from lowssl_core.sources.memory import load_images, shrink_source
from lowssl_core.views import CpuViews, Views, ViewsConfig, normalize

__all__ = ["DataConfig", "Loader", "ViewsMode", "load_images"]

ViewsMode = Literal["auto", "cpu", "device"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How a source becomes batches.

    `batch_size` counts images over all ranks. With `shrink_to` every image is decoded once, shrunk to that shorter
    side in pixels and kept in memory. A run stops when more than `max_bad_fraction` of the images cannot be used.
    """

    batch_size: int
    shrink_to: int | None = None
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it takes a number of images, 1 or more")
        if self.shrink_to is not None and self.shrink_to < 1:
            raise ValueError(f"shrink_to is {self.shrink_to}; it takes a number of pixels, 1 or more, or none")
        if not 0 <= self.max_bad_fraction < 1:
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction}; it takes 0 <= fraction < 1")


class Draw(NamedTuple):
    """One rank's part of a batch before it is read: the epoch and (B,) indices into the source."""

    epoch: int
    indices: NDArray[np.int64]


class Stream:
    """Random numbers as pure functions of a seed and what they are for, so that any step can be entered."""

    ORDER, VIEWS, REPLACEMENTS = range(3)

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, *purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=purpose)))


class Order(Sampler[Draw]):
    """One rank's endless draws from a step on: each epoch a permutation, less its last partial batch."""

    def __init__(
        self, num_images: int, batch_size: int, stream: Stream, *, rank: int, world_size: int, start_step: int
    ) -> None:
        self._num_images = num_images
        self._batch_size = batch_size
        self._stream = stream
        self._share = batch_size // world_size
        self._rank = rank
        self._start_step = start_step

    def __iter__(self) -> Iterator[Draw]:
        steps_per_epoch = self._num_images // self._batch_size
        epoch, first = divmod(self._start_step, steps_per_epoch)
        while True:
            permutation = self._stream(Stream.ORDER, epoch).permutation(self._num_images)
            for step in range(first, steps_per_epoch):
                start = step * self._batch_size + self._rank * self._share
                yield Draw(epoch, permutation[start : start + self._share])
            epoch, first = epoch + 1, 0


class PixelBatch(NamedTuple):
    """Views before normalization: (2, B, G, G, 3) and (V, B, L, L, 3) uint8, and the bad images met on the way."""

    globals: Tensor
    locals: Tensor
    set_aside: dict[str, str]


class CpuBatches(Dataset[PixelBatch]):
    """Makes a whole batch of views on the CPU core that asks for it; what a worker process holds."""

    def __init__(self, source: Source, views: CpuViews, stream: Stream, max_bad: int) -> None:
        self._source = source
        self._views = views
        self._stream = stream
        self._max_bad = max_bad

    def __getitem__(self, draw: Draw) -> PixelBatch:
        config, local_size = self._views.config, self._views.local_size
        batch, size = len(draw.indices), config.global_size
        globals_ = torch.empty((2, batch, size, size, 3), dtype=torch.uint8)
        locals_ = torch.empty((config.num_locals, batch, local_size, local_size, 3), dtype=torch.uint8)
        into_globals, into_locals = globals_.numpy(), locals_.numpy()
        set_aside: dict[str, str] = {}
        for row, index in enumerate(draw.indices.tolist()):
            made = self._make(draw.epoch, index, set_aside)
            if made is None:
                break  # the batch is never used: its reader stops at so many bad images
            into_globals[:, row], into_locals[:, row] = made
        return PixelBatch(globals_, locals_, set_aside)

    def _make(
        self, epoch: int, index: int, set_aside: dict[str, str]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | None:
        """Views of image `index`, or of the next usable one in an order of its own; None after too many bad ones."""
        for candidate in self._candidates(epoch, index):
            try:
                image = self._source.read(candidate)
                # The place's own numbers, so that a replacement differs from its image's usual views.
                return self._views(image, self._stream(Stream.VIEWS, epoch, index))
            except BadImage as error:
                set_aside[self._source.name(candidate)] = error.reason
            if len(set_aside) > self._max_bad:
                break
        return None

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        yield from self._stream(Stream.REPLACEMENTS, epoch, index).permutation(len(self._source)).tolist()


class Loader:
    """Endless batches of normalized views of a source's images, on `device`, from any step.

    The order is a function of (seed, epoch) and an image's views are one of (seed, epoch, index in the source): neither
    the number of workers nor of ranks nor the step of entry matters. Rank r takes the r-th slice of each global
    batch. A bad image is set aside, and its place taken by another one that the same numbers choose.

    Attributes: `source` (shrunk, if so configured), `steps_per_epoch`, `mode`, and `set_aside`, the names of the bad
    images met so far on this rank with their reasons.

    Raises UserError for fewer images than a batch, a batch that the ranks cannot share equally, or too many bad images.
    """

    def __init__(
        self,
        source: Source,
        views: ViewsConfig,
        local_size: int,
        config: DataConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
        mode: ViewsMode = "auto",
    ) -> None:
        if config.batch_size % world_size:
            raise UserError(f"batch_size {config.batch_size} cannot be shared by {world_size} ranks: give a multiple")
        self.set_aside: dict[str, str] = {}
        self._num_images = len(source)
        self._config = config
        self._check_enough(source)
        if config.shrink_to is not None:
            source, set_aside = shrink_source(source, config.shrink_to, threads=workers)
            self._put_aside(set_aside)
            self._check_enough(source)
        self.source = source
        self.steps_per_epoch = len(source) // config.batch_size
        self._stream = Stream(seed)
        self._rank, self._world_size, self._workers = rank, world_size, workers
        self._device = torch.device(device)
        self.mode: Literal["cpu", "device"] = "cpu"
        max_bad = int(config.max_bad_fraction * self._num_images)
        self._dataset = CpuBatches(source, CpuViews(views, local_size), self._stream, max_bad)

    def batches(self, start_step: int = 0) -> Iterator[Views]:
        """Yield this rank's batches from `start_step` on, counted over all epochs; raises UserError as above.

        Each call starts its own workers, which end when the iterator is closed or dropped.
        """
        order = Order(
            len(self.source),
            self._config.batch_size,
            self._stream,
            rank=self._rank,
            world_size=self._world_size,
            start_step=start_step,
        )
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=order,
            num_workers=self._workers,
            worker_init_fn=_start_worker,
            pin_memory=self._device.type == "cuda",
            # The loader draws its workers' seeds; from the global generator that would change what training draws.
            generator=torch.Generator(),
        )
        for batch in loader:
            self._put_aside(batch.set_aside)
            globals_ = batch.globals.to(self._device, non_blocking=True)
            locals_ = batch.locals.to(self._device, non_blocking=True)
            yield Views([normalize(view) for view in globals_], [normalize(view) for view in locals_])

    def _check_enough(self, source: Source) -> None:
        if len(source) < self._config.batch_size:
            raise UserError(
                f"{source.description}: fewer than one batch, batch_size = {self._config.batch_size}: lower it or give"
                " more images"
            )

    def _put_aside(self, found: dict[str, str]) -> None:
        self.set_aside.update(found)
        bad, accepted = len(self.set_aside), self._config.max_bad_fraction
        if bad > accepted * self._num_images:
            shown = [f"{name} ({reason})" for name, reason in list(self.set_aside.items())[:10]]
            more = f" and {bad - len(shown)} more" if bad > len(shown) else ""
            raise UserError(
                f"{bad} of {self._num_images} images cannot be used, more than max_bad_fraction = {accepted:g} of them:"
                f" {', '.join(shown)}{more}"
            )


def _start_worker(worker: int) -> None:
    """Make a worker one core's work, and leave the interrupt key to the process that trains."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
