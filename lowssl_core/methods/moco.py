"""MoCo-v2 with local views: telling an image's other views from a queue of other images.

Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning", https://arxiv.org/abs/2003.04297;
with local views: Tan et al. 2023, https://arxiv.org/abs/2210.02808.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowssl_core.backbones import BackboneConfig, build_backbone
from lowssl_core.distributed import gather_rows
from lowssl_core.ema import update_ema
from lowssl_core.errors import UserError
from lowssl_core.losses import PairLosses, collect_pairs
from lowssl_core.methods.heads import Network, Normalize, mlp
from lowssl_core.methods.method import Method, check_ranges, feature_signals, teacher_of
from lowssl_core.schedules import Progress
from lowssl_core.views import Views


@dataclass(frozen=True, kw_only=True)
class MoCoConfig:
    """MoCo's knobs; the defaults are the paper's.

    Attributes:
        hidden: width of the head's hidden layer.
        outputs: width of keys and queries.
        queue_length: number of keys in the queue.
        temperature: of the similarities.
        momentum: of the key network, constant.
        key_groups: how many shuffled groups a rank's keys are computed in, each with its own BatchNorm statistics,
            so that statistics do not tell which key belongs to which query.
    """

    name: ClassVar[str] = "moco"
    hidden: int = 2048
    outputs: int = 128
    queue_length: int = 65536
    temperature: float = 0.2
    momentum: float = 0.999
    key_groups: int = 4

    def __post_init__(self) -> None:
        check_ranges(
            self,
            counts=("hidden", "outputs", "queue_length", "key_groups"),
            positives=("temperature",),
            shares=("momentum",),
        )

    def build(self, backbone: BackboneConfig, batch_size: int) -> "MoCo":
        """MoCo with fresh weights, for a global batch of `batch_size`.

        Raises:
            UserError: the queue is shorter than a batch.
        """
        if self.queue_length < batch_size:
            raise UserError(
                f"recipe: method.queue_length is {self.queue_length}; it is at least the batch, {batch_size}"
            )
        return MoCo(self, backbone)


class MoCo(Method):
    """MoCo-v2. Global view 0 makes the key (`teacher` is the key network), all other views are queries."""

    # The keys' statistics are those of their own groups, on each rank.
    synchronised = ("online",)
    private = ("teacher.", "queue")
    teacher: Network
    queue: Tensor
    queue_end: Tensor

    def __init__(self, config: MoCoConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        module, width = build_backbone(backbone.name, backbone.drop_path)
        self.online = Network(module, width, self._head(width))
        self.teacher = teacher_of(self.online, backbone, self._head(width))
        self.register_buffer("queue", F.normalize(torch.randn(config.queue_length, config.outputs), dim=1))
        self.register_buffer("queue_end", torch.zeros((), dtype=torch.int64))
        self._new_keys: Tensor | None = None
        self.chance_loss = math.log(1 + config.queue_length)

    def _head(self, width: int) -> nn.Sequential:
        projection = mlp((width, self.config.hidden, self.config.outputs), activation=nn.ReLU, batchnorm=False)
        return nn.Sequential(projection, Normalize())

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """Keys (B, D) of images (B, 3, G, G), computed in shuffled groups (see `MoCoConfig.key_groups`)."""
        # A group of one has no BatchNorm statistics.
        groups = max(1, min(self.config.key_groups, len(images) // 2))
        order = torch.randperm(len(images), device=images.device)
        shuffled = torch.cat([self.teacher([group])[0][0] for group in images[order].tensor_split(groups)])
        return torch.empty_like(shuffled).index_copy_(0, order, shuffled)

    def forward(self, views: Views, progress: Progress) -> PairLosses:
        """InfoNCE of the queries against their key and the queue: 1 and V pairs."""
        keys = self._keys(views.globals[0])
        queries, features = self.online(views.globals[1:], views.locals)  # (1 + V, B, D)
        scaled = queries / self.config.temperature
        own = torch.einsum("sbd,bd->sb", scaled, keys)
        others = scaled @ self.queue.T  # (1 + V, B, queue); large: it is not copied to stand beside `own`
        losses = torch.logaddexp(own, torch.logsumexp(others, dim=-1)) - own
        # The queue is part of this step's backward pass: it moves only afterwards.
        self._new_keys = keys
        with torch.no_grad():
            found = (own >= others.amax(dim=-1)).float().mean()
        return collect_pairs(
            losses.mean(dim=1).unsqueeze(0),
            target_views=(0,),
            predicted_views=range(1, 1 + len(queries)),
            signals={"key_found": found} | feature_signals(features),
        )

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the key network, and put this step's keys, of all ranks, in place of the oldest ones."""
        update_ema(self.teacher, self.online, self.config.momentum)
        assert self._new_keys is not None, "after_step comes after forward"
        keys = gather_rows(self._new_keys)
        places = (self.queue_end + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, places, keys)
        self.queue_end.copy_((self.queue_end + len(keys)) % len(self.queue))
        self._new_keys = None
