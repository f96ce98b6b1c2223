"""What three cameras with dirty lenses see, each its own places and half-way others; and what models are judged on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from lowssl_core.sources import Source, open_source
from lowssl_core.sources.source import ArraySource
from server.demonstration.dirt import through_dirt
from server.simulation.stream import Stream

DATA = "photos"
# A tile held out is judged through so many lenses, by so many train tiles.
_LENSES, _BANK = 3, 1000


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A device of the demonstration.

    Attributes:
        name: of the device.
        places: the photographs whose tiles it sees, before and after it is turned.
    """

    name: str
    places: tuple[Sequence[str], Sequence[str]]


CAMERAS = (
    Camera(name="camera-1", places=(("astronaut", "coffee"), ("pagoda", "rocket"))),
    Camera(name="camera-2", places=(("cat", "galaxies"), ("dahlia", "retina"))),
    Camera(name="camera-3", places=(("motorcycle",), ("tissue",))),
)


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """All images of the demonstration; labels, the photograph of a tile, judge and are shown to no device.

    Attributes:
        seen: by the cameras.
        streams: by camera, which of those, in two parts.
        bank: some train tiles of all photographs: they vote.
        asked: all tiles held out from training, through several lenses each.
    """

    seen: Source
    streams: Mapping[str, Stream]
    bank: Source
    asked: Source

    def deliver(self, camera: str, part: int, folder: Path) -> None:
        """Write what a camera sees in a part, 0 or 1, into a folder, as PNGs in the order of the stream."""
        for position, index in enumerate(self.streams[camera].parts[part]):
            _write(_pixels(self.seen, int(index)), folder / f"{part}-{position:04}.png")

    def write_probe(self, folder: Path) -> None:
        """Write each tile held out through one lens, without a label: the server's gate looks at what cameras see."""
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(len(self.asked) // _LENSES):
            _write(_pixels(self.asked, index), folder / f"{index:04}.png")


def make_scenes(images: int, seed: int) -> Scenes:
    """Draw what each camera sees.

    Args:
        images: of each part of a camera, at most.
        seed: of what is drawn.

    Raises:
        UserError: packages that came without their photographs.
    """
    train, test = open_source(DATA, split="train"), open_source(DATA, split="test")
    rng = np.random.default_rng(seed)
    classes = train.classes or ()
    labels = np.array([train.label(index) for index in range(len(train))])
    chosen: list[int] = []
    streams = {}
    for camera in CAMERAS:
        parts, shares = [], []
        for places in camera.places:
            kinds = [classes.index(place) for place in places]
            tiles = rng.permutation(np.flatnonzero(np.isin(labels, kinds)))[:images]
            parts.append(np.arange(len(chosen), len(chosen) + len(tiles)))
            shares.append(np.bincount(labels[tiles], minlength=len(classes)) / len(tiles))
            chosen += tiles.tolist()
        streams[camera.name] = Stream(parts, np.stack(shares), is_gradual=False)
    bank = rng.permutation(len(train))[:_BANK].tolist()
    return Scenes(
        seen=_soiled(train, chosen, rng),
        streams=streams,
        bank=_soiled(train, bank, rng),
        asked=_soiled(test, _LENSES * list(range(len(test))), rng),
    )


def _soiled(tiles: Source, indices: Sequence[int], rng: np.random.Generator) -> Source:
    """Some tiles, each with dirt of its own."""
    return ArraySource(
        [through_dirt(_pixels(tiles, index), rng) for index in indices],
        [f"{position:05}-{tiles.name(index)}" for position, index in enumerate(indices)],
        description=f"{tiles.description}, through dirty lenses",
        labels=[label for index in indices if (label := tiles.label(index)) is not None],
        classes=tiles.classes,
    )


def _write(pixels: NDArray[np.uint8], path: Path) -> None:
    """Write a PNG that is never seen half."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_bytes(cv2.imencode(".png", pixels[..., ::-1])[1].tobytes())
    unfinished.replace(path)


def _pixels(source: Source, index: int) -> NDArray[np.uint8]:
    image = source.read(index)
    assert not isinstance(image, bytes), "tiles are cut in memory"
    return image
