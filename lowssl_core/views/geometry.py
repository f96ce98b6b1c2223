"""Crop boxes as RandomResizedCrop draws them, many at a time."""

import math

import numpy as np
import numpy.typing as npt

Sizes = npt.NDArray[np.integer]
Boxes = npt.NDArray[np.int64]
Uniforms = npt.NDArray[np.float64]

ASPECTS = (3 / 4, 4 / 3)
TRIES = 10
# Uniform numbers that one box takes: an area and an aspect for each try, then its top and left.
DRAWS_PER_BOX = 2 * TRIES + 2


def sample_boxes(sizes: Sizes, scale: tuple[float, float], rng: np.random.Generator) -> Boxes:
    """Draw one crop box for each image: an (N, 4) array of top, left, height, width in pixels.

    `sizes` is (N, 2), heights and widths; `scale` bounds the drawn area as a share of the image's area.
    RandomResizedCrop of Szegedy et al., "Going Deeper with Convolutions" (2015), as torchvision has it: area from
    U(scale), aspect from log-U(3/4, 4/3), ten tries, then the largest centered box with an allowed aspect.
    """
    uniforms = rng.random((len(sizes), DRAWS_PER_BOX))
    low, high = scale
    return boxes_from_uniforms(uniforms, sizes[:, 0], sizes[:, 1], low, high)


def boxes_from_uniforms(
    uniforms: Uniforms,
    heights: Sizes | int,
    widths: Sizes | int,
    low: npt.NDArray[np.float64] | float,
    high: npt.NDArray[np.float64] | float,
) -> Boxes:
    """The boxes that (N, DRAWS_PER_BOX) uniform numbers stand for; every other argument is a scalar or (N,)."""
    heights, widths = np.asarray(heights), np.asarray(widths)
    low, high = np.asarray(low), np.asarray(high)
    areas = (heights * widths)[..., None] * (low[..., None] + (high - low)[..., None] * uniforms[:, :TRIES])
    bottom, top = math.log(ASPECTS[0]), math.log(ASPECTS[1])
    aspects = np.exp(bottom + (top - bottom) * uniforms[:, TRIES : 2 * TRIES])
    tried_widths = np.rint(np.sqrt(areas * aspects)).astype(np.int64)
    tried_heights = np.rint(np.sqrt(areas / aspects)).astype(np.int64)
    fits = (
        (tried_widths > 0)
        & (tried_widths <= widths[..., None])
        & (tried_heights > 0)
        & (tried_heights <= heights[..., None])
    )
    rows, first = np.arange(len(uniforms)), fits.argmax(axis=1)
    box_heights, box_widths = tried_heights[rows, first], tried_widths[rows, first]
    tops = (uniforms[:, -2] * (heights - box_heights + 1)).astype(np.int64)
    lefts = (uniforms[:, -1] * (widths - box_widths + 1)).astype(np.int64)
    boxes = np.stack([tops, lefts, box_heights, box_widths], axis=1)
    failed = ~fits[rows, first]
    if failed.any():
        everywhere = (np.broadcast_to(side, len(uniforms))[failed] for side in (heights, widths))
        boxes[failed] = _centered_boxes(*everywhere)
    return boxes


def _centered_boxes(heights: Sizes, widths: Sizes) -> Boxes:
    """The largest centered boxes whose aspect is allowed: where all ten tries were rejected."""
    smallest, largest = ASPECTS
    aspects = widths / heights
    box_widths = np.where(aspects > largest, np.rint(heights * largest), widths).astype(np.int64)
    box_heights = np.where(aspects < smallest, np.rint(widths / smallest), heights).astype(np.int64)
    return np.stack([(heights - box_heights) // 2, (widths - box_widths) // 2, box_heights, box_widths], axis=1)
