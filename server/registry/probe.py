"""The images that the gate looks at, and what an exported encoder makes of them."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch.nn import functional as F  # noqa: N812

from lowssl_core.errors import UserError
from lowssl_core.evaluation.subjects import check_same_classes
from lowssl_core.export.checks import GraphRunner, check_structure, features_in_mixed_batches
from lowssl_core.export.description import Description
from lowssl_core.images import Pixels
from lowssl_core.neighbors import knn_accuracy
from lowssl_core.photos import open_photos
from lowssl_core.quality import label_free_quality, retrieval_copies, retrieval_recall
from lowssl_core.sources import open_source
from lowssl_core.sources.memory import load_images
from lowssl_core.sources.opening import open_held_out

# Fewer images than the narrowest backbone is wide, so that the rank of all is limited by the same number.
MOST_IMAGES = 128
LEAST_IMAGES = 16
COPIES = 2
# No encoder looks at more than that, and large photographs would take long to copy.
SHORT_SIDE = 512
BATCH = 48
# What is measured, for the hash: figures of another definition must not be compared.
MEASURES = b"1"
NEIGHBORS = 20
MOST_BANK, MOST_QUERIES = 1000, 500


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Images without labels.

    Attributes:
        images: (H, W, 3) uint8 each.
        description: what they are, with a hash of their pixels.
    """

    images: Sequence[Pixels]
    description: str


@dataclass(frozen=True, kw_only=True)
class LabelledProbe:
    """Images with labels: some to learn from, others to ask about.

    Attributes:
        bank: (H, W, 3) uint8 each.
        bank_labels: one for each.
        queries: held out.
        query_labels: one for each.
        description: what they are, with a hash of their pixels.
    """

    bank: Sequence[Pixels]
    bank_labels: Sequence[int]
    queries: Sequence[Pixels]
    query_labels: Sequence[int]
    description: str


def open_probe(path: Path | None) -> Probe:
    """The first images of a draw by seed 0 from `path`; None: from the held-out tiles of the packaged photographs.

    Raises:
        UserError: no such images, or fewer than 16 that can be read.
    """
    source = open_photos(split="test") if path is None else open_source(str(path))
    images, _, _ = load_images(source, shrink_to=SHORT_SIDE, limit=MOST_IMAGES)
    if len(images) < LEAST_IMAGES:
        raise UserError(f"probe {path}: {len(images)} readable images; judging takes {LEAST_IMAGES} or more")
    return Probe(images=images, description=f"{len(images)} of {source.description} ({_hash(images)})")


def open_labelled_probe(path: Path) -> LabelledProbe:
    """Images from the train and the held-out split of class folders, drawn by seed 0.

    Raises:
        UserError: no such images, no splits, no labels, or classes that differ.
    """
    try:
        train, held_out = open_source(str(path)), open_held_out(str(path))
        check_same_classes(train, held_out)
    except UserError as error:
        raise UserError(f"probe_labelled {path}: {error}") from None
    bank, bank_labels, _ = load_images(train, shrink_to=SHORT_SIDE, limit=MOST_BANK)
    queries, query_labels, _ = load_images(held_out, shrink_to=SHORT_SIDE, limit=MOST_QUERIES)
    if not bank_labels or not query_labels:
        raise UserError(f"probe_labelled {path}: no readable images in one of its splits")
    return LabelledProbe(
        bank=bank,
        bank_labels=bank_labels,
        queries=queries,
        query_labels=query_labels,
        description=f"{len(bank)} and {len(queries)} of {train.description} ({_hash([*bank, *queries])})",
    )


class ExportedEncoder:
    """An exported file, checked and ready to look at images.

    Args:
        path: the file, of any name.
        description: what it should be.

    Raises:
        UserError: it cannot be loaded, or is not what the description says.
    """

    def __init__(self, path: Path, description: Description) -> None:
        try:
            model = onnx.load_model_from_string(path.read_bytes())
            self._runner = GraphRunner(model)
        except OSError:
            raise
        except Exception as error:  # protobuf and ONNX Runtime have classes of their own for broken files
            raise UserError(f"the file cannot be loaded: {first_line(error)}") from None
        check_structure(model, description)
        properties = {entry.key: entry.value for entry in model.metadata_props}
        found = Description.from_properties(properties, of="the file")
        if replace(found, version=description.version) != description:
            raise UserError("the file's metadata are not those in the registry")
        self._preprocess = description.preprocess

    def embed(self, images: Iterable[Pixels]) -> NDArray[np.float32]:
        """Features (N, width) of images (H, W, 3) of any sizes.

        Raises:
            UserError: the graph cannot be run, or its outputs are not finite or not of length 1 where they should be.
        """
        rows: list[NDArray[np.float32]] = []
        inputs = map(self._preprocess, images)
        while batch := list(islice(inputs, BATCH)):
            try:
                rows.append(features_in_mixed_batches(self._runner, np.stack(batch)).numpy())
            except UserError:
                raise
            except Exception as error:  # ONNX Runtime's
                raise UserError(f"the graph cannot be run: {first_line(error)}") from None
        return np.concatenate(rows)


def measure(encoder: ExportedEncoder, probe: Probe) -> dict[str, float]:
    """`label_free_quality` with two copies of each image, with two differences.

    "retrieval" is the mean over both copies, which is steadier than that of the first; "relative_alignment" is the mean
    squared distance of two copies over that of two different images, of features at length 1: 0 where copies do not
    move features, 1 where they move them as far as other images are. Alignment alone is best where all is collapsed.

    Raises:
        UserError: see `ExportedEncoder.embed`.
    """
    features = encoder.embed(probe.images)
    copies = np.stack([encoder.embed(retrieval_copies(probe.images, seed)) for seed in range(COPIES)], axis=1)
    figures = label_free_quality(features, copies)
    figures["retrieval"] = sum(retrieval_recall(features, copies[:, copy]) for copy in range(COPIES)) / COPIES
    # Twice the variance of a point is the mean squared distance of two.
    units = F.normalize(torch.from_numpy(features).double(), dim=1)
    apart = 2 * float(units.var(dim=0).sum())
    figures["relative_alignment"] = figures["alignment"] / apart if apart > 0 else 1.0
    return {name: figure for name, figure in figures.items() if math.isfinite(figure)}


def measure_knn(encoder: ExportedEncoder, probe: LabelledProbe) -> float:
    """The share of the queries whose class wins the vote of their 20 nearest in the bank.

    Raises:
        UserError: see `ExportedEncoder.embed`.
    """
    bank, queries = encoder.embed(probe.bank), encoder.embed(probe.queries)
    bank_labels, query_labels = torch.tensor(probe.bank_labels), torch.tensor(probe.query_labels)
    return knn_accuracy(bank, bank_labels, queries, query_labels, k=NEIGHBORS)


def first_line(error: Exception) -> str:
    """What an error says, shortly."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _hash(images: Iterable[Pixels]) -> str:
    digest = hashlib.sha256(MEASURES)
    for image in images:
        digest.update(str(image.shape).encode() + image.tobytes())
    return digest.hexdigest()[:12]
