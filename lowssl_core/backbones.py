"""The backbones: modules from images (B, 3, H, W) to features (B, width), from timm by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import timm
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from lowssl_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which backbone is trained.

    Attributes:
        name: a name of `BACKBONES`, or any timm model's.
        drop_path: stochastic depth of the trained network, for models that have it (paper: .1 for ViT-Ti);
            the moving average of a method never drops.
    """

    name: str = "mobilenetv2"
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; it is a probability from 0 to below 1")


def _tiny_resnet(drop_path_rate: float) -> nn.Module:
    return ResNet(
        BasicBlock,  # type: ignore[arg-type]  # timm's annotation asks for an instance, its code for the class
        (1, 1, 1, 1),
        channels=(32, 64, 128, 256),
        num_classes=0,
        zero_init_last=False,
        drop_path_rate=drop_path_rate,
    )


def _tiny_mobilenetv2(drop_path_rate: float) -> nn.Module:
    # MobileNetV2's 17 blocks learn nothing in a few hundred steps, with a stride of 32 or of 8; four blocks do. With a
    # stride of 8 images of 32 px end in maps of 4 x 4 pixels.
    return EfficientNet(
        decode_arch_def(  # type: ignore[no-untyped-call]
            [["ds_r1_k3_s1_c16"], ["ir_r1_k3_s2_e4_c32"], ["ir_r2_k3_s2_e6_c64"]]
        ),
        num_classes=0,
        num_features=384,
        stem_size=16,
        fix_stem=True,
        act_layer=nn.ReLU6,
        drop_path_rate=drop_path_rate,
    )


def _timm(name: str, **options: Any) -> Callable[[float], nn.Module]:
    return lambda drop_path_rate: timm.create_model(
        name, pretrained=False, num_classes=0, drop_path_rate=drop_path_rate, **options
    )


# The paper's residual networks start like torchvision's: no branch begins at zero.
BACKBONES: Mapping[str, Callable[[float], nn.Module]] = MappingProxyType(
    {
        "mobilenetv2": _timm("mobilenetv2_100"),
        "resnet18": _timm("resnet18", zero_init_last=False),
        "resnet34": _timm("resnet34", zero_init_last=False),
        "vit_tiny": _timm("vit_tiny_patch16_224", dynamic_img_size=True),
        "resnet_tiny": _tiny_resnet,
        "mobilenetv2_tiny": _tiny_mobilenetv2,
    }
)


def build_backbone(name: str, drop_path: float = 0.0) -> tuple[nn.Module, int]:
    """Build a backbone with fresh weights; nothing is downloaded.

    Args:
        name: a name of `BACKBONES`, or any timm model's. Two are for images of 32 to 64 px on a CPU: "resnet_tiny"
            has one block a stage and half of ResNet18's width; "mobilenetv2_tiny" has four of MobileNetV2's blocks
            (Sandler et al. 2018, table 2) and a stride of 8.
        drop_path: stochastic depth.

    Returns:
        The module, from (B, 3, H, W) to (B, width), and its width. Vision transformers take any image size
        that is a multiple of their patch size.

    Raises:
        UserError: no such model, or one that does not give a vector for each image.
    """
    module = BACKBONES[name](drop_path) if name in BACKBONES else _any_timm_model(name, drop_path)
    return module, backbone_width(module, name)


def backbone_width(module: nn.Module, name: str) -> int:
    """How long the features of a timm model without its classifier are.

    Raises:
        UserError: the model called `name` does not say.
    """
    width = getattr(module, "head_hidden_size", None) or getattr(module, "num_features", None)
    if not isinstance(width, int):
        raise UserError(f"backbone {name!r} does not say how wide its features are")
    return width


def _any_timm_model(name: str, drop_path: float) -> nn.Module:
    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:5]
        hint = f"; timm has {', '.join(close)}" if close else ""
        raise UserError(f"backbone {name!r} is neither one of {', '.join(BACKBONES)} nor a timm model{hint}")
    # Not every model takes every option: the ones that a size or stochastic depth needs are tried first.
    drop = {"drop_path_rate": drop_path} if drop_path else {}
    attempts: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True, **drop}, drop)
    for options in attempts:
        try:
            return timm.create_model(name, pretrained=False, num_classes=0, **options)
        except TypeError:
            continue
    raise UserError(f"backbone {name!r} has no stochastic depth; leave backbone.drop_path at 0")


def backbone_grid(module: nn.Module) -> int:
    """The number that an image's side must be a multiple of: the patch size of a transformer, else 1."""
    patches = getattr(module, "patch_embed", None)
    size = getattr(patches, "patch_size", None)
    return int(size[0]) if isinstance(size, tuple) else 1
