"""A small COCO-format set with exact masks: cut-outs of photographs pasted into other photographs, from one seed."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from lowssl_core.command_line import run_for_user
from lowssl_core.errors import UserError
from lowssl_core.images import Pixels, decode
from lowssl_core.photos import PHOTOGRAPHS, read_photograph
from lowssl_core.sources import Source, open_source

Mask = NDArray[np.bool_]

SPLITS = ("train", "val")
MAX_OBJECTS = 5
LONG_SIDE = (0.25, 0.75)
"""Long side of a pasted object as a share of the picture's short side."""
MIN_VISIBLE = 0.25
"""Objects of which less stays visible under later ones are no longer annotated, and neither pasted."""
TRAIN_SHARE, VAL_START = 0.65, 0.7
"""Backgrounds are cut from the left part of a photograph for train, from its right part for val."""
SHEET_COLORS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0))

# Where in which photograph one object is: left, top, right, bottom of a rectangle around it, for GrabCut.
OBJECTS: Mapping[str, tuple[str, tuple[int, int, int, int]]] = {
    "cat": ("cat", (2, 2, 375, 298)),
    "cup": ("coffee", (75, 10, 487, 392)),
    "flower": ("dahlia", (160, 75, 448, 366)),
}
# Classes of clothing160 that look alike at this size are one category; skirts and dresses are left out.
CLOTHES = {
    "hat": "hat",
    "pants": "pants",
    "shoes": "shoes",
    "shorts": "shorts",
    "longsleeve": "top",
    "outwear": "top",
    "shirt": "top",
    "t-shirt": "top",
}


class Cutout(NamedTuple):
    """An object cut out to its mask's box: (H, W, 3) uint8 and (H, W) bool."""

    pixels: Pixels
    mask: Mask


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a split is composed of: cut-outs by category, and pieces of photographs to lay them on."""

    cutouts: Mapping[str, Sequence[Cutout]]
    backgrounds: Sequence[Pixels]


class Picture(NamedTuple):
    """A composed picture, and for each object its category, an index, and its visible (H, W) mask."""

    pixels: Pixels
    objects: list[tuple[int, Mask]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="gets train.json, val.json, their images"
    )
    parser.add_argument(
        "--clothing", type=Path, help="clothing160, zip or folder: clothes as objects, not coins and cats"
    )
    parser.add_argument("--train", type=int, default=600, help="pictures to train on (default 600)")
    parser.add_argument("--val", type=int, default=150, help="pictures to judge on (default 150)")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 160), metavar=("MIN", "MAX"), help="sides in pixels")
    parser.add_argument("--per-category", type=int, default=60, help="clothes cut out of the train split (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if not 32 <= arguments.size[0] <= arguments.size[1]:
        raise UserError(
            f"--size {arguments.size[0]} {arguments.size[1]}: wanted the least and the greatest side, from 32"
        )
    material = clothes(arguments.clothing, arguments.per_category) if arguments.clothing else still_lifes()
    for index, (split, count) in enumerate(zip(SPLITS, (arguments.train, arguments.val), strict=True)):
        rng = np.random.default_rng((arguments.seed, index))
        pictures = [compose(material[split], tuple(arguments.size), rng) for _ in range(count)]
        write_split(arguments.out, split, pictures, list(material[split].cutouts))
        objects = sum(len(picture.objects) for picture in pictures)
        cutouts = ", ".join(f"{len(each)} {name}" for name, each in material[split].cutouts.items())
        print(f"{split}: {count} pictures, {objects} objects, from {cutouts}")
        cv2.imwrite(str(arguments.out / f"{split}-sheet.png"), sheet(pictures[:24])[..., ::-1])
    print(f"wrote {arguments.out}/train.json, val.json, and sheets to look at")
    return 0


# Material


def still_lifes() -> dict[str, Material]:
    """Coins, a cat, a cup and a flower, all of installed packages.

    Coins of train and val are different ones; the three others are the same in both, at other sizes on other grounds.
    """
    singles = {name: [cut_photograph(*place)] for name, place in OBJECTS.items()}
    coins = cut_coins()
    backgrounds = background_pieces(without=[name for name, _ in OBJECTS.values()])
    parts = {"train": coins[: len(coins) * 2 // 3], "val": coins[len(coins) * 2 // 3 :]}
    return {
        split: Material(cutouts={"coin": parts[split], **singles}, backgrounds=backgrounds[split]) for split in SPLITS
    }


def clothes(path: Path, per_category: int) -> dict[str, Material]:
    """Clothes of clothing160's train split for train, and of its test split for val, all that can be cut out well."""
    backgrounds = background_pieces(without=["astronaut"])  # who wears clothes
    found = {}
    for split, part, limit in (("train", "train", per_category), ("val", "test", per_category)):
        cutouts = cut_clothes(open_source(f"{path}::{part}"), limit)
        found[split] = Material(cutouts=cutouts, backgrounds=backgrounds[split])
    return found


