"""Features of a whole source in files: in bounded memory, written as they come, resumed where they stopped."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowssl_core.errors import UserError
from lowssl_core.evaluation.subjects import Embedder, fingerprint
from lowssl_core.files import write_atomically
from lowssl_core.images import BadImage
from lowssl_core.interruption import Interruption
from lowssl_core.meter import Meter
from lowssl_core.sources import Source
from lowssl_core.sources.memory import read_pixels

# Images between two syncs to the disk: what a killed process does again at most.
BLOCK = 512
BATCH = 64
VALUES, INDICES, STATE = "features.f32", "indices.i64", "state.json"


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of the images of a source that could be read.

    Attributes:
        values: (N, D) float32, mapped from a file: slices are read when they are asked for.
        indices: (N,) which image of the source each row is.
        set_aside: names of the images that could not be read, with the reasons.
        source: where the images come from.
        model: the fingerprint of what made the features.
    """

    values: NDArray[np.float32]
    indices: NDArray[np.int64]
    set_aside: Mapping[str, str]
    source: Source
    model: str

    def labels(self) -> Tensor:
        """(N,) classes; the source has labels."""
        labels = [self.source.label(index) for index in self.indices.tolist()]
        assert all(label is not None for label in labels), "checked before features are made"
        return torch.tensor(labels)

    def names(self) -> Iterator[str]:
        """The images' names, in the order of the rows."""
        return (self.source.name(index) for index in self.indices.tolist())


class FeatureStore:
    """A folder of features; a context manager.

    Each model and source has a folder of its own under it, named by both, so that features are found again and never
    mixed up. Images are told by the data's path, their names and their number, not by their pixels: after replacing
    images in place, give another folder.

    Args:
        folder: where features are kept; None: in a temporary folder that goes at the end.
        workers: threads that read and preprocess images.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None = None, workers: int | None = None) -> None:
        self._folder = folder
        self._workers = workers or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._folder is None:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lowssl-features-")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def features(self, embedder: Embedder, source: Source, *, origin: str, label: str) -> Features:
        """The features of all images of `source`, made or found.

        Args:
            embedder: what makes them.
            source: the images.
            origin: the data's path as the user gave it.
            label: of the progress shown.

        Raises:
            UserError: none of the images can be read, or the folder cannot be written.
            StoppedError: told to stop; what was made is kept.
        """
        assert self._folder is not None, "a FeatureStore is used as a context manager"
        model = fingerprint(embedder)
        folder = self._folder / f"{model}-{_source_fingerprint(source, origin)}"
        state = make_features(folder, embedder, source, workers=self._workers, label=label)
        return read_features(folder, source, embedder.info.width, state, model)


def make_features(folder: Path, embedder: Embedder, source: Source, *, workers: int, label: str) -> dict[str, Any]:
    """Write the features of `source` into `folder`, from where an earlier call was stopped; returns the final state.

    Rows are appended to `features.f32` and their images' numbers to `indices.i64`; after each block both are synced
    and `state.json` says how far they go. What lies behind that is of a block that was not finished, and is cut off.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: not a folder that can be written: {error.strerror}") from None
    state: dict[str, Any] = {"next": 0, "rows": 0, "set_aside": {}}
    if (folder / STATE).exists():
        state = json.loads((folder / STATE).read_text())
    if state["next"] == len(source):
        return state
    width = embedder.info.width
    with (
        Interruption() as asked,
        Meter(label, len(source), "images", done=state["next"]) as meter,
        _open_at(folder / VALUES, state["rows"] * width * 4) as values,
        _open_at(folder / INDICES, state["rows"] * 8) as indices,
    ):
        for block, images in _read_ahead(source, embedder, state["next"], workers):
            good = [index for index, image in zip(block, images, strict=True) if not isinstance(image, BadImage)]
            state["set_aside"] |= {
                source.name(index): image.reason
                for index, image in zip(block, images, strict=True)
                if isinstance(image, BadImage)
            }
            inputs = [image for image in images if not isinstance(image, BadImage)]
            for start in range(0, len(inputs), BATCH):
                rows = embedder.embed_inputs(np.stack(inputs[start : start + BATCH])).numpy()
                if not np.isfinite(rows).all():
                    raise UserError(f"{embedder.info.name}: its features are not all finite: the weights are broken")
                values.write(np.ascontiguousarray(rows, np.float32).tobytes())
            indices.write(np.array(good, np.int64).tobytes())
            for file in (values, indices):
                file.flush()
                os.fsync(file.fileno())
            state |= {"next": block[-1] + 1, "rows": state["rows"] + len(good)}
            text = json.dumps(state).encode()
            write_atomically(folder / STATE, lambda file, text=text: file.write(text))  # type: ignore[misc]
            meter.advance(len(block))
            asked.check()
    return state


def read_features(folder: Path, source: Source, width: int, state: Mapping[str, Any], model: str) -> Features:
    """The finished features in `folder`.

    Raises:
        UserError: not one image could be read.
    """
    rows = state["rows"]
    if rows == 0:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in list(state["set_aside"].items())[:3])
        raise UserError(f"{source.description}: not one image can be read: {reasons}")
    return Features(
        values=np.memmap(folder / VALUES, np.float32, "r", shape=(rows, width)),
        indices=np.fromfile(folder / INDICES, np.int64, count=rows),
        set_aside=state["set_aside"],
        source=source,
        model=model,
    )


def _open_at(path: Path, length: int) -> Any:
    """A file opened for appending, cut to `length` bytes."""
    file = path.open("ab")
    file.truncate(length)
    return file


def _read_ahead(
    source: Source, embedder: Embedder, start: int, workers: int
) -> Iterator[tuple[Sequence[int], list[NDArray[np.uint8] | BadImage]]]:
    """Blocks of numbers and preprocessed images from `start` on, one block read while the one before is embedded."""

    def read(index: int) -> NDArray[np.uint8] | BadImage:
        try:
            return embedder.preprocess(read_pixels(source, index))
        except BadImage as error:
            return error

    def submit(block: range) -> list[Future[NDArray[np.uint8] | BadImage]]:
        return [pool.submit(read, index) for index in block]

    blocks = [range(first, min(first + BLOCK, len(source))) for first in range(start, len(source), BLOCK)]
    with ThreadPoolExecutor(workers) as pool:
        waiting = submit(blocks[0])
        for number, block in enumerate(blocks):
            ready = waiting
            waiting = submit(blocks[number + 1]) if number + 1 < len(blocks) else []
            yield block, [future.result() for future in ready]


def _source_fingerprint(source: Source, origin: str) -> str:
    digest = hashlib.sha256(f"{Path(origin).expanduser().absolute()} {source.description}\n".encode())
    for index in range(len(source)):
        digest.update(f"{source.name(index)}\n".encode())
    return digest.hexdigest()[:16]
