"""Batches of views from a source: any step of any epoch, alike for every number of workers and ranks."""

import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from lowssl_core.assembly import Assembled, Batches, PixelBatch, assemble_on
from lowssl_core.errors import UserError
from lowssl_core.order import Draw, Order, Stream
from lowssl_core.sources import Source
from lowssl_core.sources.memory import load_images, shrink_source
from lowssl_core.views import DeviceViews, ImageBatch, Views, ViewsConfig, normalize

__all__ = ["DataConfig", "Loader", "ViewsMode", "check_set_aside", "load_batches", "load_images"]

Batch = TypeVar("Batch")
ViewsMode = Literal["auto", "cpu", "device"]

_MODES: tuple[Literal["cpu"], Literal["device"]] = ("cpu", "device")
_MEASURED_IMAGES = 64


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


class Loader:
    """Endless batches of normalized views of a source's images, on `device`, from any step.

    The order is a function of (seed, epoch) and an image's views are one of (seed, epoch, index in the source): neither
    the number of workers nor of ranks nor the step of entry matters. Rank r takes the r-th slice of each global
    batch. A bad image is set aside, and its place taken by another one that the same numbers choose.

    Views are made by the workers (mode cpu) or, of the images that they decode, by the device (mode device): the same
    views but for rounding. Mode auto measures both where the device is no CPU; a resumed run should ask for the mode
    that it had.

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
        self._views, self._local_size = views, local_size
        max_bad = int(config.max_bad_fraction * self._num_images)
        self._batches = {
            made_on: assemble_on(made_on, source, self._stream, views, local_size, max_bad) for made_on in _MODES
        }
        self.mode: Literal["cpu", "device"] = self._choose_mode() if mode == "auto" else mode

    @cached_property
    def _device_views(self) -> DeviceViews:
        """Made when first asked for: its matrices are of no use where the workers make the views."""
        return DeviceViews(self._views, self._local_size, self._device)

    def batches(self, start_step: int = 0) -> Iterator[Views]:
        """Yield this rank's batches from `start_step` on, counted over all epochs; raises UserError as above.

        Each call starts its own workers, which end when the iterator is closed or dropped.
        """
        batches = self._batches[self.mode]
        for assembled in load_batches(batches, self._order(start_step), workers=self._workers, device=self._device):
            self._put_aside(assembled.set_aside)
            assert assembled.batch is not None, "none comes where too many images are bad, and that was refused above"
            yield self._finish(assembled.batch)

    def _order(self, start_step: int) -> Order:
        return Order(
            len(self.source),
            self._config.batch_size,
            self._stream,
            rank=self._rank,
            world_size=self._world_size,
            start_step=start_step,
        )

    def _finish(self, batch: PixelBatch | ImageBatch) -> Views:
        if isinstance(batch, ImageBatch):
            return self._device_views(batch)
        globals_ = batch.globals.to(self._device, non_blocking=True)
        locals_ = batch.locals.to(self._device, non_blocking=True)
        return Views([normalize(view) for view in globals_], [normalize(view) for view in locals_])

    def _choose_mode(self) -> Literal["cpu", "device"]:
        """Time both ways on real images; on a CPU there is nothing to gain from the device's way."""
        if self._device.type == "cpu":
            return "cpu"
        return min(_MODES, key=lambda made_on: self._seconds(self._batches[made_on]))

    def _seconds(self, batches: Batches[Any, PixelBatch | ImageBatch]) -> float:
        """Seconds for a batch: its share of the time of workers, who work side by side, and the time of the device."""
        epoch, indices = next(iter(self._order(0)))
        draw = Draw(epoch, indices[:_MEASURED_IMAGES])
        seconds = 0.0
        for _ in range(2):  # the first time starts libraries and kernels
            began = time.perf_counter()
            batch, set_aside, _ = batches[draw]
            assembled = time.perf_counter()
            self._put_aside(set_aside)
            assert batch is not None
            self._finish(batch)
            torch.accelerator.synchronize(self._device)
            seconds = (assembled - began) / max(1, self._workers) + time.perf_counter() - assembled
        return seconds

    def _check_enough(self, source: Source) -> None:
        if len(source) < self._config.batch_size:
            raise UserError(
                f"{source.description}: fewer than one batch, batch_size = {self._config.batch_size}: lower it or give"
                " more images"
            )

    def _put_aside(self, found: Mapping[str, str]) -> None:
        self.set_aside.update(found)
        check_set_aside(self.set_aside, self._num_images, self._config.max_bad_fraction)


def load_batches(
    batches: Dataset[Assembled[Batch]], draws: Iterable[Draw], *, workers: int, device: torch.device
) -> Iterator[Assembled[Batch]]:
    """The batches of `draws`, in their order, in memory from where they go to `device` fast.

    They are assembled by `workers` processes, or by this one for 0. The workers end when the iterator is closed or
    dropped.
    """
    yield from DataLoader(
        batches,
        batch_size=None,
        sampler=draws,
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=device.type == "cuda",
        # The loader draws its workers' seeds; from the global generator that would change what training draws.
        generator=torch.Generator(),
    )


def check_set_aside(set_aside: Mapping[str, str], num_images: int, accepted: float) -> None:
    """Refuse data of which more than the `accepted` share had to be set aside, by name and reason.

    Raises:
        UserError: too many of `num_images` are bad.
    """
    bad = len(set_aside)
    if bad > accepted * num_images:
        shown = [f"{name} ({reason})" for name, reason in list(set_aside.items())[:10]]
        more = f" and {bad - len(shown)} more" if bad > len(shown) else ""
        raise UserError(
            f"{bad} of {num_images} images cannot be used, more than max_bad_fraction = {accepted:g} of them:"
            f" {', '.join(shown)}{more}"
        )


def _start_worker(worker: int) -> None:
    """Make a worker one core's work, and leave the interrupt key to the process that trains."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