def background_pieces(without: Sequence[str]) -> dict[str, list[Pixels]]:
    """The left and the right part of each photograph, which share no pixel."""
    photographs = [read_photograph(each) for each in PHOTOGRAPHS if each.name not in without]
    widths = [pixels.shape[1] for pixels in photographs]
    return {
        "train": [pixels[:, : round(TRAIN_SHARE * w)] for pixels, w in zip(photographs, widths, strict=True)],
        "val": [pixels[:, round(VAL_START * w) :] for pixels, w in zip(photographs, widths, strict=True)],
    }


def cut_coins() -> list[Cutout]:
    """The coins of scikit-image's picture, by threshold, in reading order of their tops."""
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.submodule_search_locations
    pixels = cv2.imread(str(Path(spec.submodule_search_locations[0]) / "data" / "coins.png"), cv2.IMREAD_COLOR_RGB)
    # The ground is brighter on one side: a coin is what is brighter than its surroundings.
    blurred = cv2.GaussianBlur(pixels[..., 0], (0, 0), 1.5).astype(np.int16)
    ground = cv2.GaussianBlur(pixels[..., 0], (0, 0), 30).astype(np.int16)
    bright = (blurred > ground + 2).astype(np.uint8)
    filled = np.zeros_like(bright)
    contours, _ = cv2.findContours(bright, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(filled, contours, -1, 1, cv2.FILLED)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(filled)
    height, width = filled.shape
    cutouts = []
    for number in range(1, count):
        left, top, w, h, area = stats[number]
        # A disk fills pi / 4 of its box.
        if area > 300 and 0.7 < area / (w * h) < 0.86 and min(left, top, width - left - w, height - top - h) > 0:
            cutouts.append(trim(pixels, labels == number))
    return cutouts


def cut_photograph(name: str, box: tuple[int, int, int, int]) -> Cutout:
    """The object of a photograph, by GrabCut from a rectangle around it, at half the photograph's size."""
    pixels = read_photograph(next(each for each in PHOTOGRAPHS if each.name == name))
    size = (pixels.shape[1] // 2, pixels.shape[0] // 2)
    left, top, right, bottom = (side // 2 for side in box)
    half = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return trim(half, grab(half, (left, top, right - left, bottom - top)))


def cut_clothes(source: Source, limit: int) -> dict[str, list[Cutout]]:
    """At most `limit` cut-outs of each category; those whose mask looks like no garment are left out."""
    cutouts: dict[str, list[Cutout]] = {name: [] for name in sorted(set(CLOTHES.values()))}
    assert source.classes is not None
    # The order mixes the classes of one category.
    for index in np.random.default_rng(0).permutation(len(source)):
        label = source.label(int(index))
        category = CLOTHES.get(source.classes[label]) if label is not None else None
        if category is None or len(cutouts[category]) == limit:
            continue
        image = source.read(int(index))
        pixels = decode(image) if isinstance(image, bytes) else image
        height, width = pixels.shape[:2]
        mask = grab(pixels, (3, 3, width - 6, height - 6))
        border = np.concatenate([mask[3], mask[-4], mask[:, 3], mask[:, -4]])
        if 0.12 < mask.mean() < 0.75 and border.mean() < 0.15:
            cutouts[category].append(trim(pixels, mask))
    return cutouts


def grab(pixels: Pixels, rectangle: tuple[int, int, int, int]) -> Mask:
    """The largest piece that GrabCut finds in a rectangle (left, top, width, height), its holes filled."""
    cv2.setRNGSeed(0)
    kinds = np.zeros(pixels.shape[:2], np.uint8)
    models = np.zeros((2, 1, 65))
    cv2.grabCut(np.ascontiguousarray(pixels), kinds, rectangle, models[0], models[1], 5, cv2.GC_INIT_WITH_RECT)
    found = np.isin(kinds, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    found = cv2.morphologyEx(found, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    contours, _ = cv2.findContours(found, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros_like(found)
    if contours:
        cv2.drawContours(filled, [max(contours, key=cv2.contourArea)], -1, 1, cv2.FILLED)
    return filled.astype(bool)


def trim(pixels: Pixels, mask: Mask) -> Cutout:
    """The mask's box of both."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    return Cutout(pixels[box].copy(), mask[box].copy())


# Composition


def compose(material: Material, sizes: tuple[int, int], rng: np.random.Generator) -> Picture:
    """Paste one to `MAX_OBJECTS` cut-outs onto a background; what comes later covers what is there.

    A cut-out that would hide too much of another is not pasted, so that everything in the picture is annotated.
    """
    height, width = (int(side) for side in rng.integers(sizes[0], sizes[1] + 1, 2))
    pixels = background(material.backgrounds, height, width, rng)
    names = list(material.cutouts)
    whole: list[int] = []
    objects: list[tuple[int, Mask]] = []
    for _ in range(rng.integers(1, MAX_OBJECTS + 1)):
        category = int(rng.integers(len(names)))
        choices = material.cutouts[names[category]]
        cutout = vary(choices[rng.integers(len(choices))], min(height, width), rng)
        layer, mask = place(cutout, height, width, rng)
        visible = [(kind, old & ~mask) for kind, old in objects]
        if any(new.sum() < MIN_VISIBLE * area for (_, new), area in zip(visible, whole, strict=True)):
            continue
        pixels = np.where(mask[..., None], layer, pixels)
        objects = [*visible, (category, mask)]
        whole.append(int(cutout.mask.sum()))
    return Picture(pixels, objects)


def background(pieces: Sequence[Pixels], height: int, width: int, rng: np.random.Generator) -> Pixels:
    """A piece of a photograph at a scale of its own, half of the time mirrored: (height, width, 3)."""
    piece = pieces[rng.integers(len(pieces))]
    factor = rng.uniform(0.6, 1.0) * min(piece.shape[0] / height, piece.shape[1] / width)
    h, w = round(height * factor), round(width * factor)
    top, left = rng.integers(piece.shape[0] - h + 1), rng.integers(piece.shape[1] - w + 1)
    crop = cv2.resize(piece[top : top + h, left : left + w], (width, height), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop).astype(np.uint8, copy=False)


def vary(cutout: Cutout, short_side: int, rng: np.random.Generator) -> Cutout:
    """The cut-out at a size by chance, half of the time mirrored."""
    height, width = cutout.mask.shape
    factor = rng.uniform(*LONG_SIDE) * short_side / max(height, width)
    size = (max(4, round(width * factor)), max(4, round(height * factor)))
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    pixels = cv2.resize(cutout.pixels, size, interpolation=method).astype(np.uint8, copy=False)
    mask = cv2.resize(cutout.mask.astype(np.float32), size, interpolation=method) > 0.5
    return Cutout(pixels[:, ::-1], mask[:, ::-1]) if rng.random() < 0.5 else Cutout(pixels, mask)


def place(cutout: Cutout, height: int, width: int, rng: np.random.Generator) -> tuple[Pixels, Mask]:
    """The cut-out somewhere in an empty picture, whole: (height, width, 3) and (height, width)."""
    h, w = cutout.mask.shape
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    layer, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), bool)
    layer[top : top + h, left : left + w] = cutout.pixels
    mask[top : top + h, left : left + w] = cutout.mask
    return layer, mask


# Files


def write_split(out: Path, split: str, pictures: Sequence[Picture], categories: Sequence[str]) -> None:
    """Write the pictures as PNG, whose pixels the masks fit exactly, and the annotations as COCO's JSON with RLE."""
    folder = out / split
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, picture in enumerate(pictures, 1):
        height, width = picture.pixels.shape[:2]
        name = f"{number:06d}.png"
        cv2.imwrite(str(folder / name), picture.pixels[..., ::-1])
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for category, mask in picture.objects:
            place_in_file = {"id": len(annotations) + 1, "image_id": number, "category_id": category + 1}
            annotations.append(place_in_file | annotation(mask))
    names = [{"id": index, "name": name} for index, name in enumerate(categories, 1)]
    content = {"images": images, "annotations": annotations, "categories": names}
    (out / f"{split}.json").write_text(json.dumps(content))


def annotation(mask: Mask) -> dict[str, Any]:
    """A mask as COCO writes it: RLE, the box around it, its area in pixels."""
    encoded = rle.encode(np.asfortranarray(mask, np.uint8))
    return {
        "bbox": rle.toBbox(encoded).tolist(),
        "area": int(mask.sum()),
        "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")},
        "iscrowd": 0,
    }


def sheet(pictures: Sequence[Picture], columns: int = 6, scale: int = 2) -> Pixels:
    """Pictures side by side, with masks and boxes drawn in their category's color."""
    cell = scale * max(max(picture.pixels.shape[:2]) for picture in pictures) + 6
    rows = -(-len(pictures) // columns)
    canvas = np.full((rows * cell, columns * cell, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        drawn = draw(picture, scale)
        top, left = index // columns * cell, index % columns * cell
        canvas[top : top + drawn.shape[0], left : left + drawn.shape[1]] = drawn
    return canvas


def draw(picture: Picture, scale: int) -> Pixels:
    """One picture, enlarged, with the outlines of its masks and its boxes."""
    height, width = picture.pixels.shape[:2]
    drawn = cv2.resize(picture.pixels, (scale * width, scale * height), interpolation=cv2.INTER_NEAREST)
    for category, mask in picture.objects:
        large = cv2.resize(mask.astype(np.uint8), (scale * width, scale * height), interpolation=cv2.INTER_NEAREST)
        color = SHEET_COLORS[category % len(SHEET_COLORS)]
        contours, _ = cv2.findContours(large, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, contours, -1, color, 1)
        left, top, w, h = cv2.boundingRect(large)
        cv2.rectangle(drawn, (left, top), (left + w - 1, top + h - 1), color, 2)
    return np.asarray(drawn, np.uint8)


if __name__ == "__main__":
    sys.exit(run_for_user("cutouts.py", main))
