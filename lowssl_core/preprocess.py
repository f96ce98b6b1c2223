"""The one definition of evaluation-style input: short side resized, centre square cut, uint8 in and out."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True, kw_only=True, init=False)
class Preprocess:
    """Resize the short side of an image to `resize` pixels and cut the centre square of `size` pixels.

    Both are done as one bicubic, anti-aliased resize of the centre square of side `short * size / resize`, a float
    box: nothing is rounded before the resize, so an image and its reduced-size decoding give the same picture.
    Without `resize`, the usual margin of 256 to 224 is kept.
    """

    size: int
    resize: int

    def __init__(self, *, size: int, resize: int | None = None) -> None:
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "resize", round(size * 256 / 224) if resize is None else resize)
        if not 1 <= self.size <= self.resize:
            raise ValueError(f"size {self.size} and resize {self.resize}: expected 1 <= size <= resize")

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """One (H, W, 3) uint8 image to (size, size, 3) uint8; ValueError for anything else."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise ValueError(f"an image must be (H, W, 3) uint8, not {image.shape} {image.dtype}")
        height, width, _ = image.shape
        side = min(height, width) * self.size / self.resize
        left, top = (width - side) / 2, (height - side) / 2
        square = Image.fromarray(image).resize(
            (self.size, self.size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
        )
        return np.asarray(square)
