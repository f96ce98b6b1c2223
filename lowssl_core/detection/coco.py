"""COCO-format data, read strictly: images, categories and instances with boxes and masks."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as rle
from torch import Tensor

from lowssl_core.errors import UserError
from lowssl_core.images import BadImage, read_size
from lowssl_core.sources.source import Source

Rle = Mapping[str, Any]
"""A mask as pycocotools has it: `size`, [height, width], and `counts`, bytes."""

_FIELDS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "categories": {"id": int, "name": str},
    "annotations": {
        "id": int,
        "image_id": int,
        "category_id": int,
        "bbox": list,
        "area": (int, float),
        "iscrowd": int,
        "segmentation": (list, dict),
    },
}


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One annotation.

    Attributes:
        id: from 1, unique.
        label: of its category, from 1; 0 is the background.
        box: x, y, width, height in pixels, as annotated.
        area: in pixels, which decides whether AP counts it as small, medium or large.
        is_crowd: whether it is a region with many objects, which is neither learnt nor counted.
        mask: at the image's size.
    """

    id: int
    label: int
    box: tuple[float, float, float, float]
    area: float
    is_crowd: bool
    mask: Rle


class Targets(NamedTuple):
    """What is learnt of one image: boxes (N, 4) as x1, y1, x2, y2, labels (N,) from 1, masks (N, H, W) uint8."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor


class CocoData(Source):
    """Images of a folder with the instances of an annotation file.

    Args:
        annotations: a JSON file in COCO's format for instances: polygons, or RLE, compressed or not.
        images: the folder that the file names in it start from.
        learnable: keep only images with something to learn (`targets`), as training does.

    Attributes:
        image_ids: by index.
        sizes_of: height and width by index.
        instances: by index.
        category_ids: by label less 1, in the order of ids.
        hash: sha256 of the annotation file.

    Raises:
        UserError: a file is missing or is not what its format says; the message names the entry.
    """

    def __init__(self, annotations: Path, images: Path, *, learnable: bool = False) -> None:
        try:
            content = annotations.read_bytes()
        except OSError as error:
            raise UserError(f"{annotations}: {error.strerror}") from None
        self.hash = hashlib.sha256(content).hexdigest()
        tables = _tables(annotations, content)
        self._folder = images
        names = {entry["id"]: entry["name"] for entry in sorted(tables["categories"], key=lambda each: each["id"])}
        if not names:
            raise UserError(f"{annotations}: it has no categories")
        self.category_ids = tuple(names)
        self.classes = tuple(names.values())
        self.split = None
        found = _instances(annotations, tables, {number: label for label, number in enumerate(names, 1)})
        entries = tables["images"]
        if learnable:
            entries = [each for each in entries if any(map(_is_learnable, found[each["id"]]))]
        if not entries:
            raise UserError(f"{annotations}: it has no images{' with objects to learn from' if learnable else ''}")
        self.image_ids = [int(entry["id"]) for entry in entries]
        self.sizes_of = [(int(entry["height"]), int(entry["width"])) for entry in entries]
        self.instances = [found[number] for number in self.image_ids]
        self._files = [str(entry["file_name"]) for entry in entries]
        _check_files(annotations, images, self._files)
        objects = sum(len(each) for each in self.instances)
        self.description = (
            f"{annotations.name}: {len(entries):,} images, {objects:,} objects of {len(names)} categories"
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    def read(self, index: int) -> bytes:
        """The bytes of image `index`; BadImage if it cannot be read or is not of the annotated size."""
        try:
            data = (self._folder / self._files[index]).read_bytes()
        except OSError as error:
            raise BadImage(error.strerror or "cannot be read") from None
        size, annotated = read_size(data), self.sizes_of[index]
        if size != annotated:
            raise BadImage(f"{size[1]}x{size[0]} pixels, but its annotations are for {annotated[1]}x{annotated[0]}")
        return data

    def name(self, index: int) -> str:
        """The image's file name below the folder."""
        return self._files[index]

    def label(self, index: int) -> int | None:
        """None: an image has no one class."""
        return None

    def targets(self, index: int) -> Targets:
        """What is to be learnt of image `index`: no crowds, and no boxes or masks without area."""
        height, width = self.sizes_of[index]
        learnt = [each for each in self.instances[index] if _is_learnable(each)]
        boxes = np.array([_corners(each) for each in learnt], np.float32).reshape(-1, 4)
        masks = [decode_mask(each.mask) for each in learnt]
        return Targets(
            torch.from_numpy(boxes),
            torch.tensor([each.label for each in learnt]),
            torch.from_numpy(np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)),
        )


def decode_mask(mask: Rle) -> NDArray[np.uint8]:
    """A mask's pixels, (H, W) of 0 and 1; ValueError for runs that do not fill it."""
    with warnings.catch_warnings():
        # pycocotools does not follow NumPy 2 in how arrays are asked not to copy.
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept", DeprecationWarning)
        pixels: NDArray[np.uint8] = rle.decode(mask)
    return pixels


