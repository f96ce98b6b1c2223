"""In which order each simulated device meets its images: class after class in parts, some in every round."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.simulation.partition import Indices


@dataclass(frozen=True)
class Stream:
    """A device's images in the order in which they arrive.

    Attributes:
        parts: indices of the images of each part; a part is a world, the next one another.
        shares: (parts, classes) the share of each class in a part.
        is_gradual: whether a part's images are spread over its rounds; if not, all come for its first one.
    """

    parts: Sequence[Indices]
    shares: NDArray[np.float64]
    is_gradual: bool = True

    @property
    def own_shares(self) -> NDArray[np.float64]:
        """(classes,) the share of each class in all that the device has."""
        sizes = np.array([len(part) for part in self.parts])
        return np.asarray(sizes @ self.shares / sizes.sum())

    def arriving(self, number: int, rounds: int) -> Indices:
        """The images that arrive for round `number`, from 1, of `rounds`."""
        part, position, length = place_of(number, rounds, len(self.parts))
        images = self.parts[part]
        if not self.is_gradual:
            return images if position == 0 else images[:0]
        return images[len(images) * position // length : len(images) * (position + 1) // length]

    def arrived(self, number: int, rounds: int) -> int:
        """How many images have arrived before round `number`."""
        return sum(len(self.arriving(earlier, rounds)) for earlier in range(1, number))


def part_ends(rounds: int, parts: int) -> list[int]:
    """The last round of each part, rounds counted from 1."""
    return [rounds * (part + 1) // parts for part in range(parts)]


def place_of(number: int, rounds: int, parts: int) -> tuple[int, int, int]:
    """The part of a round, the round's place in the part from 0, and the part's length in rounds."""
    ends = part_ends(rounds, parts)
    part = next(index for index, end in enumerate(ends) if number <= end)
    start = ends[part - 1] if part else 0
    return part, number - start - 1, ends[part] - start


def make_stream(images: Indices, labels: Sequence[int], parts: int, rng: np.random.Generator) -> Stream:
    """Cut a device's images into `parts` by class, in an order of classes that is the device's own.

    Each class comes whole before the next, so that a part holds few of them; within a part they are mixed. One part:
    all are mixed.

    Args:
        images: the device's, at least one for each part.
        labels: class of each image of the data.
        parts: how many.
        rng: of the order.
    """
    classes = max(labels) + 1
    order = rng.permutation(classes)
    kinds = np.asarray(labels)[images]
    sorted_ = images[np.argsort(order[kinds], kind="stable")]
    cut = [rng.permutation(part) for part in np.array_split(sorted_, parts)]
    shares = np.stack([np.bincount(np.asarray(labels)[part], minlength=classes) / len(part) for part in cut])
    return Stream(cut, shares)
