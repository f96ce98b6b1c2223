"""Dirt on a camera's lens, drawn into images."""

import cv2
import numpy as np
from numpy.typing import NDArray

_DROPS = 0.012
"""Share of the pixels around which there is a blot."""


def through_dirt(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """An image (H, W, 3) behind soft dark blots of some ten pixels, which hide about two fifths of it."""
    drops = (rng.random(pixels.shape[:2]) < _DROPS).astype(np.float32)
    cover = np.clip(40 * cv2.GaussianBlur(drops, (0, 0), 3), 0, 1)[..., None]
    light: NDArray[np.uint8] = np.rint(pixels * (1 - cover) + 0.15 * 255 * cover).astype(np.uint8)
    return light
