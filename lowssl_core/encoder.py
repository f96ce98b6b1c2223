"""Encoders: a backbone with all that is needed to embed an image, in one file that is checked when read."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowssl_core.backbones import build_backbone
from lowssl_core.checkpoint import backbone_state, load_checkpoint
from lowssl_core.embedding import embed, embed_inputs
from lowssl_core.errors import UserError
from lowssl_core.preprocess import Preprocess
from lowssl_core.tensor_file import TensorFile, read_tensors, write_tensors

FORMAT = "lowssl-encoder-1"
DEFAULT = "default"

Branch = Literal["student", "teacher", "recalibrated"]


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """What an encoder is and where it came from.

    Attributes:
        name: for people.
        backbone: a name that `build_backbone` takes.
        width: how long its features are.
        size: side of its input in pixels.
        resize: short side of an image before the centre square is cut (`Preprocess`).
        method: which method trained it, "" for none.
        recipe_hash: which recipe, "" for none.
        weights_hash: of the stored weights; `save_encoder` and `load_encoder` set it.
        branch: the trained weights, their moving average, or the trained weights with BatchNorm re-estimated.
        images_seen: how many images training took, each epoch anew.
        data: what it was trained on.
        licence: of the weights, "" where nothing was said.
    """

    name: str
    backbone: str
    width: int
    size: int
    resize: int
    method: str = ""
    recipe_hash: str = ""
    weights_hash: str = ""
    branch: Branch = "student"
    images_seen: int = 0
    data: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        if self.branch not in get_args(Branch):
            raise ValueError(f"branch is {self.branch!r}; it is one of {', '.join(get_args(Branch))}")
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if type(value) is not (int if entry.type is int else str):
                raise ValueError(f"{entry.name} is {value!r}, of the wrong type")
        if self.width < 1 or self.images_seen < 0:
            raise ValueError(f"width is {self.width} and images_seen {self.images_seen}; expected from 1 and from 0")
        Preprocess(size=self.size, resize=self.resize)


class Encoder:
    """A backbone in evaluation mode with its preprocessing.

    Args:
        backbone: from (B, 3, size, size) to (B, width); it is put into evaluation mode.
        info: what it is.
    """

    def __init__(self, backbone: nn.Module, info: EncoderInfo) -> None:
        self.backbone = backbone.eval()
        self.info = info
        self.preprocess = Preprocess(size=info.size, resize=info.resize)

    def embed(self, images: Iterable[NDArray[np.uint8]], batch_size: int = 64) -> Tensor:
        """Features (N, width) of (H, W, 3) uint8 images of any sizes: float32, on the CPU, not L2-normalised."""
        return embed(self.backbone, images, self.preprocess, batch_size)

    def embed_inputs(self, inputs: NDArray[np.uint8]) -> Tensor:
        """Features (B, width) of evaluation-style input (B, size, size, 3) uint8, as `preprocess` makes it."""
        return embed_inputs(self.backbone, inputs)

    def to(self, device: torch.device | str) -> "Encoder":
        """The same encoder, moved to `device`."""
        self.backbone.to(device)
        return self


def save_encoder(path: Path, backbone: nn.Module, info: EncoderInfo, half: bool = False) -> EncoderInfo:
    """Write an encoder's file atomically, with `half` in fp16; returns `info` with the hash of the stored weights."""
    state = backbone.state_dict()
    if half:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    facts = dataclasses.asdict(info)
    del facts["weights_hash"]
    return dataclasses.replace(info, weights_hash=write_tensors(path, state, format=FORMAT, facts=facts))


def load_encoder(
    path: str | Path, *, branch: Literal["student", "teacher"] = "student", device: torch.device | str = "cpu"
) -> Encoder:
    """Read an encoder.

    Args:
        path: an encoder's file, a checkpoint of lowssl-pretrain, or "default" for the one that comes with the package.
        branch: which weights of a checkpoint: the trained ones or, where the method has one, their moving average.
        device: where it is to run.

    Raises:
        UserError: no such file, one of another kind, a damaged one, or one whose weights do not fit its backbone.
    """
    if path == DEFAULT:
        packaged = resources.files("lowssl_core") / "weights" / "default.safetensors"
        if not packaged.is_file():
            raise UserError("this installation has no default encoder: give the path of an encoder or a checkpoint")
        with resources.as_file(packaged) as file:
            return load_encoder(file, device=device)
    path = Path(path)
    content = read_tensors(path)
    state, info = _read_encoder(path, content) if content.format == FORMAT else _read_checkpoint(path, branch)
    backbone, width = build_backbone(info.backbone)
    if width != info.width:
        raise UserError(f"{path} says features of {info.backbone} are {info.width} wide; here they are {width}")
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{path}: its weights do not fit the backbone {info.backbone!r}: {reason}") from None
    return Encoder(backbone.to(memory_format=torch.channels_last), info).to(device)


def _read_encoder(path: Path, content: TensorFile) -> tuple[dict[str, Tensor], EncoderInfo]:
    facts: dict[str, Any] = dict(content.facts)
    try:
        info = EncoderInfo(**facts, weights_hash=content.hash)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its description of the encoder cannot be used: {error}") from None
    state = {name: value.float() if value.is_floating_point() else value for name, value in content.tensors.items()}
    return state, info


def _read_checkpoint(path: Path, branch: Literal["student", "teacher"]) -> tuple[dict[str, Tensor], EncoderInfo]:
    checkpoint = load_checkpoint(path)
    recipe, facts = checkpoint.recipe, checkpoint.facts
    _, width = build_backbone(recipe.backbone.name)
    info = EncoderInfo(
        name=path.parent.name,
        backbone=recipe.backbone.name,
        width=width,
        **facts["preprocess"],
        method=recipe.method.name,
        recipe_hash=recipe.hash(),
        branch=branch,
        images_seen=checkpoint.progress.step * recipe.data.batch_size,
        data=facts["data"]["description"],
    )
    return backbone_state(checkpoint, branch), info
