"""A disk of a few megabytes, really full when it is filled: a file system in memory, mounted without root's rights."""

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_MOUNT = 'mount -t tmpfs -o "size=$2" none "$1" && echo mounted && exec cat'


class SmallDisk:
    """A disk that only programs behind `enter` have mounted; others reach it through the process that holds it.

    Attributes:
        holder: that process.
        path: of its folder, for every program on this machine.
        enter: a command's first words: the program after them has the disk where `path` resolves to.
    """

    def __init__(self, mount: Path, holder: int) -> None:
        self.holder = holder
        self.path = Path(f"/proc/{holder}/root{mount}")
        self.enter = ["nsenter", f"--target={holder}", "--user", "--mount", "--preserve-credentials", "--"]
        self._ballast = self.path / ".ballast"

    def free_bytes(self) -> int:
        space = os.statvfs(self.path)
        return space.f_bavail * space.f_frsize

    def fill(self, spare: int = 0) -> None:
        """Leave so many bytes."""
        with self._ballast.open("ab", buffering=0) as file, contextlib.suppress(_FullError):
            while (left := self.free_bytes() - spare) > 0:
                _write(file.fileno(), bytes(min(left, 1 << 20)))

    def empty(self) -> None:
        """Make room again."""
        self._ballast.unlink(missing_ok=True)


class _FullError(Exception):
    """Nothing more can be written."""


def _write(descriptor: int, data: bytes) -> None:
    try:
        os.write(descriptor, data)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _FullError from None


@contextmanager
def small_disk(mount: Path, size: int, beside: SmallDisk | None = None) -> Iterator[SmallDisk]:
    """Mount a disk of `size` bytes at an empty folder; the test is skipped where the kernel does not allow it.

    Programs behind `enter` of the disk `beside` have both.
    """
    if not all(shutil.which(program) for program in ("unshare", "nsenter", "mount")):
        pytest.skip("a small disk takes unshare, nsenter and mount (util-linux)")
    mount.mkdir(parents=True)
    enter = ["unshare", "--map-root-user", "--mount"] if beside is None else beside.enter
    command = [*enter, "sh", "-c", _MOUNT, "sh", str(mount), str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != b"mounted\n":
            pytest.skip(f"no small disk without root's rights here: {holder.stderr.read().decode().strip()}")
        # What it reads ends on leaving: so does it, and with it the disk.
        yield SmallDisk(mount, holder.pid if beside is None else beside.holder)
