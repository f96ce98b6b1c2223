"""timm models as encoders: with the weights they were published with, or untrained as a yardstick."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from lowssl_core.backbones import BACKBONES, backbone_width, build_backbone
from lowssl_core.encoder import Encoder, EncoderInfo
from lowssl_core.errors import UserError
from lowssl_core.preprocess import Preprocess
from lowssl_core.tensor_file import tensors_hash
from lowssl_core.views import IMAGENET_MEAN, IMAGENET_STD

WEIGHTS_FILE = "model.safetensors"


def load_timm(name: str) -> Encoder:
    """A timm model with its published weights, its own input size and normalization.

    Nothing is downloaded: the weights are those in the local cache of huggingface_hub.

    Raises:
        UserError: no such model, no published weights, or weights that are not on this machine.
    """
    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:5]
        raise UserError(f"timm has no model {name!r}" + (f"; it has {', '.join(close)}" if close else ""))
    published = timm.get_pretrained_cfg(name)
    repository = published.hf_hub_id if published is not None else None
    if published is None or not repository:
        raise UserError(f"timm has no published weights of {name!r}; untrained:{name} is the network as it starts")
    if repository.endswith("/"):
        repository += f"{published.architecture}.{published.tag}"
    path = try_to_load_from_cache(repository, WEIGHTS_FILE)
    if not isinstance(path, str):
        raise UserError(
            f"the weights of timm:{name} are not on this machine, and nothing is downloaded by itself; fetch them: "
            f"hf download {repository} {WEIGHTS_FILE}"
        )
    try:
        backbone = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": path})
    except RuntimeError as error:
        raise UserError(f"timm:{name}: the weights in {Path(path).name} do not fit: {error}") from None
    config = resolve_model_data_config(backbone)  # type: ignore[no-untyped-call]
    renormalize(backbone, config["mean"], config["std"])
    state = {key: value.contiguous() for key, value in backbone.state_dict().items()}
    info = EncoderInfo(
        name=f"timm {name}",
        backbone=name,
        width=backbone_width(backbone, name),
        **asdict(_preprocess(config)),
        weights_hash=tensors_hash(state),
        data=str(published.tag or ""),
    )
    return Encoder(backbone.to(memory_format=torch.channels_last), info)


def untrained(name: str, *, like: EncoderInfo | None = None, seed: int = 0) -> Encoder:
    """A backbone with the weights it starts from.

    Args:
        name: as `build_backbone` takes it.
        like: whose preprocessing it has; None: the input size that timm has for the model, 224 otherwise.
        seed: of the weights.

    Raises:
        UserError: no such backbone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone, width = build_backbone(name)
    if like is not None:
        preprocess = Preprocess(size=like.size, resize=like.resize)
    elif name in BACKBONES:
        preprocess = Preprocess(size=224)
    else:
        preprocess = _preprocess(resolve_model_data_config(backbone))  # type: ignore[no-untyped-call]
    state = {key: value.contiguous() for key, value in backbone.state_dict().items()}
    info = EncoderInfo(
        name=f"untrained {name}", backbone=name, width=width, **asdict(preprocess), weights_hash=tensors_hash(state)
    )
    return Encoder(backbone.to(memory_format=torch.channels_last), info)


def renormalize(backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Let a network that was trained with another normalization take input normalized as LowSSL does.

    Its first convolution changes what reaches it. Padding comes after that, so that borders stay as they were.
    """
    if tuple(mean) == IMAGENET_MEAN and tuple(std) == IMAGENET_STD:
        return
    here_mean, here_std, there_mean, there_std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD, mean, std)
    )
    scale, shift = here_std / there_std, (here_mean - there_mean) / there_std

    def change(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        images = inputs[0]
        return (images * scale.to(images) + shift.to(images), *inputs[1:])

    first = next(part for part in backbone.modules() if isinstance(part, nn.Conv2d) and part.in_channels == 3)
    first.register_forward_pre_hook(change)


def _preprocess(config: dict[str, Any]) -> Preprocess:
    size = int(config["input_size"][-1])
    return Preprocess(size=size, resize=round(size / config["crop_pct"]))
