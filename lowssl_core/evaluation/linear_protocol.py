"""The paper's linear protocol: a linear layer trained on frozen features of augmented images.

Tan et al. 2023, https://arxiv.org/abs/2210.02808, and its release; for transformers as DINO has it, Caron et al. 2021,
https://arxiv.org/abs/2104.14294, appendix F.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lowssl_core.errors import UserError
from lowssl_core.evaluation.subjects import check_same_classes
from lowssl_core.evaluation.supervised import SupervisedRun, feature_width, new_classifier
from lowssl_core.evaluation.training_config import TrainingConfig
from lowssl_core.preprocess import Preprocess
from lowssl_core.sources import Source


@dataclass(frozen=True, kw_only=True)
class LinearConfig(TrainingConfig):
    """The linear protocol; the defaults are the paper's for convolutional networks, `paper_config` knows the others.

    Attributes:
        last_blocks: of how many of a transformer's last blocks the CLS tokens are taken, one beside the other; 1: the
            network's own features, whatever it is.
    """

    optimizer: Literal["lars", "sgd"] = "lars"
    base_lr: float = 0.05
    batch_size: int = 4096
    epochs: int = 100
    last_blocks: int = 1

    def __post_init__(self) -> None:
        # Not super(): the decorator, where it sees slots, makes another class than the one that name would mean.
        TrainingConfig.__post_init__(self)
        if self.last_blocks < 1:
            raise ValueError(f"last_blocks is {self.last_blocks}; it is a whole number from 1")


class LastBlocks(nn.Module):
    """The CLS tokens of a vision transformer's last blocks, each after the last norm, from the earliest to the last.

    The last of them is what the network itself gives.

    Args:
        backbone: a transformer of timm's that takes its CLS token as features.
        num_blocks: how many.

    Raises:
        UserError: another network, or more blocks than it has.
    """

    def __init__(self, backbone: nn.Module, num_blocks: int) -> None:
        super().__init__()
        if not gives_cls_token(backbone):
            raise UserError(f"last_blocks is {num_blocks}; only vision transformers with a CLS token have more than 1")
        assert isinstance(backbone, VisionTransformer)
        if num_blocks > len(backbone.blocks):
            raise UserError(f"last_blocks is {num_blocks}; this network has {len(backbone.blocks)} blocks")
        self._backbone = backbone
        self._num_blocks = num_blocks

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) to (B, num_blocks * width)."""
        blocks = self._backbone.get_intermediate_layers(images, self._num_blocks, return_prefix_tokens=True, norm=True)
        return torch.cat([prefix[:, 0] for _, prefix in blocks], dim=1)


def gives_cls_token(backbone: nn.Module) -> bool:
    """Whether a network is a vision transformer whose features are its CLS token."""
    return isinstance(backbone, VisionTransformer) and backbone.has_class_token and backbone.global_pool == "token"


def paper_config(backbone: nn.Module) -> LinearConfig:
    """The paper's values for a network: SGD on the last 4 blocks' CLS for vision transformers, else LARS."""
    if gives_cls_token(backbone):
        return LinearConfig(optimizer="sgd", base_lr=0.01, batch_size=1024, last_blocks=4)
    return LinearConfig()


def linear_run(
    backbone: nn.Module,
    preprocess: Preprocess,
    train: Source,
    test: Source,
    config: LinearConfig,
    *,
    checkpoint: Path | None = None,
    workers: int = 0,
) -> SupervisedRun:
    """Make ready to train a linear layer on the features of `backbone`, which stays as it is, in evaluation mode.

    Args:
        backbone: from (B, 3, S, S) to (B, width), on the device that is to be used.
        preprocess: what it takes.
        train: labelled images.
        test: others of the same classes.
        config: how.
        checkpoint: see `SupervisedRun`.
        workers: see `SupervisedRun`.

    Raises:
        UserError: no labels, different classes, blocks that the network has not, and see `SupervisedRun`.
    """
    check_same_classes(train, test)
    frozen = (LastBlocks(backbone, config.last_blocks) if config.last_blocks > 1 else backbone).eval()
    width = feature_width(frozen, preprocess.size)
    classifier = new_classifier(width, len(train.classes or ()), config.seed)
    return SupervisedRun(
        classifier.to(next(backbone.parameters()).device),
        config,
        train=train,
        test=test,
        preprocess=preprocess,
        frozen=frozen,
        checkpoint=checkpoint,
        workers=workers,
    )
