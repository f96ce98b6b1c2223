"""Reading splits and classes off paths: SPLIT/CLASS/image, CLASS/image, or images in any other folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import PurePath, PurePosixPath

from lowssl_core.errors import UserError

IMAGE_EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
"""Folder names that are splits, and the one name each split goes by."""

ACCEPTED_SPLITS = "train, validation (or val), test"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The images of one split: `chosen` indexes the paths given; labels index `classes`; None: no labels."""

    chosen: tuple[int, ...]
    split: str | None
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None


def is_image(path: str) -> bool:
    """Whether a path, with / between folders, is an image by its extension and no part of it is hidden."""
    parts = path.split("/")
    if parts[0] == "__MACOSX" or any(part.startswith(".") for part in parts):
        return False
    return PurePosixPath(parts[-1]).suffix.lower() in IMAGE_EXTENSIONS


def check_split(split: str | None, available: Sequence[str], origin: str) -> str | None:
    """Return the split to take of those `available` (none: no splits, the whole); UserError if it is not there.

    Without a wish the train split is taken, or the only one.
    """
    if split is None:
        if not available or "train" in available:
            return "train" if available else None
        if len(available) == 1:
            return available[0]
        raise UserError(f"{origin} holds the splits {', '.join(available)} and no train: choose one, PATH::SPLIT")
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown: the accepted ones are {ACCEPTED_SPLITS}")
    if SPLITS[split] not in available:
        held = f"it holds {', '.join(available)}" if available else "it has no train, validation or test folders"
        raise UserError(f"{origin} has no split {split!r}: {held}")
    return SPLITS[split]


def arrange(paths: Sequence[str], split: str | None, origin: str) -> Layout:
    """Find splits and classes in `paths` (with / between folders) and take one split, in the paths' order.

    Splits exist where every path starts with a split's folder (folders that all paths share are skipped first);
    classes where every path is then CLASS/image and there are at least two. Classes are numbered over all splits,
    so that a label means the same in each.

    Raises UserError if a wanted split is not there.
    """
    folders = [path.split("/")[:-1] for path in paths]
    shared = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))]
    skip = next((depth for depth, name in enumerate(shared) if name in SPLITS), len(shared))
    folders = [names[skip:] for names in folders]

    splits: list[str] | None = None
    if folders and all(names and names[0] in SPLITS for names in folders):
        splits = [SPLITS[names[0]] for names in folders]
        folders = [names[1:] for names in folders]
    taken = check_split(split, sorted(set(splits or ())), origin)
    chosen = tuple(i for i in range(len(paths)) if splits is None or splits[i] == taken)

    if all(len(names) == 1 for names in folders):
        classes = tuple(sorted({names[0] for names in folders}))
        if len(classes) >= 2:
            number = {name: i for i, name in enumerate(classes)}
            labels = tuple(number[folders[i][0]] for i in chosen)
            return Layout(chosen=chosen, split=taken, labels=labels, classes=classes)
    return Layout(chosen=chosen, split=taken, labels=None, classes=None)


def describe(origin: str, count: int, split: str | None, classes: Sequence[str] | None) -> str:
    """Say in a few words what was opened: its last name, which split, how many images and classes.

    Descriptions travel in encoders' files, which tell no paths of the machine that made them.
    """
    part = f", split {split}" if split is not None else ""
    labels = f", {len(classes)} classes" if classes is not None else ", no labels"
    return f"{PurePath(origin).name or origin}{part}: {count} images{labels}"
