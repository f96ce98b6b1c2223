"""Aggregators that outliers cannot move far, from replies on disk: trimmed mean, coordinate median, multi-Krum."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lowssl_core.protocol.manifest import FloatArray
from server.aggregation.aggregator import Aggregator
from server.aggregation.reply import Screened, blocks
from server.aggregation.spool import Kept, Spool

Rows = NDArray[np.floating]
"""Values of K replies at some coordinates, (K, N)."""
Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TrimmedMeanConfig:
    """Coordinate-wise trimmed mean (Yin et al. 2018, definition 2).

    Attributes:
        trim: share of the values cut off at each end, above 0 and below .5; rounded up, so that of three devices one
            is cut off at each end already, but a value is always left.
    """

    name: ClassVar[str] = "trimmed_mean"
    trim: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.trim < 0.5:
            raise ValueError(f"trim is {self.trim}; it is above 0 and below 0.5")

    def build(self, folder: Path) -> "Spooled":
        """The aggregator; replies are kept in `folder`."""
        return Spooled(folder, partial(trimmed_mean, trim=self.trim))


@dataclass(frozen=True, kw_only=True)
class MedianConfig:
    """Coordinate-wise median (Yin et al. 2018, definition 1)."""

    name: ClassVar[str] = "median"

    def build(self, folder: Path) -> "Spooled":
        """The aggregator; replies are kept in `folder`."""
        return Spooled(folder, median)


@dataclass(frozen=True, kw_only=True)
class MultiKrumConfig:
    """Multi-Krum (Blanchard et al. 2017, section 4): the mean of the replies that lie closest to their neighbors.

    Attributes:
        faulty: share of the devices that may be faulty, from 0 and below .5; rounded up to a number f, and then down
            to what n devices bear, n >= 2f + 3. The n - f best replies are averaged.
    """

    name: ClassVar[str] = "multi_krum"
    faulty: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.faulty < 0.5:
            raise ValueError(f"faulty is {self.faulty}; it is from 0 and below 0.5")

    def build(self, folder: Path) -> "Spooled":
        """The aggregator; replies are kept in `folder`."""
        return Spooled(folder, mean, partial(multi_krum, faulty=self.faulty))


class Spooled(Aggregator):
    """A center of the replies chosen, coordinate by coordinate, all replies on disk until then.

    `finish` works through blocks that hold all replies' values of some coordinates, about two models' worth of memory
    however many replies there are.

    What devices claim to have trained on plays no part. A late reply's delta is shortened by `Screened.discount`.
    BatchNorm variances are center(var_k) + center((mean_k - center(mean))^2): without outliers to cut off the pooled
    ones (see `StatisticsPool`, devices counting the same), and never negative.

    Args:
        folder: for the replies.
        center: of the values of K replies (K, N), N numbers.
        choose: which of K replies take part, from their deltas in blocks (K, N); None: all.
    """

    def __init__(
        self,
        folder: Path,
        center: Callable[[Rows], Values],
        choose: Callable[[Iterator[Rows], int], Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self._folder, self._center, self._choose = folder, center, choose

    def _start(self) -> None:
        self._spool = Spool(self._folder)

    def _take(self, reply: Screened) -> None:
        self._spool.put(reply)

    def _move(self, new: FloatArray) -> None:
        replies, manifest = list(self._spool), self._manifest
        if not replies:
            return
        if self._choose is not None:
            chosen = self._choose((rows for _, rows in self._deltas(replies)), len(replies))
            replies = [replies[index] for index in chosen]
        for place, rows in self._deltas(replies):
            new[place] = new[place] + self._center(rows)
        for place, rows in self._stretches(replies, slice(manifest.trained_size, manifest.size)):
            new[place] = self._center(rows)
        # The variances are those within devices so far; those between devices' means are added.
        ahead = manifest.variances.start - manifest.means.start
        for place, rows in self._stretches(replies, manifest.means):
            between = self._center((rows - self._center(rows)) ** 2)
            new[place.start + ahead : place.stop + ahead] += between.astype(np.float32)

    def _deltas(self, replies: Sequence[Kept]) -> Iterator[tuple[slice, Rows]]:
        """The clipped and discounted deltas in blocks: where each is, and the values there."""
        factors = np.array([reply.factor for reply in replies], dtype=np.float32)[:, None]
        for place, rows in self._stretches(replies, slice(0, self._manifest.trained_size)):
            np.multiply(rows, factors, out=rows)
            yield place, rows

    def _stretches(self, replies: Sequence[Kept], whole: slice) -> Iterator[tuple[slice, Rows]]:
        length = max(1024, self._manifest.size // len(replies))
        for block in blocks(whole.stop - whole.start, length):
            place = slice(whole.start + block.start, whole.start + block.stop)
            yield place, self._spool.read(place, replies)


def mean(rows: Rows) -> Values:
    """(K, N) to (N,)."""
    return np.asarray(rows.mean(axis=0, dtype=np.float64))


def median(rows: Rows) -> Values:
    """(K, N) to (N,); of an even number of values the mean of the middle two."""
    count = len(rows)
    middle = [(count - 1) // 2, count // 2]
    # numpy sorts by vector instructions, and so faster than it partitions.
    return mean(np.sort(rows, axis=0)[middle])


def trimmed_mean(rows: Rows, trim: float) -> Values:
    """(K, N) to (N,): the mean without the ceil(trim K) smallest and largest values, fewer where none would be left."""
    count = len(rows)
    cut = min(math.ceil(trim * count), (count - 1) // 2)
    return mean(np.sort(rows, axis=0)[cut : count - cut])


def multi_krum(deltas: Iterator[Rows], count: int, faulty: float) -> list[int]:
    """Which of `count` replies multi-Krum averages.

    A reply's score is the sum of its squared distances to the n - f - 2 others that are closest; the n - f replies
    with the lowest scores are chosen, of equal ones the first.

    Args:
        deltas: the replies' deltas in blocks of coordinates, (n, N) each.
        count: n.
        faulty: see `MultiKrumConfig`.
    """
    num_faulty = min(math.ceil(faulty * count), max(0, (count - 3) // 2))
    num_neighbors = count - num_faulty - 2
    if num_neighbors < 1:
        return list(range(count))
    distances = squared_distances(deltas, count)
    np.fill_diagonal(distances, np.inf)
    scores = np.sort(distances, axis=1)[:, :num_neighbors].sum(axis=1)
    return sorted(np.argsort(scores, kind="stable")[: count - num_faulty].tolist())


def _products(rows: Values) -> Values:
    return np.asarray(rows @ rows.T)


def squared_distances(deltas: Iterator[Rows], count: int) -> Values:
    """Squared distances (n, n) of `count` rows that come in blocks of coordinates, in float64.

    From products, |a|^2 + |b|^2 - 2 ab: wrong by about 1e-16 |a|^2, which float32 would make 1e-7 and noise.
    """
    products = np.zeros((count, count))
    for rows in deltas:
        products += _products(rows.astype(np.float64))
    squares = np.diag(products)
    return np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0)
