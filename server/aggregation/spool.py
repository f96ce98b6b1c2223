"""Replies kept on disk, one file each, for aggregators that need all of them, and read in stretches."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically
from lowssl_core.protocol.manifest import FloatArray
from server.aggregation.reply import Screened


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A reply on disk.

    Attributes:
        path: its file.
        factor: what its delta is multiplied by when it is used: clip and discount.
    """

    path: Path
    factor: float


class Spool:
    """A folder with the replies of one try of a round, 4 bytes for each value.

    It begins empty: what an earlier try accepted may be refused in this one, and devices send the same bytes again.
    Replies go by the order of their devices and ids, so what is computed from them does not depend on when they came.

    Args:
        folder: made if it is missing; the spool's alone, all files in it go away.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._kept: dict[tuple[str, str], Kept] = {}
        for path in [path for path in folder.iterdir() if path.is_file()]:
            path.unlink()

    def __iter__(self) -> Iterator[Kept]:
        return (self._kept[key] for key in sorted(self._kept))

    def put(self, reply: Screened) -> None:
        """Keep a reply (array (size,)).

        Raises:
            UserError: it cannot be written, for example because the disk is full; those kept before are untouched.
        """
        values = np.ascontiguousarray(reply.flat, dtype="<f4")
        # An id may hold characters that a file's name may not.
        path = self._folder / hashlib.sha256("\0".join(reply.key).encode()).hexdigest()
        try:
            write_atomically(path, lambda file: file.write(values.data.cast("B")))
        except OSError as error:
            raise UserError(
                f"{self._folder}: a reply of {values.nbytes / 1e6:.1f} MB cannot be kept: {error.strerror}; "
                f"the round's earlier replies ({len(self._kept)}) are untouched"
            ) from None
        self._kept[reply.key] = Kept(path=path, factor=reply.clip * reply.discount)

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
                    got = os.preadv(descriptor, [row.data.cast("B")], 4 * place.start)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise UserError(f"{reply.path}: {error.strerror}") from None
            if got != row.nbytes:
                raise UserError(f"{reply.path}: was cut since its round began")
        return rows
