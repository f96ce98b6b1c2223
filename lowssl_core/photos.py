"""The colour photographs that scikit-image and scikit-learn ship, cut into tiles with disjoint test regions."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from lowssl_core.errors import UserError
from lowssl_core.sources.layout import check_split, describe
from lowssl_core.sources.source import ArraySource

TILE = 64
"""Height and width of every tile in pixels."""

TRAIN_SIDES = (64, 96, 128)
"""Sides, in pixels of the photograph, of the squares that are shrunk to train tiles."""

MIN_DEVIATION = 12.0
"""Tiles whose gray values (0 to 255) deviate less than this are sky, night or blur, and are dropped."""


class Box(NamedTuple):
    """A square of a photograph, in its pixels."""

    top: int
    left: int
    side: int

    def overlaps(self, other: "Box") -> bool:
        """Whether the two squares share a pixel."""
        return (
            self.top < other.top + other.side
            and other.top < self.top + self.side
            and self.left < other.left + other.side
            and other.left < self.left + self.side
        )


@dataclass(frozen=True)
class Photograph:
    """One photograph in an installed package: `longest` is the side in pixels to which a larger one is shrunk."""

    name: str
    package: str
    path: str
    longest: int = 800


# What is left out is gray, drawn, tiny, or the second picture of the stereo pair.
PHOTOGRAPHS = (
    Photograph("astronaut", "skimage", "data/astronaut.png"),
    Photograph("cat", "skimage", "data/chelsea.png"),
    Photograph("coffee", "skimage", "data/coffee.png"),
    Photograph("galaxies", "skimage", "data/hubble_deep_field.jpg", longest=640),
    Photograph("tissue", "skimage", "data/ihc.png"),
    Photograph("motorcycle", "skimage", "data/motorcycle_left.png"),
    Photograph("retina", "skimage", "data/retina.jpg", longest=640),
    Photograph("rocket", "skimage", "data/rocket.jpg"),
    Photograph("pagoda", "sklearn", "datasets/images/china.jpg"),
    Photograph("dahlia", "sklearn", "datasets/images/flower.jpg"),
)


def read_photograph(photograph: Photograph) -> NDArray[np.uint8]:
    """Return the photograph's pixels, (H, W, 3) RGB, no side longer than `longest`; UserError if it is missing."""
    # The packages are found, not imported: importing scikit-image's data can reach for the network.
    spec = find_spec(photograph.package)
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    path = next((file for folder in folders if (file := Path(folder) / photograph.path).is_file()), None)
    pixels = None if path is None else cv2.imread(str(path), cv2.IMREAD_COLOR)
    if pixels is None:
        package = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[photograph.package]
        raise UserError(f"photos: {photograph.path} is not in the installed {package}: install a full {package}")
    height, width = pixels.shape[:2]
    factor = photograph.longest / max(height, width)
    if factor < 1:
        size = (round(width * factor), round(height * factor))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(pixels[..., ::-1]).astype(np.uint8, copy=False)


def find_test_boxes(height: int, width: int) -> list[Box]:
    """Return the test tiles of a photograph: every third square of 2 x 2 tiles of its grid, so none touches another."""
    return [
        Box(row * TILE, column * TILE, TILE)
        for row in range(height // TILE)
        for column in range(width // TILE)
        if (row // 2 + column // 2) % 3 == 1
    ]


def find_train_boxes(height: int, width: int) -> list[Box]:
    """Return the train tiles of a photograph: of each size one every half tile, sharing no pixel with a test tile."""
    held_out = find_test_boxes(height, width)
    candidates = (
        Box(top, left, side)
        for side in TRAIN_SIDES
        for top in range(0, height - side + 1, TILE // 2)
        for left in range(0, width - side + 1, TILE // 2)
    )
    return [box for box in candidates if not any(box.overlaps(other) for other in held_out)]


def open_photos(*, split: str | None = None) -> ArraySource:
    """Return the tiles of one split, (64, 64, 3) uint8, labelled by photograph.

    Ten photographs give 1,877 train tiles and 166 test tiles. Train tiles of one photograph overlap each other (squares
    of 64, 96 and 128 pixels, every 32); test tiles share no pixel with each other or with any train tile, also not
    through the shrinking. Near-uniform tiles are left out. No network is used. `split` is train (or None) or test.

    Raises UserError for another split or where a package came without its photographs.
    """
    taken = check_split(split, ("train", "test"), "photos")
    tiles, names, labels = [], [], []
    for label, photograph in enumerate(PHOTOGRAPHS):
        pixels = read_photograph(photograph)
        height, width = pixels.shape[:2]
        find_boxes = find_train_boxes if taken == "train" else find_test_boxes
        for top, left, side in find_boxes(height, width):
            # Each tile is shrunk from its own pixels alone: a filter never reaches over a border between splits.
            square = pixels[top : top + side, left : left + side]
            tile = cv2.resize(square, (TILE, TILE), interpolation=cv2.INTER_AREA)
            if cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY).std() >= MIN_DEVIATION:
                tiles.append(tile.astype(np.uint8, copy=False))
                names.append(f"{taken}/{photograph.name}/{top:04d}-{left:04d}-{side:03d}")
                labels.append(label)
    classes = [photograph.name for photograph in PHOTOGRAPHS]
    return ArraySource(
        np.stack(tiles),
        names,
        description=describe("photos", len(tiles), taken, classes),
        split=taken,
        labels=labels,
        classes=classes,
    )
