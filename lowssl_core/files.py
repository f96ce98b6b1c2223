"""Writing files so that a reader, or a machine that lost power, sees the old content or the new, never a part."""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}")  # as mkstemp names what is being written


def remove_unfinished(folder: Path) -> None:
    """Remove what `write_atomically` could not remove in a folder, as it was killed; nobody may be writing there now.

    Each may be as large as the file that it would have been, and nothing else ever removes it.
    """
    if folder.is_dir():
        for path in folder.iterdir():
            if _UNFINISHED.fullmatch(path.name) and path.is_file():
                path.unlink()


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `path` by what `write` puts into the binary file it is given: write, fsync, rename.

    The folder is made if it is missing. If `write` raises, `path` is left as it was and nothing stays behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a result is as readable as any file the user creates.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)
