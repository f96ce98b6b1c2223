"""The detector: a Mask R-CNN with a feature pyramid on the four stages of a backbone."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from lowssl_core.compute import synchronise_batchnorm
from lowssl_core.distributed import mean_over_ranks, world_size
from lowssl_core.errors import UserError
from lowssl_core.views import IMAGENET_MEAN, IMAGENET_STD

STRIDES = (4, 8, 16, 32)
# The pyramid has one level more than the backbone has stages.
NUM_LEVELS = len(STRIDES) + 1
ASPECT_RATIOS = (0.5, 1.0, 2.0)
BOX_CELLS, MASK_CELLS = 7, 14
# Regions of 7 times the smallest anchor's side (224 pixels where that is 32, as in FPN) are read from P4.
CANONICAL_ANCHORS, CANONICAL_LEVEL = 7, 4


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The detector around the backbone. The defaults are Mask R-CNN's with FPN (He et al. 2017; Lin et al. 2017).

    Attributes:
        short_side: to which images are resized, in pixels,
        long_side: unless the long side would then be longer than this.
        smallest_anchor: side of the anchors of the finest level, in pixels of the resized image; each level doubles it.
        channels: of the pyramid and the mask head.
        hidden: of the box head's two layers.
        proposals: regions kept of an image for the heads.
        regions: of those, how many of an image the box head learns from; a quarter of them show an object.
        detections: at most of one image.
    """

    short_side: int = 800
    long_side: int = 1333
    smallest_anchor: int = 32
    channels: int = 256
    hidden: int = 1024
    proposals: int = 1000
    regions: int = 512
    detections: int = 100

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it is a whole number from 1")
        if self.long_side < self.short_side:
            raise ValueError(f"long_side is {self.long_side}, shorter than short_side ({self.short_side})")


