"""A folder tree of images, with or without split and class folders."""

import os
from collections import deque
from pathlib import Path

from lowssl_core.errors import UserError
from lowssl_core.images import BadImage
from lowssl_core.sources.layout import IMAGE_EXTENSIONS, arrange, describe, is_image
from lowssl_core.sources.source import Image, Source


def list_images(root: Path) -> list[str]:
    """Return the images under `root`, sorted, relative to it and with / between folders.

    Linked folders are followed, each real folder once, so that a link to a parent is no endless tree.
    """
    found: list[str] = []
    waiting = deque([("", root)])
    seen: set[tuple[int, int]] = set()
    while waiting:
        prefix, folder = waiting.popleft()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            relative = prefix + entry.name
            if entry.is_dir():
                if not entry.name.startswith("."):
                    # Linked folders wait for all real ones: an image keeps the name it has without links.
                    wait = waiting.append if entry.is_symlink() else waiting.appendleft
                    wait((relative + "/", Path(entry.path)))
            elif is_image(relative):
                found.append(relative)
    return sorted(found)


class FolderSource(Source):
    """The images under a folder, in the order of their paths; files are opened when they are read."""

    def __init__(self, root: Path, *, split: str | None = None) -> None:
        try:
            paths = list_images(root)
        except OSError as error:
            raise UserError(f"folder {root} cannot be read: {error.strerror} ({error.filename})") from error
        if not paths:
            extensions = " ".join(sorted(IMAGE_EXTENSIONS))
            raise UserError(f"folder {root} holds no images (looked for {extensions}, in all its folders)")
        layout = arrange(paths, split, f"folder {root}")
        self._root = root
        self._names = tuple(paths[i] for i in layout.chosen)
        self._labels = layout.labels
        self.split = layout.split
        self.classes = layout.classes
        self.description = describe(str(root), len(self._names), self.split, self.classes)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Image:
        """Return the file's bytes; BadImage if it is gone, forbidden or on a damaged disk."""
        try:
            return (self._root / self._names[index]).read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error

    def name(self, index: int) -> str:
        """Return the path relative to the folder."""
        return self._names[index]

    def label(self, index: int) -> int | None:
        """Return the number of the image's class folder, or None without class folders."""
        return None if self._labels is None else self._labels[index]