def check_same_categories(train: CocoData, val: CocoData) -> None:
    """Refuse data whose categories are not the same, ids and names.

    Raises:
        UserError: they differ.
    """
    here, there = (dict(zip(data.category_ids, data.classes or (), strict=True)) for data in (train, val))
    differing = sorted(number for number in here.keys() | there.keys() if here.get(number) != there.get(number))
    if differing:
        shown = ", ".join(
            f"id {number} is {here.get(number, 'absent')!r} and {there.get(number, 'absent')!r}"
            for number in differing[:3]
        )
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(f"--train and --val differ in their categories: {shown}{more}")


def _tables(path: Path, content: bytes) -> dict[str, list[dict[str, Any]]]:
    """The three lists of an annotation file, the fields of each entry checked for presence and type."""
    try:
        tree = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    for name, fields in _FIELDS.items():
        entries = tree.get(name) if isinstance(tree, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{path}: not COCO's format for instances: it has no list {name!r}")
        numbers = set()
        for place, entry in enumerate(entries):
            for key, kind in fields.items():
                if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                    raise UserError(f"{path}: entry {place} of {name!r} has no usable {key!r}")
            # pycocotools takes an annotation 0 for none at all.
            if entry["id"] in numbers or (name == "annotations" and entry["id"] < 1):
                raise UserError(f"{path}: entry {place} of {name!r} has the id {entry['id']}: wanted unique ids from 1")
            numbers.add(entry["id"])
    return tree  # type: ignore[no-any-return]


def _instances(
    path: Path, tables: Mapping[str, list[dict[str, Any]]], labels: Mapping[int, int]
) -> dict[int, list[Instance]]:
    """The instances of each image id."""
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in tables["images"]}
    found: dict[int, list[Instance]] = {number: [] for number in sizes}
    for entry in tables["annotations"]:
        where = f"{path}: annotation {entry['id']}"
        if entry["image_id"] not in sizes:
            raise UserError(f"{where} is of an image that is not there, id {entry['image_id']}")
        if entry["category_id"] not in labels:
            raise UserError(f"{where} is of a category that is not there, id {entry['category_id']}")
        box = entry["bbox"]
        if len(box) != 4 or not all(isinstance(side, int | float) and math.isfinite(side) for side in box):
            raise UserError(f"{where} has the bbox {box}: wanted x, y, width and height")
        instance = Instance(
            id=entry["id"],
            label=labels[entry["category_id"]],
            box=(float(box[0]), float(box[1]), float(box[2]), float(box[3])),
            area=float(entry["area"]),
            is_crowd=bool(entry["iscrowd"]),
            mask=_mask(entry["segmentation"], sizes[entry["image_id"]], where),
        )
        found[entry["image_id"]].append(instance)
    return found


def _mask(segmentation: Any, size: tuple[int, int], where: str) -> Rle:
    """Polygons, or RLE of either kind, as compressed RLE."""
    try:
        if isinstance(segmentation, list):
            # Points and lines enclose nothing, and four numbers would be taken for a box.
            polygons = [each for each in segmentation if len(each) >= 6]
            if not polygons:
                return _encode(np.zeros(size, np.uint8))
            merged: Rle = rle.merge(rle.frPyObjects(polygons, *size))
            return merged
        counts = segmentation["counts"]
        if list(segmentation["size"]) != list(size):
            raise UserError(f"{where} has a mask of {segmentation['size']} for an image of {list(size)}")
        if isinstance(counts, list):
            if sum(counts) != size[0] * size[1] or min(counts) < 0:
                raise UserError(f"{where} has a mask whose runs do not fill the image")
            converted: Rle = rle.frPyObjects(segmentation, *size)
            return converted
        found = {"size": list(size), "counts": counts.encode("ascii")}
        if decode_mask(found).sum() != rle.area(found):
            raise UserError(f"{where} has a damaged mask")
        return found
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(f"{where} has a segmentation that cannot be read: {error}") from None


def _encode(mask: NDArray[np.uint8]) -> Rle:
    encoded: Rle = rle.encode(np.asfortranarray(mask))
    return encoded


def _corners(instance: Instance) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 of the part of the box that lies in the image."""
    height, width = instance.mask["size"]
    x, y, w, h = instance.box
    return min(max(x, 0.0), width), min(max(y, 0.0), height), min(max(x + w, 0.0), width), min(max(y + h, 0.0), height)


def _is_learnable(instance: Instance) -> bool:
    left, top, right, bottom = _corners(instance)
    # Below a hundredth of a pixel nothing is left once the box is float32.
    has_box = right - left > 0.01 and bottom - top > 0.01
    return not instance.is_crowd and has_box and bool(rle.area(instance.mask) > 0)


def _check_files(annotations: Path, folder: Path, names: list[str]) -> None:
    """Refuse a folder that lacks images; folders are listed once rather than files asked for one by one."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, file = os.path.split(name)
        if parent not in listed:
            below = folder / parent
            listed[parent] = set(os.listdir(below)) if below.is_dir() else set()
        if file not in listed[parent]:
            missing.append(name)
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing):,} of the {len(names):,} images of {annotations}, for example {missing[0]}"
        )
