"""From what a user writes after --data to a source."""

from pathlib import Path

from lowssl_core.errors import UserError
from lowssl_core.sources.layout import ACCEPTED_SPLITS, SPLITS
from lowssl_core.sources.source import Source

NAMES = ("photos", "cifar10", "cifar100")
ACCEPTED = f"a folder of images, a .zip, .tar shards (a pattern or a folder of them), or one of {', '.join(NAMES)}"


def open_source(path: str, *, split: str | None = None) -> Source:
    """Open a folder tree, a zip, tar shards or a named data set; PATH::SPLIT is the same as `split`.

    Where the data has splits and none is asked for, the train split is taken; `source.split` and
    `source.description` say so. A name wins over a folder of the same name: write ./photos for the folder.

    Raises UserError if there is nothing of the kind, nothing in it, or no such split.
    """
    path, split = _separate_split(path, split)
    if not path.strip():
        raise UserError(f"the data path is empty: give {ACCEPTED}")
    if path in NAMES:
        return _open_name(path, split)
    return _open_path(path, split)


def open_held_out(path: str) -> Source:
    """Open the images held out in the data at `path`: its test split or, where there is none, its validation split.

    Raises UserError if it has neither.
    """
    head, _ = _separate_split(path, None)
    for split in ("test", "validation"):
        try:
            return open_source(head, split=split)
        except UserError:
            continue
    raise UserError(f"{path} has no test or validation split: name the images to score on with --eval-data")


def _separate_split(path: str, split: str | None) -> tuple[str, str | None]:
    head, separator, tail = path.rpartition("::")
    if not separator or "/" in tail or tail.endswith((".tar", ".zip")):  # shards may be joined by :: too
        return path, split
    if tail not in SPLITS:
        raise UserError(f"split {tail!r} of {path!r} is unknown: the accepted ones are {ACCEPTED_SPLITS}")
    if split is not None and SPLITS.get(split) != SPLITS[tail]:
        raise UserError(f"{path!r} and split {split!r} ask for different splits: give one of them")
    return head, tail


def _open_name(name: str, split: str | None) -> Source:
    if name == "photos":
        from lowssl_core.photos import open_photos

        return open_photos(split=split)
    from lowssl_core.sources.named import open_named

    return open_named(name, split=split)


def _open_path(text: str, split: str | None) -> Source:
    from lowssl_core.sources.archive import ZipSource
    from lowssl_core.sources.folder import FolderSource
    from lowssl_core.sources.shards import ShardSource

    path = Path(text).expanduser()
    if path.is_dir():
        if any(path.glob("*.tar")):
            return ShardSource(text, split=split)
        return FolderSource(path, split=split)
    if path.is_file():
        if path.suffix.lower() == ".zip":
            return ZipSource(path, split=split)
        if path.suffix.lower() == ".tar":
            return ShardSource(text, split=split)
        raise UserError(f"{path} is a file that cannot be used as data: give {ACCEPTED}")
    if any(sign in text for sign in "*?[{") or "://" in text or "::" in text:
        return ShardSource(text, split=split)
    raise UserError(f"there is no data at {text!r}: give {ACCEPTED}")
