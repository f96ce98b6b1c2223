"""Replies kept on disk, one file each, for aggregators that need all of them: crash-safe, read in stretches."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically
from lowssl_core.protocol.manifest import FloatArray
from server.aggregation.reply import Screened

_SUFFIX = ".reply"
_HEADER = 1024  # JSON, filled up with spaces; the array stands behind it


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A reply on disk.

    Attributes:
        path: its file.
        update_id: its id.
        factor: what its delta is multiplied by when it is used: clip and discount.
    """

    path: Path
    update_id: str
    factor: float


class Spool:
    """A folder with one round's replies, each a header and 4 bytes for each value.

    A file is there whole or not at all (write, fsync, rename): after kill -9 or a power cut, opening the folder finds
    each complete reply and clears away what was half written. Replies go by the order of their ids, so what is
    computed from them does not depend on when they came.

    Args:
        folder: made if it is missing; the spool's alone, all other files in it go away.
        size: values of an array.
        round_id: what the replies belong to; those of another round go away.
    """

    def __init__(self, folder: Path, size: int, round_id: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._size, self._round_id = folder, size, round_id
        self._kept: dict[str, Kept] = {}
        for path in [path for path in folder.iterdir() if path.is_file()]:
            if (kept := self._open(path)) is None:
                path.unlink()
            else:
                self._kept[kept.update_id] = kept

    def __iter__(self) -> Iterator[Kept]:
        return (self._kept[update_id] for update_id in sorted(self._kept))

    def put(self, reply: Screened) -> None:
        """Keep a reply (array (size,)).

        Raises:
            UserError: it cannot be written, for example because the disk is full; those kept before are untouched.
        """
        factor = reply.clip * reply.discount
        header = json.dumps({"round_id": self._round_id, "update_id": reply.update_id, "factor": factor}).encode()
        values = np.ascontiguousarray(reply.flat, dtype="<f4")
        # An id may hold characters that a file's name may not.
        path = self._folder / f"{hashlib.sha256(reply.update_id.encode()).hexdigest()}{_SUFFIX}"

        def write(file: BinaryIO) -> None:
            file.write(header.ljust(_HEADER))
            file.write(values.data.cast("B"))

        try:
            write_atomically(path, write)
        except OSError as error:
            raise UserError(
                f"{self._folder}: a reply of {values.nbytes / 1e6:.1f} MB cannot be kept: {error.strerror}; "
                f"the round's earlier replies ({len(self._kept)}) are untouched"
            ) from None
        self._kept[reply.update_id] = Kept(path=path, update_id=reply.update_id, factor=factor)

    def read(self, place: slice, replies: Sequence[Kept]) -> FloatArray:
        """One stretch of the arrays of `replies` (K, stretch), as they were put.

        By plain reads: a memory map would keep a file descriptor open for each device.

        Raises:
            UserError: a file is gone or was cut since the spool was opened.
        """
        rows = np.empty((len(replies), place.stop - place.start), dtype=np.dtype("<f4"))
        for row, reply in zip(rows, replies, strict=True):
            try:
                descriptor = os.open(reply.path, os.O_RDONLY)
                try:
                    got = os.preadv(descriptor, [row.data.cast("B")], _HEADER + 4 * place.start)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise UserError(f"{reply.path}: {error.strerror}") from None
            if got != row.nbytes:
                raise UserError(f"{reply.path}: was cut since its round began")
        return rows

    def _open(self, path: Path) -> Kept | None:
        """The complete reply of this round that a file is; None for any other file."""
        if path.suffix != _SUFFIX or path.stat().st_size != _HEADER + 4 * self._size:
            return None
        with contextlib.suppress(ValueError, KeyError, TypeError), path.open("rb") as file:
            facts = json.loads(file.read(_HEADER))
            if facts["round_id"] == self._round_id:
                return Kept(path=path, update_id=facts["update_id"], factor=facts["factor"])
        return None
