"""DINO: self-distillation between a network and its own moving average.

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", https://arxiv.org/abs/2104.14294;
small networks' heads and values: Tan et al. 2023, https://arxiv.org/abs/2210.02808.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowssl_core.backbones import BackboneConfig, build_backbone
from lowssl_core.distributed import mean_over_ranks
from lowssl_core.ema import update_ema
from lowssl_core.losses import PairLosses, collect_pairs, pair_cross_entropies
from lowssl_core.methods.heads import Network, Normalize, WeightNormLinear, mlp
from lowssl_core.methods.method import Method, check_ranges, feature_signals, target_signals, teacher_of
from lowssl_core.schedules import Progress, cosine, epoch_ramp
from lowssl_core.views import Views


@dataclass(frozen=True, kw_only=True)
class DINOConfig:
    """DINO's knobs; the defaults are the paper's for convolutional networks.

    Attributes:
        hidden: width of the head's hidden layers.
        bottleneck: width of the head's L2-normalised layer.
        outputs: number of outputs K (ViT: 65536).
        head_batchnorm: BatchNorm in the head (ViT: no).
        gain_trainable: whether the last layer's gain is trained (ViT: yes).
        student_temperature: of the predictions.
        teacher_temperature: of the targets, after the warm-up.
        teacher_temperature_start: of the targets, at the start.
        teacher_temperature_epochs: length of that warm-up (ViT: 30).
        center_momentum: of the center of the teacher's outputs.
        momentum: of the teacher, at the start; it goes to 1 on a cosine.
        freeze_last_layer_epochs: how long the last layer stays as it was initialised.
    """

    name: ClassVar[str] = "dino"
    hidden: int = 2048
    bottleneck: int = 256
    outputs: int = 4096
    head_batchnorm: bool = True
    gain_trainable: bool = False
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    teacher_temperature_start: float = 0.04
    teacher_temperature_epochs: int = 50
    center_momentum: float = 0.9
    momentum: float = 0.996
    freeze_last_layer_epochs: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            counts=("hidden", "bottleneck", "outputs"),
            positives=("student_temperature", "teacher_temperature", "teacher_temperature_start"),
            shares=("center_momentum", "momentum"),
        )

    def build(self, backbone: BackboneConfig, batch_size: int) -> "DINO":
        """DINO with fresh weights; `batch_size` (global) plays no part in it."""
        return DINO(self, backbone)


class DINO(Method):
    """DINO. The teacher sees the two globals, the online network all views."""

    synchronised = ("online", "teacher")
    private = ("teacher.", "center")
    teacher: Network
    center: Tensor

    def __init__(self, config: DINOConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        module, width = build_backbone(backbone.name, backbone.drop_path)
        self.online = Network(module, width, self._head(width))
        self.teacher = teacher_of(self.online, backbone, self._head(width))
        self.register_buffer("center", torch.zeros(config.outputs))
        self.chance_loss = math.log(config.outputs)

    def _head(self, width: int) -> nn.Sequential:
        config = self.config
        projection = mlp(
            (width, config.hidden, config.hidden, config.bottleneck),
            activation=nn.GELU,
            batchnorm=config.head_batchnorm,
        )
        for layer in projection:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        last = WeightNormLinear(config.bottleneck, config.outputs, gain_trainable=config.gain_trainable)
        return nn.Sequential(projection, Normalize(), last)

    def teacher_temperature(self, progress: Progress) -> float:
        """The targets' temperature, warmed up once per epoch."""
        config = self.config
        return epoch_ramp(
            progress.epoch,
            config.teacher_temperature_start,
            config.teacher_temperature,
            config.teacher_temperature_epochs,
        )

    def forward(self, views: Views, progress: Progress) -> PairLosses:
        """Cross-entropies of the teacher's two globals with the online network's other views: 2 and 2V pairs."""
        with torch.no_grad():
            logits, _ = self.teacher(views.globals)  # (2, B, K)
            targets = F.softmax((logits - self.center) / self.teacher_temperature(progress), dim=-1)
            # The center is brought up to date only after its use.
            momentum = self.config.center_momentum
            self.center.lerp_(mean_over_ranks(logits.mean(dim=(0, 1))), 1 - momentum)
        predictions, features = self.online(views.globals, views.locals)  # (2 + V, B, K)
        log_predictions = F.log_softmax(predictions / self.config.student_temperature, dim=-1)
        return collect_pairs(
            pair_cross_entropies(targets, log_predictions),
            target_views=(0, 1),
            predicted_views=range(len(predictions)),
            signals=target_signals(targets) | feature_signals(features),
        )

    def after_backward(self, progress: Progress) -> None:
        """Keep the last layer frozen in the beginning."""
        if progress.step < self.config.freeze_last_layer_epochs * progress.steps_per_epoch:
            last = self.online.head[-1]  # type: ignore[index]
            for parameter in last.parameters():
                parameter.grad = None

    def after_step(self, progress: Progress) -> None:
        """Move the teacher; its momentum goes from the configured value to 1 on a cosine."""
        update_ema(self.teacher, self.online, cosine(progress.step, progress.total_steps, self.config.momentum, 1.0))
