"""Pixel scales of global and local views, measured on sampled boxes, and the local size that matches them."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lowssl_core.views.geometry import Boxes, Sizes, sample_boxes
from lowssl_core.views.parameters import ViewsConfig

# At the recipe's scales the standard error of the mean ratio is then 0.002.
_PAIRS = 100_000


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a configuration does to images of given sizes; means over sampled boxes.

    A crop scale is a box's share of the image's area; a pixel scale is source pixels per pixel of the view; `ratio`
    is mean(local pixel scale / global pixel scale), 1 where the two are matched; `matched_size` is the local size
    for which it comes closest to 1, and `local_size` the one that was measured.
    """

    global_crop_scale: float
    local_crop_scale: float
    global_pixel_scale: float
    local_pixel_scale: float
    ratio: float
    local_size: int
    matched_size: int


def pixel_scale_ratio(
    image_sizes: Sizes,
    *,
    global_size: int = 224,
    local_size: int = 128,
    global_scale: tuple[float, float] = (0.3, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.3),
    pairs: int = _PAIRS,
    seed: int = 0,
) -> float:
    """mean(PS_local / PS_global) over `pairs` pairs of sampled boxes; `image_sizes` is (N, 2), heights and widths.

    PS = box area / view area, source pixels per pixel of the view: Tan et al., "Effective Self-supervised
    Pre-training on Low-compute Networks without Distillation" (2023), section 4.
    """
    _, global_boxes, local_boxes = _sample_pairs(image_sizes, global_scale, local_scale, pairs, seed)
    return float(np.mean(_areas(local_boxes) / _areas(global_boxes))) * (global_size / local_size) ** 2


def matched_local_size(
    image_sizes: Sizes,
    *,
    global_size: int = 224,
    global_scale: tuple[float, float] = (0.3, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.3),
    grid: int = 1,
    pairs: int = _PAIRS,
    seed: int = 0,
) -> int:
    """The local size, a multiple of `grid`, at which local and global views show things at the same pixel scale.

    global_size * sqrt(mean(local area / global area)) over sampled boxes, rounded to `grid` (a ViT's patch size).
    """
    ratio = pixel_scale_ratio(
        image_sizes,
        global_size=global_size,
        local_size=global_size,
        global_scale=global_scale,
        local_scale=local_scale,
        pairs=pairs,
        seed=seed,
    )
    return _round_to_grid(global_size * math.sqrt(ratio), grid)


def measure(config: ViewsConfig, image_sizes: Sizes, *, grid: int = 1, seed: int = 0) -> Measurement:
    """Crop scales, pixel scales, their ratio and the matched size of `config` on images of `image_sizes`, (N, 2)."""
    sizes, global_boxes, local_boxes = _sample_pairs(image_sizes, config.global_scale, config.local_scale, _PAIRS, seed)
    global_areas, local_areas = _areas(global_boxes), _areas(local_boxes)
    ratio = float(np.mean(local_areas / global_areas))
    matched = _round_to_grid(config.global_size * math.sqrt(ratio), grid)
    local_size = matched if isinstance(config.local_size, str) else config.local_size
    image_areas = sizes.prod(axis=1)
    return Measurement(
        global_crop_scale=float(np.mean(global_areas / image_areas)),
        local_crop_scale=float(np.mean(local_areas / image_areas)),
        global_pixel_scale=float(np.mean(global_areas)) / config.global_size**2,
        local_pixel_scale=float(np.mean(local_areas)) / local_size**2,
        ratio=ratio * (config.global_size / local_size) ** 2,
        local_size=local_size,
        matched_size=matched,
    )


def _sample_pairs(
    image_sizes: Sizes, global_scale: tuple[float, float], local_scale: tuple[float, float], pairs: int, seed: int
) -> tuple[Sizes, Boxes, Boxes]:
    """A global and a local box for each of `pairs` images, all sizes taken equally often."""
    if image_sizes.ndim != 2 or image_sizes.shape[1] != 2 or len(image_sizes) == 0:
        raise ValueError(f"image_sizes has shape {image_sizes.shape}; it takes (N, 2), heights and widths")
    rng = np.random.default_rng(seed)
    sizes = image_sizes[np.arange(pairs) % len(image_sizes)]
    return sizes, sample_boxes(sizes, global_scale, rng), sample_boxes(sizes, local_scale, rng)


def _areas(boxes: Boxes) -> npt.NDArray[np.float64]:
    return (boxes[:, 2] * boxes[:, 3]).astype(np.float64)


def _round_to_grid(size: float, grid: int) -> int:
    if grid < 1:
        raise ValueError(f"grid is {grid}; it takes a number of pixels, 1 or more")
    return max(grid, grid * round(size / grid))
