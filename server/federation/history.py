"""The rounds completed so far, on disk: each one's model and how it came about, whole or not at all."""

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically
from lowssl_core.protocol import BadUpdate
from lowssl_core.protocol.manifest import FloatArray, Manifest

_MODEL, _CARRIED, _RECORD, _MANIFEST, _RUN = "model.f32", "carried.f32", "round.json", "manifest.json", "run"


@dataclass(frozen=True, kw_only=True)
class Record:
    """How a version of the model came about.

    Attributes:
        version: 0 for the model that the federation began with, then one more for each completed round.
        started: when the round began, ISO 8601, UTC.
        seconds: it took.
        asked: devices that were sent the task.
        accepted: for each reply that counts: device, update_id, weight, staleness, clip, remarks and its metrics.
        rejected: for each that does not: device, update_id, reason, detail.
        failed: devices that sent none, and why.
        bytes_down: of all tasks together.
        bytes_up: of all replies together.
        epsilon: spent so far; None without differential privacy.
    """

    version: int
    started: str = ""
    seconds: float = 0.0
    asked: tuple[str, ...] = ()
    accepted: tuple[Mapping[str, Any], ...] = ()
    rejected: tuple[Mapping[str, Any], ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    epsilon: float | None = None


@dataclass(frozen=True)
class Completed:
    """A completed round, and all that the next one starts from.

    Attributes:
        record: how it came about.
        flat: (size,) the model.
        carried: what the aggregator hands on; None: nothing.
        screening: what screening hands on, plain values.
    """

    record: Record
    flat: FloatArray = field(repr=False)
    carried: FloatArray | None = field(default=None, repr=False)
    screening: Mapping[str, Any] | None = field(default=None, repr=False)


class History:
    """The rounds below a folder, `rounds/000012/` each.

    A round's record is written last, and names the hashes of what lies beside it: a round without a record, or with
    files that are not the record's, has not happened.

    Attributes:
        manifest: of the model.
        run: the federation's own id, made when it began.

    Raises:
        UserError: the folder holds no federation, or its manifest cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "rounds"
        try:
            self.manifest = Manifest.from_json((self._folder / _MANIFEST).read_text())
            self.run = (self._folder / _RUN).read_text()
        except FileNotFoundError:
            raise UserError(f"{folder} holds no federation; begin one first") from None
        except BadUpdate as error:
            raise UserError(f"{self._folder / _MANIFEST}: {error}") from None

    @classmethod
    def begin(cls, folder: Path, manifest: Manifest, flat: FloatArray) -> "History":
        """Start a federation from a model (size,), unless the folder holds one that starts from the same model.

        Raises:
            UserError: the folder holds another federation.
        """
        rounds = folder / "rounds"
        if (rounds / _MANIFEST).exists():
            history = cls(folder)
            start = history.load(0)
            if history.manifest != manifest or start is None or not np.array_equal(start.flat, flat):
                raise UserError(f"{folder} holds another federation; give another folder or remove it")
            return history
        if rounds.exists():  # a beginning that was cut off
            shutil.rmtree(rounds)
        _save(rounds / _name(0), Completed(Record(version=0), flat))
        write_atomically(rounds / _RUN, lambda file: file.write(secrets.token_hex(8).encode()))
        write_atomically(rounds / _MANIFEST, lambda file: file.write(manifest.to_json().encode()))
        return cls(folder)

    def newest(self) -> int:
        """The newest version by its record's name alone, whose files nobody has looked at; `last` does."""
        return max(self._versions(), default=0)

    def last(self) -> Completed:
        """The last round that is whole.

        Raises:
            UserError: none is.
        """
        for version in reversed(self._versions()):
            if (completed := self.load(version)) is not None:
                return completed
        raise UserError(f"{self._folder} holds no round that is whole")

    def load(self, version: int) -> Completed | None:
        """A round; None if it is not there, or not whole. What it carried on is given of the last two alone."""
        folder = self._folder / _name(version)
        try:
            tree = json.loads((folder / _RECORD).read_text())
            flat = _read(folder / _MODEL, tree["model"])
            is_last = not (self._folder / _name(version + 2) / _RECORD).exists()  # or last but one: see `save`
            is_carried = tree["carried"] is not None and is_last
            carried = _read(folder / _CARRIED, tree["carried"]) if is_carried else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if flat.shape != (self.manifest.size,):
            return None
        return Completed(_record(tree["record"]), flat, carried, tree["screening"])

    def has_model(self, version: int) -> bool:
        """Whether a round's model is there, whole or not; `prune` removes old ones."""
        return (self._folder / _name(version) / _MODEL).exists()

    def prune(self, before: int) -> None:
        """Remove the models of rounds before one, which nothing goes on from any more; their records stay.

        The model that the federation began with stays: it tells one federation from another.
        """
        for version in self._versions():
            if 0 < version < before:
                (self._folder / _name(version) / _MODEL).unlink(missing_ok=True)

    def records(self, last: int | None = None) -> list[Record]:
        """How each version came about, in order; of the last so many alone, as there may be thousands."""
        versions = self._versions() if last is None else self._versions()[-last:]
        found = [self.record(version) for version in versions]
        return [record for record in found if record is not None]

    def record(self, version: int) -> Record | None:
        """How a version came about; None if it is not there, or cut: its round has not happened."""
        try:
            return _record(json.loads((self._folder / _name(version) / _RECORD).read_text())["record"])
        except (FileNotFoundError, ValueError):
            return None

    def save(self, completed: Completed) -> None:
        """Write a round down.

        Raises:
            OSError: the disk is full or broken; the round has not happened.
        """
        _save(self._folder / _name(completed.record.version), completed)
        # Only the last round is gone on from; one more is kept in case its files turn out to be broken.
        (self._folder / _name(completed.record.version - 2) / _CARRIED).unlink(missing_ok=True)

    def _versions(self) -> list[int]:
        return sorted(int(path.parent.name) for path in self._folder.glob(f"[0-9]*/{_RECORD}"))


def _name(version: int) -> str:
    return f"{version:06}"


def _save(folder: Path, completed: Completed) -> None:
    (folder / _RECORD).unlink(missing_ok=True)
    arrays = {"model": (_MODEL, completed.flat), "carried": (_CARRIED, completed.carried)}
    hashes: dict[str, str | None] = {}
    for key, (name, array) in arrays.items():
        hashes[key] = None if array is None else _write(folder / name, array)
    tree = {"record": asdict(completed.record), "screening": completed.screening, **hashes}
    text = json.dumps(tree, allow_nan=False, indent=1)
    write_atomically(folder / _RECORD, lambda file: file.write(text.encode()))


def _write(path: Path, array: FloatArray) -> str:
    data = array.astype("<f4").tobytes()
    write_atomically(path, lambda file: file.write(data))
    return hashlib.sha256(data).hexdigest()


def _read(path: Path, expected: str) -> FloatArray:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != expected:
        raise ValueError(f"{path} is not what was written")
    return np.frombuffer(data, "<f4").astype(np.float32)


def _record(tree: dict[str, Any]) -> Record:
    lists = {name: tuple(tree[name]) for name in ("asked", "accepted", "rejected")}
    return Record(**tree | lists)
