"""A zip of images, read in place without unpacking."""

import os
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from lowssl_core.errors import UserError
from lowssl_core.images import BadImage
from lowssl_core.sources.layout import IMAGE_EXTENSIONS, arrange, describe, is_image
from lowssl_core.sources.source import Image, Source


class ZipSource(Source):
    """The images of a zip, in the order of their paths; each process opens the file for itself."""

    def __init__(self, path: Path, *, split: str | None = None) -> None:
        try:
            with ZipFile(path) as archive:
                paths = sorted({name for name in archive.namelist() if is_image(name)})
        except (BadZipFile, OSError) as error:
            raise UserError(f"{path} cannot be read as a zip: {error}") from error
        if not paths:
            extensions = " ".join(sorted(IMAGE_EXTENSIONS))
            raise UserError(f"{path} holds no images (looked for {extensions}, in all its folders)")
        layout = arrange(paths, split, str(path))
        self._path = path
        self._names = tuple(paths[i] for i in layout.chosen)
        self._labels = layout.labels
        self.split = layout.split
        self.classes = layout.classes
        self.description = describe(str(path), len(self._names), self.split, self.classes)
        self._archive: ZipFile | None = None
        self._process = -1

    def __len__(self) -> int:
        return len(self._names)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_archive": None, "_process": -1}

    def _opened(self) -> ZipFile:
        # A forked process shares its parent's file position, so an inherited handle is never used.
        if self._archive is None or self._process != os.getpid():
            self._archive = ZipFile(self._path)
            self._process = os.getpid()
        return self._archive

    def read(self, index: int) -> Image:
        """Return the member's bytes; BadImage if it is damaged, encrypted or packed in an unknown way."""
        try:
            return self._opened().read(self._names[index])
        except (BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
            raise BadImage(f"cannot be read from the zip: {error}") from error

    def name(self, index: int) -> str:
        """Return the path in the zip."""
        return self._names[index]

    def label(self, index: int) -> int | None:
        """Return the number of the image's class folder, or None without class folders."""
        return None if self._labels is None else self._labels[index]
