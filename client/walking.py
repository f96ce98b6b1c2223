"""Looking through a folder tree for image files, in memory that does not grow with their number."""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lowssl_core.sources.layout import is_image

_BLOCK = 1 << 20


class File(NamedTuple):
    """A file of the folder as it is now."""

    path: str
    size: int
    modified: int


class Bits:
    """A set of whole numbers that takes one bit for each number up to the largest."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, number: int) -> None:
        """Put a number from 0 in."""
        missing = number // 8 + 1 - len(self._bits)
        if missing > 0:
            self._bits.extend(bytes(max(missing, len(self._bits))))
        self._bits[number // 8] |= 1 << number % 8

    def __contains__(self, number: int) -> bool:
        return number // 8 < len(self._bits) and bool(self._bits[number // 8] >> number % 8 & 1)


def walk(root: Path, unreadable: list[str]) -> Iterator[File]:
    """The image files below `root`, folder by folder, each folder's in the order of names.

    Linked folders are followed, each real folder once. A folder that vanishes or may not be read is passed over: one
    of them must not keep all others from being scanned.

    Args:
        root: the folder.
        unreadable: gets the folders that are there and could not be looked into, as their files' paths begin.
    """
    waiting = [""]
    entered: set[tuple[int, int]] = set()
    while waiting:
        prefix = waiting.pop()
        try:
            status = os.stat(root / prefix)
            names = sorted(os.listdir(root / prefix))
        except FileNotFoundError:
            continue
        except OSError:
            unreadable.append(prefix)
            continue
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        folders: list[str] = []
        for name in names:
            path = prefix + name
            try:
                status = os.stat(root / path)
            except OSError:
                continue
            if stat.S_ISDIR(status.st_mode):
                if not name.startswith("."):
                    folders.append(path + "/")
            elif stat.S_ISREG(status.st_mode) and is_image(path):
                yield File(path, status.st_size, status.st_mtime_ns)
        waiting += reversed(folders)


def hash_file(path: Path) -> bytes:
    """The sha256 of a file's content, read a megabyte at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.digest()
