"""What an aggregator is: a global model in, screened replies one by one, the next global model out."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from lowssl_core.protocol.manifest import FloatArray, Manifest, check_flat
from server.aggregation.reply import Screened, blocks


class Aggregator(ABC):
    """One round of a federation, and then the next: `begin`, `add` for each reply as it arrives, `finish`.

    Replies that can be folded are folded at once into float64 sums, others are kept on disk; memory is a few models
    however many devices answer. The order of replies changes rounding alone.

    Attributes:
        carried: what one round hands to the next, (trained size,), to be saved with the global model; None: nothing.
        added: keys of the replies added since `begin`; one that comes again counts once.
    """

    def __init__(self) -> None:
        self.carried: FloatArray | None = None
        self.added: set[tuple[str, str]] = set()

    def begin(self, global_flat: FloatArray, manifest: Manifest) -> None:
        """Start a round from the global model (size,).

        Raises:
            ValueError: the array, or what is carried from the last round, is not the manifest's.
        """
        check_flat(global_flat, manifest)
        if self.carried is not None and self.carried.shape != (manifest.trained_size,):
            raise ValueError(f"carried is {self.carried.shape}; the manifest's is ({manifest.trained_size},)")
        self._global, self._manifest = global_flat, manifest
        self.added = set()
        self._start()

    def add(self, reply: Screened) -> None:
        """Take one more reply; its array is not kept in memory.

        Raises:
            ValueError: the reply's array is not the manifest's.
            UserError: the reply cannot be written to disk; the round's earlier replies are untouched.
        """
        check_flat(reply.flat, self._manifest)
        if reply.key not in self.added:
            self._take(reply)
            self.added.add(reply.key)

    def finish(self) -> FloatArray:
        """The next global model (size,); without replies the one of before, but for what privacy adds to it."""
        new = self._global.copy()
        self._move(new)
        _restore_unit_rows(new, self._manifest)
        return new

    @abstractmethod
    def _start(self) -> None:
        """Forget all replies that were added before, also those on disk."""

    @abstractmethod
    def _take(self, reply: Screened) -> None:
        """Fold a reply in, or keep it on disk."""

    @abstractmethod
    def _move(self, new: FloatArray) -> None:
        """Turn `new`, the global model (size,), into the next one, in place."""


class DeltaSum:
    """A weighted sum of deltas (trained size,) in float64, and of their weights."""

    def __init__(self, size: int) -> None:
        self.values = np.zeros(size)
        self.weight = 0.0

    def add(self, flat: FloatArray, factor: float, weight: float) -> None:
        """Add `factor` times a reply's delta, the first values of `flat`, that counts as `weight`."""
        for block in blocks(len(self.values)):
            self.values[block] += flat[block].astype(np.float64) * factor
        self.weight += weight


def step(new: FloatArray, delta: NDArray[np.float64], rate: float = 1.0) -> None:
    """Move the first values of `new` by `rate` times `delta`, in place, in float64."""
    for block in blocks(len(delta)):
        new[block] = new[block] + rate * delta[block]


def _restore_unit_rows(flat: FloatArray, manifest: Manifest) -> None:
    """Give the rows that the manifest marks length 1 again, in place; a row of zeros stays one."""
    for entry in manifest.entries:
        if entry.unit_rows:
            rows = flat[entry.place].reshape(entry.shape)
            lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
            flat[entry.place] = (rows / np.where(lengths > 0, lengths, 1)).reshape(-1)
