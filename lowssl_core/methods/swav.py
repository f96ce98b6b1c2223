"""SwAV: predicting one view's assignment to prototypes from another view.

Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
https://arxiv.org/abs/2006.09882.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowssl_core.backbones import BackboneConfig, build_backbone
from lowssl_core.distributed import gather_rows, rank, world_size
from lowssl_core.losses import PairLosses, collect_pairs, pair_cross_entropies
from lowssl_core.methods.heads import Network, Normalize, mlp
from lowssl_core.methods.method import Method, check_ranges, feature_signals, target_signals
from lowssl_core.schedules import Progress
from lowssl_core.views import Views


@dataclass(frozen=True, kw_only=True)
class SwAVConfig:
    """SwAV's knobs; the defaults are the paper's.

    Attributes:
        hidden: width of the head's hidden layer.
        outputs: width of the L2-normalised embedding.
        prototypes: number of prototypes K.
        temperature: of the predictions.
        epsilon: entropy of the assignments.
        iterations: of Sinkhorn-Knopp.
        queue_length: embeddings of earlier batches that join in the assignment, for each global view; rounded down
            to a multiple of the global batch; 0: no queue.
        queue_start_epoch: from when the queue is used, once it is full.
        freeze_prototypes_epochs: how long the prototypes stay as they were initialised.
    """

    name: ClassVar[str] = "swav"
    hidden: int = 4096
    outputs: int = 128
    prototypes: int = 3000
    temperature: float = 0.1
    epsilon: float = 0.05
    iterations: int = 3
    queue_length: int = 3840
    queue_start_epoch: int = 15
    freeze_prototypes_epochs: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            counts=("hidden", "outputs", "prototypes", "iterations"),
            positives=("temperature", "epsilon"),
        )
        if self.queue_length < 0:
            raise ValueError(f"queue_length is {self.queue_length}; it is a number of embeddings, 0 for none")

    def build(self, backbone: BackboneConfig, batch_size: int) -> "SwAV":
        """SwAV with fresh weights, its queue a multiple of the global batch of `batch_size`."""
        return SwAV(self, backbone, batch_size)


class SwAV(Method):
    """SwAV. Both globals are assigned to prototypes; every other view predicts each assignment."""

    synchronised = ("online",)
    private = ("queue", "_extra_state")
    queue: Tensor

    def __init__(self, config: SwAVConfig, backbone: BackboneConfig, batch_size: int) -> None:
        super().__init__()
        self.config = config
        module, width = build_backbone(backbone.name, backbone.drop_path)
        projection = mlp((width, config.hidden, config.outputs), activation=nn.ReLU, batchnorm=True)
        self.online = Network(module, width, nn.Sequential(projection, Normalize()))
        self.teacher = None
        self.prototypes = nn.Linear(config.outputs, config.prototypes, bias=False)
        self.apply(_initialise)
        self.chance_loss = math.log(config.prototypes)
        length = config.queue_length // batch_size * batch_size
        self.register_buffer("queue", torch.zeros(2, length, config.outputs))
        # A number on the host, for it decides a shape and reading it back each step would wait for the device.
        self._queued = 0
        self._new_embeddings: Tensor | None = None

    def get_extra_state(self) -> Tensor:
        """The number of embeddings in the queue."""
        return torch.tensor(self._queued)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the number of embeddings in the queue."""
        self._queued = int(state)

    def forward(self, views: Views, progress: Progress) -> PairLosses:
        """Cross-entropies of the two globals' assignments with the other views' predictions: 2 and 2V pairs."""
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        embeddings, features = self.online(views.globals, views.locals)  # (2 + V, B, D)
        scores = self.prototypes(embeddings)  # (2 + V, B, K)
        codes = torch.stack([self._codes(view, scores[view].detach(), progress) for view in (0, 1)])
        self._new_embeddings = embeddings[:2].detach()
        log_predictions = F.log_softmax(scores / self.config.temperature, dim=-1)
        return collect_pairs(
            pair_cross_entropies(codes, log_predictions),
            target_views=(0, 1),
            predicted_views=range(len(scores)),
            signals=target_signals(codes) | feature_signals(features),
        )

    @torch.no_grad()
    def _codes(self, view: int, scores: Tensor, progress: Progress) -> Tensor:
        """Assignments (B, K) of one global view's scores (B, K), with the queue in front once it is in use."""
        batch, length = len(scores), self.queue.shape[1]
        if length and progress.epoch >= self.config.queue_start_epoch and self._queued == length:
            # All ranks hold the same queue; each brings its own share into the common assignment.
            share = self.queue[view].chunk(world_size())[rank()]
            scores = torch.cat([self.prototypes(share), scores])
        codes = sinkhorn(scores, self.config.epsilon, self.config.iterations)
        return codes[-batch:]

    def after_backward(self, progress: Progress) -> None:
        """Keep the prototypes frozen in the beginning."""
        if progress.step < self.config.freeze_prototypes_epochs * progress.steps_per_epoch:
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Put this step's embeddings, of all ranks, at the front of the queue; the oldest leave it."""
        length = self.queue.shape[1]
        if length:
            assert self._new_embeddings is not None, "after_step comes after forward"
            new = torch.stack([gather_rows(embeddings) for embeddings in self._new_embeddings])
            self.queue.copy_(torch.cat([new, self.queue], dim=1)[:, :length])
            self._queued = min(self._queued + new.shape[1], length)
        self._new_embeddings = None


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assign samples to prototypes, all prototypes equally often (SwAV, section 3.1).

    Q = exp(scores / epsilon); then, `iterations` times, each prototype's total over the samples of all ranks is
    brought to 1 / K and each sample's to 1 / B. Done on logarithms: no score is too large or too small.

    Args:
        scores: (B, K), this rank's samples.
        epsilon: entropy of the assignment.
        iterations: of Sinkhorn-Knopp.

    Returns:
        (B, K) assignments in fp32, each row summing to 1.
    """
    log_codes = scores.float() / epsilon
    for _ in range(iterations):
        totals = torch.logsumexp(log_codes, dim=0, keepdim=True)  # (1, K)
        log_codes = log_codes - torch.logsumexp(gather_rows(totals), dim=0)
        log_codes = log_codes - torch.logsumexp(log_codes, dim=1, keepdim=True)
    return log_codes.exp()


def _initialise(module: nn.Module) -> None:
    """The release's start: linear layers from N(0, .01), convolutions from Kaiming's normal, fan-out."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
