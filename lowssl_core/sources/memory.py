"""Images decoded and held in memory: a whole source shrunk for training, or some of it for evaluation."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray

from lowssl_core.errors import UserError
from lowssl_core.images import BadImage, decode, read_size
from lowssl_core.sources.source import ArraySource, Source

Pixels = NDArray[np.uint8]


def shrink(pixels: Pixels, short_side: int) -> Pixels:
    """Return (H, W, 3) uint8 pixels with the shorter side `short_side`, anti-aliased; smaller images as they are."""
    height, width = pixels.shape[:2]
    factor = short_side / min(height, width)
    if factor >= 1:
        return pixels
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def read_pixels(source: Source, index: int, shrink_to: int | None = None) -> Pixels:
    """Return image `index` as (H, W, 3) uint8, its shorter side at most `shrink_to`; BadImage if it has a defect."""
    image = source.read(index)
    if not isinstance(image, bytes):
        return image if shrink_to is None else shrink(image, shrink_to)
    if shrink_to is None:
        return decode(image)
    # A JPEG decoded at half or a quarter of its size costs less, and the rest is shrunk from there.
    short_side = min(read_size(image))
    reduce = next(factor for factor in (8, 4, 2, 1) if factor == 1 or short_side >= factor * shrink_to)
    return shrink(decode(image, reduce=reduce), shrink_to)


def shrink_source(source: Source, short_side: int, *, threads: int = 1) -> tuple[ArraySource, dict[str, str]]:
    """Decode and shrink every image once; return them as a source, and the bad images' names with their reasons.

    The bad images are not in the source returned, which otherwise keeps the order, names and labels.
    Raises UserError if the images would take more than half of the machine's memory.
    """
    _check_memory(source, short_side)
    images: list[Pixels] = []
    kept: list[int] = []
    set_aside: dict[str, str] = {}
    for index, image in enumerate(_read_all(source, range(len(source)), short_side, threads)):
        if isinstance(image, BadImage):
            set_aside[source.name(index)] = image.reason
        else:
            images.append(image)
            kept.append(index)
    shrunk = ArraySource(
        images,
        [source.name(index) for index in kept],
        description=f"{source.description}, {len(kept)} of them usable and shrunk to {short_side} px",
        split=source.split,
        labels=_labels(source, kept),
        classes=source.classes,
    )
    return shrunk, set_aside


def load_images(
    source: Source,
    indices: Iterable[int] | None = None,
    *,
    shrink_to: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[list[Pixels], list[int] | None, dict[str, str]]:
    """Return images as (H, W, 3) uint8, their labels (None: the source has none) and the bad ones' names and reasons.

    Takes the images at `indices`, or all; with a `limit`, at most so many of them, drawn by `seed`, in their order.
    Labels belong to the images returned; bad images are left out of both.
    """
    wanted = list(range(len(source)) if indices is None else indices)
    if limit is not None and limit < len(wanted):
        drawn = np.random.default_rng(seed).permutation(len(wanted))[:limit]
        wanted = [wanted[position] for position in sorted(drawn.tolist())]
    images: list[Pixels] = []
    kept: list[int] = []
    set_aside: dict[str, str] = {}
    for index, image in zip(wanted, _read_all(source, wanted, shrink_to, threads=1), strict=True):
        if isinstance(image, BadImage):
            set_aside[source.name(index)] = image.reason
        else:
            images.append(image)
            kept.append(index)
    return images, _labels(source, kept), set_aside


def _labels(source: Source, indices: Sequence[int]) -> list[int] | None:
    labels = [label for index in indices if (label := source.label(index)) is not None]
    return labels if source.classes is not None and len(labels) == len(indices) else None


def _read_all(
    source: Source, indices: Iterable[int], shrink_to: int | None, threads: int
) -> Iterator[Pixels | BadImage]:
    read = partial(_read_or_reason, source, shrink_to)
    if threads <= 1:
        yield from map(read, indices)
        return
    with ThreadPoolExecutor(threads) as pool:  # decoding lets go of the interpreter's lock
        yield from pool.map(read, indices)


def _read_or_reason(source: Source, shrink_to: int | None, index: int) -> Pixels | BadImage:
    try:
        return read_pixels(source, index, shrink_to)
    except BadImage as error:
        return error


def _check_memory(source: Source, short_side: int) -> None:
    sizes = source.sizes(np.random.default_rng(0), 64)
    factors = np.minimum(1.0, short_side / sizes.min(axis=1))
    needed = float((3 * sizes.prod(axis=1) * factors**2).mean()) * len(source)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available / 2:
        raise UserError(
            f"{source.description}: shrunk to {short_side} px the images take about {needed / 2**30:.1f} GiB, more than"
            f" half of this machine's {available / 2**30:.1f} GiB: choose a smaller shrink_to, or none"
        )