class Pyramid(nn.Module):
    """A feature pyramid on the stages of an encoder's backbone: (B, 3, H, W) to five maps of strides 4 to 64.

    The maps C2 to C4 are what the backbone's stages give at strides 4, 8 and 16. C5 is the last map of its
    classification path, whose average is the encoder's feature: for MobileNetV2 after the last 1 x 1 convolution.

    Args:
        backbone: of timm, with `forward_intermediates`; it stays as it is, under the name "backbone".
        width: of its features, and so of C5.
        channels: of every map of the pyramid.

    Raises:
        UserError: the backbone has no such stages.
    """

    def __init__(self, backbone: nn.Module, width: int, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        reductions = [stage["reduction"] for stage in _stages(backbone)]
        self._indices = [reductions.index(stride) for stride in STRIDES[:-1]]
        widths = [stage["num_chs"] for stage in _stages(backbone)]
        self.fpn = FeaturePyramidNetwork(
            [*(widths[index] for index in self._indices), width],
            channels,
            extra_blocks=LastLevelMaxPool(),
            norm_layer=nn.BatchNorm2d,
        )
        self.out_channels = channels

    def stages(self, images: Tensor) -> list[Tensor]:
        """The backbone's maps C2 to C5 of normalized images (B, 3, H, W)."""
        last, maps = self.backbone.forward_intermediates(images, indices=self._indices)  # type: ignore[operator]
        return [*maps, last]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The pyramid's maps P2 to P6 of normalized images (B, 3, H, W), by torchvision's names."""
        maps: dict[str, Tensor] = self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.stages(images))))
        return maps


def build_detector(backbone: nn.Module, width: int, num_categories: int, config: NetworkConfig) -> MaskRCNN:
    """A Mask R-CNN on `backbone`, of features `width` wide; its weights stay, new layers are of torch's generator.

    All of it is trained, and the pyramid and the mask head have BatchNorm: the protocol of transfer after
    self-supervised pre-training (He et al., "Momentum Contrast", 2020, section 4.2). The box head is that of FPN, two
    fully connected layers. Images come as (3, H, W) in 0 to 1 and are normalized here as the encoder saw them.

    Raises:
        UserError: a backbone without stages of strides 4, 8, 16 and 32.
    """
    channels = config.channels
    sizes = tuple((config.smallest_anchor * 2**level,) for level in range(NUM_LEVELS))
    return MaskRCNN(
        Pyramid(backbone, width, channels),
        min_size=config.short_side,
        max_size=config.long_side,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        rpn_anchor_generator=AnchorGenerator(sizes, (ASPECT_RATIOS,) * NUM_LEVELS),
        rpn_pre_nms_top_n_train=2 * config.proposals,
        rpn_pre_nms_top_n_test=config.proposals,
        rpn_post_nms_top_n_train=config.proposals,
        rpn_post_nms_top_n_test=config.proposals,
        box_roi_pool=_region_pool(BOX_CELLS, config),
        box_head=TwoMLPHead(channels * BOX_CELLS**2, config.hidden),
        box_predictor=FastRCNNPredictor(config.hidden, num_categories + 1),
        box_batch_size_per_image=config.regions,
        box_detections_per_img=config.detections,
        mask_roi_pool=_region_pool(MASK_CELLS, config),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=nn.BatchNorm2d),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_categories + 1),
    )


def _region_pool(cells: int, config: NetworkConfig) -> MultiScaleRoIAlign:
    """RoIAlign to (cells, cells) from the level that fits a region's size (Lin et al. 2017, equation 1)."""
    levels = [str(level) for level in range(len(STRIDES))]
    canonical = CANONICAL_ANCHORS * config.smallest_anchor
    pool = MultiScaleRoIAlign(levels, cells, sampling_ratio=2, canonical_scale=canonical)
    # Left alone, the pool guesses the strides from the first batch it sees, for good; padding of small images
    # misleads it, and a resumed run would see another batch first.
    pool.scales = [1 / stride for stride in STRIDES]
    first, last = (STRIDES[end].bit_length() - 1 for end in (0, -1))
    pool.map_levels = initLevelMapper(first, last, canonical, CANONICAL_LEVEL)
    return pool


def to_device(detector: MaskRCNN, device: torch.device) -> MaskRCNN:
    """Move a detector to `device`, in channels_last; under torchrun on GPUs its BatchNorm becomes synchronised."""
    if is_synchronised(device):
        detector = synchronise_batchnorm(detector)
    return detector.to(device).to(memory_format=torch.channels_last)


def is_synchronised(device: torch.device) -> bool:
    """Whether BatchNorm sees the whole batch rather than this rank's part: SyncBatchNorm is for accelerators only."""
    return world_size() > 1 and device.type == "cuda"


def average_statistics(detector: MaskRCNN) -> None:
    """Make the ranks' BatchNorm statistics one, their mean: they differ where BatchNorm is not synchronised."""
    for module in detector.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(mean_over_ranks(module.running_mean))
            module.running_var.copy_(mean_over_ranks(module.running_var))


def decay_groups(detector: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups with their `names`: normalization layers, without decay, and the rest."""
    kinds: dict[bool, dict[str, Any]] = {
        decays: {"params": [], "names": [], "weight_decay": weight_decay if decays else 0.0} for decays in (True, False)
    }
    for prefix, module in detector.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                group = kinds[not isinstance(module, _BatchNorm)]
                group["params"].append(parameter)
                group["names"].append(f"{prefix}.{name}")
    return [group for group in kinds.values() if group["params"]]


def _stages(backbone: nn.Module) -> list[dict[str, Any]]:
    found = getattr(backbone, "feature_info", None)
    stages = found if isinstance(found, list) else getattr(found, "info", [])
    reductions = [stage["reduction"] for stage in stages]
    if not callable(getattr(backbone, "forward_intermediates", None)) or not set(STRIDES) <= set(reductions):
        raise UserError(
            f"detection needs a backbone with maps of strides 4, 8, 16 and 32, such as mobilenetv2, resnet18 or "
            f"resnet34; this one ({type(backbone).__name__}) has {sorted(set(reductions)) or 'none'}"
        )
    return stages
