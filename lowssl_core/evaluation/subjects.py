"""What is judged: the branches of a checkpoint, an encoder, a timm or ONNX model, and the yardsticks beside them."""

import copy
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowssl_core.checkpoint import has_teacher, is_checkpoint
from lowssl_core.encoder import DEFAULT, Encoder, EncoderInfo, load_encoder
from lowssl_core.errors import UserError
from lowssl_core.evaluation.onnx_encoder import OnnxEncoder
from lowssl_core.evaluation.timm_models import load_timm, untrained
from lowssl_core.preprocess import Preprocess
from lowssl_core.quality import centered_pixels
from lowssl_core.recalibration import mixed_batches, recalibrate_batchnorm
from lowssl_core.sources import Source
from lowssl_core.tensor_file import tensors_hash

ACCEPTED = (
    "a checkpoint of lowssl-pretrain, an encoder's file, an .onnx file, default (the encoder that comes with LowSSL), "
    "timm:NAME (published weights) or untrained:NAME (a backbone as it starts)"
)
BranchName = Literal["student", "teacher", "recalibrated"]
BRANCHES: tuple[BranchName, ...] = ("student", "teacher", "recalibrated")
# Images that BatchNorm is re-estimated on, as `lowssl recalibrate` has it.
RECALIBRATION_IMAGES = 4096


class Embedder(Protocol):
    """Whatever turns images into features: an `Encoder`, an `OnnxEncoder`, `PixelEmbedder`."""

    info: EncoderInfo
    preprocess: Preprocess

    def embed_inputs(self, inputs: NDArray[np.uint8]) -> Tensor:
        """Features (B, width), float32 on the CPU, of evaluation-style input (B, size, size, 3)."""


class PixelEmbedder:
    """Raw pixels as features, the yardstick of what needs no learning (`raw_pixels`)."""

    def __init__(self, size: int = 16) -> None:
        self.preprocess = Preprocess(size=size)
        self.info = EncoderInfo(
            name="raw pixels", backbone="pixels", width=3 * size**2, **asdict(self.preprocess), weights_hash="pixels"
        )

    def embed_inputs(self, inputs: NDArray[np.uint8]) -> Tensor:
        """Pixels (B, 3 * size^2) less each image's own mean."""
        return centered_pixels(inputs)


@dataclass(frozen=True)
class Subject:
    """One thing that is judged, and what it is called in tables."""

    name: str
    embedder: Embedder

    @property
    def encoder(self) -> Encoder:
        """The subject as a torch module.

        Raises:
            UserError: it has no weights to train or to hook into (ONNX, pixels).
        """
        if not isinstance(self.embedder, Encoder):
            raise UserError(f"{self.name}: this task needs the network itself; give {ACCEPTED_NETWORKS}")
        return self.embedder


ACCEPTED_NETWORKS = "a checkpoint, an encoder's file, default, timm:NAME or untrained:NAME"


def open_subjects(
    model: str,
    *,
    branches: Sequence[BranchName] = BRANCHES,
    recalibrate_on: Source | None = None,
    device: torch.device | str = "cpu",
    yardsticks: bool = False,
) -> list[Subject]:
    """Open what the user named.

    Args:
        model: see `ACCEPTED`.
        branches: of a checkpoint: those wanted, as far as it has them.
        recalibrate_on: images for the recalibrated student; None: it is left out.
        device: where networks run.
        yardsticks: whether to add the same network untrained, and raw pixels.

    Raises:
        UserError: no such model, or none of the branches.
    """
    path = Path(model)
    if path.suffix.lower() == ".onnx":
        subjects = [Subject("onnx", OnnxEncoder(path))]
    elif model.startswith("timm:"):
        subjects = [Subject(model, load_timm(model.removeprefix("timm:")).to(device))]
    elif model.startswith("untrained:"):
        subjects = [Subject("untrained", untrained(model.removeprefix("untrained:")).to(device))]
    elif model != DEFAULT and not path.exists():
        raise UserError(f"there is no model {model!r}: give {ACCEPTED}")
    else:
        subjects = _branches(model, branches, recalibrate_on, device)
    if yardsticks:
        info = subjects[0].embedder.info
        if not isinstance(subjects[0].embedder, OnnxEncoder):
            subjects.append(Subject("untrained", untrained(info.backbone, like=info).to(device)))
        subjects.append(Subject("raw pixels", PixelEmbedder()))
    return subjects


def open_subject(
    model: str, *, branch: Literal["student", "teacher"] = "student", device: torch.device | str = "cpu"
) -> Subject:
    """Open what the user named, of a checkpoint this `branch`; an encoder's file is what it is.

    Raises:
        UserError: no such model or branch.
    """
    is_file = not model.startswith(("timm:", "untrained:")) and Path(model).suffix.lower() != ".onnx"
    if is_file and (model == DEFAULT or Path(model).exists()):
        encoder = load_encoder(model, branch=branch, device=device)
        return Subject(encoder.info.branch, encoder)
    return open_subjects(model, device=device)[0]


def _branches(
    model: str, wanted: Sequence[BranchName], recalibrate_on: Source | None, device: torch.device | str
) -> list[Subject]:
    """The branches of a checkpoint, or an encoder's file under the name of its own branch."""
    student = load_encoder(model, device=device)
    subjects = [Subject(student.info.branch, student)]
    if model != DEFAULT and is_checkpoint(Path(model)) and has_teacher(Path(model)):
        subjects.append(Subject("teacher", load_encoder(model, branch="teacher", device=device)))
    if recalibrate_on is not None and student.info.branch == "student" and "recalibrated" in wanted:
        encoder = Encoder(copy.deepcopy(student.backbone), student.info)
        batches = mixed_batches(recalibrate_on, encoder, limit=RECALIBRATION_IMAGES)
        if recalibrate_batchnorm(encoder.backbone, batches).layers:
            info = dataclasses.replace(student.info, branch="recalibrated", weights_hash=tensors_hash(_state(encoder)))
            subjects.append(Subject("recalibrated", Encoder(encoder.backbone, info)))
    kept = [subject for subject in subjects if subject.name in wanted]
    if not kept:
        held = ", ".join(subject.name for subject in subjects)
        raise UserError(f"{model} has no {' or '.join(wanted)}: it has {held}")
    return kept


def fingerprint(embedder: Embedder) -> str:
    """Sixteen hexadecimal digits that tell a model with its preprocessing from any other."""
    info = embedder.info
    if isinstance(embedder, Encoder) and not info.weights_hash:
        weights = tensors_hash(_state(embedder))
    else:
        weights = info.weights_hash
    text = f"{info.backbone} {weights} {info.branch} {info.size} {info.resize}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _state(encoder: Encoder) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous() for name, value in encoder.backbone.state_dict().items()}


def check_same_classes(train: Source, test: Source) -> None:
    """Refuse data that cannot be scored.

    Raises:
        UserError: labels are missing, or the two have different classes.
    """
    for name, source in (("--data", train), ("--eval-data", test)):
        if source.classes is None:
            raise UserError(
                f"{name}: {source.description}: this task needs labels: class folders (CLASS/image) or shards with .cls"
            )
    assert train.classes is not None
    assert test.classes is not None
    if train.classes != test.classes:
        here, there = set(train.classes), set(test.classes)
        raise UserError(
            f"--data and --eval-data have different classes: {_some(here - there)} only in --data, "
            f"{_some(there - here)} only in --eval-data"
        )


def _some(names: Iterable[str], most: int = 5) -> str:
    listed = sorted(names)
    if not listed:
        return "none"
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
