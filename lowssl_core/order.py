"""Which images each batch holds, and their random numbers: pure functions of seed, epoch and index."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


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
        """Return a fresh generator for a purpose: one of the three above, then epoch, then index."""
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
