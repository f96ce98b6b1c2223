"""What every source of images offers: bytes or pixels by index, names, and labels where there are any."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lowssl_core.errors import UserError
from lowssl_core.images import BadImage, read_size

Image = bytes | NDArray[np.uint8]
"""One image: an encoded file's bytes, or its RGB pixels (H, W, 3) uint8."""


class Source(ABC):
    """Images by index, in an order that depends on the data alone; may be pickled and forked.

    `description` says in a few words what was opened, `split` which part of it was taken (None: all of it) and
    `classes` names the labels' values (None: the images have no labels).
    """

    description: str
    split: str | None
    classes: tuple[str, ...] | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Image:
        """Return image `index`, undecoded where it is a file; BadImage if it cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the image's name, unique in the source and path-like."""

    @abstractmethod
    def label(self, index: int) -> int | None:
        """Return the image's class, an index into `classes`, or None where there are no labels."""

    def sizes(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return heights and widths, (n, 2), of at most `count` readable images drawn without replacement."""
        sizes: list[tuple[int, ...]] = []
        for index in rng.permutation(len(self)):
            if len(sizes) == count:
                break
            try:
                image = self.read(int(index))
                sizes.append(read_size(image) if isinstance(image, bytes) else image.shape[:2])
            except BadImage:
                continue  # the loader counts and names it
        if count > 0 and not sizes:
            raise UserError(f"{self.description}: not one of the {len(self)} images can be read")
        return np.array(sizes, dtype=np.int64).reshape(-1, 2)


class ArraySource(Source):
    """Images held in memory, each (H, W, 3) uint8."""

    def __init__(
        self,
        images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
        names: Sequence[str],
        *,
        description: str,
        split: str | None = None,
        labels: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self._images = images
        self._names = tuple(names)
        self._labels = None if labels is None else tuple(int(label) for label in labels)
        self.description = description
        self.split = split
        self.classes = None if classes is None else tuple(classes)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Image:
        """Return the pixels of image `index`; never a bad image."""
        return self._images[index]

    def name(self, index: int) -> str:
        """Return the image's name."""
        return self._names[index]

    def label(self, index: int) -> int | None:
        """Return the image's class, or None where there are no labels."""
        return None if self._labels is None else self._labels[index]
