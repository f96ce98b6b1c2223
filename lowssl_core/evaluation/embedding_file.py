"""Embeddings of a source as one file, Parquet, npy or CSV, with the images' paths and the model's fingerprint."""

import csv
import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np

from lowssl_core.errors import UserError
from lowssl_core.evaluation.features import Features, FeatureStore
from lowssl_core.evaluation.subjects import Embedder
from lowssl_core.files import write_atomically
from lowssl_core.sources import Source

# Rows written at a time.
ROWS = 4096


def write_embeddings(path: Path, embedder: Embedder, source: Source, *, origin: str) -> Features:
    """Embed all images of `source` and write the file that `path` names by its ending.

    Embeddings are kept in a folder beside the file, `path` with `.partial` behind it, until the file is whole: a call
    that was stopped or killed goes on from there, with the same model and data. Memory does not grow with their number.

    Args:
        path: .parquet, .npy or .csv.
        embedder: what makes the features, float32, not L2-normalised.
        source: the images; those that cannot be read are left out (`Features.set_aside`).
        origin: the data's path as the user gave it.

    Raises:
        UserError: another ending, a folder that cannot be written, no image that can be read, or no pyarrow.
        StoppedError: told to stop.
    """
    write = writer_for(path)
    partial = path.with_name(f"{path.name}.partial")
    with FeatureStore(partial) as store:
        features = store.features(embedder, source, origin=origin, label=f"embedding {source.description}")
        write(path, features)
    shutil.rmtree(partial, ignore_errors=True)
    return features


def writer_for(path: Path) -> Callable[[Path, Features], None]:
    """The function that writes the format of `path`.

    Raises:
        UserError: an ending that is not known, or no pyarrow for Parquet.
    """
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; give the file to write")
    if path.suffix.lower() not in WRITERS:
        raise UserError(f"--out {path}: wanted a name that ends in {', '.join(WRITERS)}")
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401 - missing, it is missed before the work and not after
        except ImportError:
            raise UserError(f"--out {path}: Parquet takes pyarrow: pip install 'lowssl[evaluation]'") from None
    return WRITERS[path.suffix.lower()]


def _write_parquet(path: Path, features: Features) -> None:
    """Columns path, model and embedding (a list of fixed length, float32); the fingerprint also in the metadata."""
    import pyarrow as pa
    from pyarrow import parquet

    width = features.values.shape[1]
    columns = [
        ("path", pa.string()),
        ("model", pa.dictionary(pa.int8(), pa.string())),
        ("embedding", pa.list_(pa.float32(), width)),
    ]
    schema = pa.schema(columns, metadata={"lowssl.model": features.model})

    def write(file: BinaryIO) -> None:
        names = features.names()
        with parquet.ParquetWriter(file, schema) as writer:
            for start in range(0, len(features.values), ROWS):
                rows = features.values[start : start + ROWS]
                path_column = pa.array([next(names) for _ in rows], pa.string())
                model_column = pa.array([features.model] * len(rows), pa.string()).dictionary_encode()
                vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(rows).reshape(-1)), width)
                batch = [path_column, model_column.cast(columns[1][1]), vectors]
                writer.write_table(pa.Table.from_arrays(batch, schema=schema))

    write_atomically(path, write)


def _write_npy(path: Path, features: Features) -> None:
    """An (N, D) float32 array; beside it, `path` with .json behind it, the fingerprint and the paths, row by row."""

    def write(file: BinaryIO) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": features.values.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(features.values), ROWS):
            file.write(np.ascontiguousarray(features.values[start : start + ROWS], "<f4").tobytes())

    def write_names(file: BinaryIO) -> None:
        file.write(f'{{"model": {json.dumps(features.model)}, "paths": [\n'.encode())
        for row, name in enumerate(features.names()):
            file.write(((",\n" if row else "") + json.dumps(name)).encode())
        file.write(b"\n]}\n")

    # The names first: whoever sees the array finds them beside it.
    write_atomically(path.with_name(f"{path.name}.json"), write_names)
    write_atomically(path, write)


def _write_csv(path: Path, features: Features) -> None:
    """A header and a line an image: path, model, then the numbers, e0 and on, with all the digits of float32."""

    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["path", "model", *(f"e{column}" for column in range(features.values.shape[1]))])
        for name, values in zip(features.names(), features.values, strict=True):
            rows.writerow([name, features.model, *(f"{value:.9g}" for value in values.tolist())])
        text.detach()

    write_atomically(path, write)


WRITERS: Mapping[str, Callable[[Path, Features], None]] = MappingProxyType(
    {".parquet": _write_parquet, ".npy": _write_npy, ".csv": _write_csv}
)
