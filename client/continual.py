"""Continual training: any method, with what keeps it near its own past and near the global model.

Alignment of replayed images to the moving average of the encoder: Cignoni et al. 2025, "CLA: Latent Alignment for
Online Continual Self-Supervised Learning", https://arxiv.org/abs/2507.10434; its predictor: Fini et al. 2022,
"Self-Supervised Models are Continual Learners", https://arxiv.org/abs/2112.04215. Proximal term: Li et al. 2020,
"Federated Optimization in Heterogeneous Networks", https://arxiv.org/abs/1812.06127 (FedProx).
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lowssl_core.ema import update_ema
from lowssl_core.losses import PairLosses
from lowssl_core.methods import Method
from lowssl_core.methods.heads import mlp
from lowssl_core.methods.method import check_ranges
from lowssl_core.schedules import Progress
from lowssl_core.views import Views


@dataclass(frozen=True, kw_only=True)
class ContinualConfig:
    """What is added to a method.

    Attributes:
        alignment: lambda, the weight of the replayed images' alignment; 0: none.
        hidden: width of the predictor's hidden layer.
        momentum: of the moving average of the encoder, for methods that have none (SwAV).
    """

    alignment: float = 1.0
    hidden: int = 512
    momentum: float = 0.999

    def __post_init__(self) -> None:
        check_ranges(self, counts=("hidden",), shares=("momentum",))
        if not 0 <= self.alignment < float("inf"):
            raise ValueError(f"alignment is {self.alignment}; it is a number from 0")


class Continual(Method):
    """A method whose loss is L - lambda mean cos(a(z), z_ema) + mu/2 |w - w_global|^2.

    z are the trained backbone's features of the replayed images' global views and z_ema those of the moving average,
    which no gradient reaches; a is a small predictor. The moving average is the method's own teacher, or one kept here.
    With lambda and mu 0 the wrapped method trains as it does alone, to the bit.

    Args:
        method: the wrapped method.
        config: what is added.

    Attributes:
        method: the wrapped method; what it shares is what is shared.
        num_replayed: how many rows at the end of each batch are replayed; those are aligned.
        proximal: mu of FedProx, 0 for none.
    """

    synchronised = ()
    private = ("predictor.", "average.")

    def __init__(self, method: Method, config: ContinualConfig) -> None:
        super().__init__()
        self.method, self.config = method, config
        # Names in here for what the wrapped method owns, not children: the state holds each weight once.
        self.__dict__.update(online=method.online, teacher=method.teacher)
        self.chance_loss = method.chance_loss
        self.num_replayed = 0
        self.proximal = 0.0
        width = method.online.width
        self.predictor = mlp((width, config.hidden, width), activation=nn.ReLU, batchnorm=False)
        self.average = (
            None if method.teacher is not None else copy.deepcopy(method.online.backbone).requires_grad_(False)
        )
        self._anchor: dict[str, Tensor] = {}
        self._seen: tuple[list[Tensor], Tensor] | None = None
        method.online.register_forward_hook(self._keep)

    @property
    def encoder(self) -> nn.Module:
        """The moving average of the backbone, to be used in `evaluating`."""
        backbone = self.average if self.method.teacher is None else self.method.teacher.backbone
        assert backbone is not None, "there is one of the two"
        return backbone

    def federated_state(self) -> dict[str, Tensor]:
        """What the wrapped method shares, under its own names; predictor and average stay."""
        return self.method.federated_state()

    def anchor(self, weights: Mapping[str, Tensor], proximal: float) -> None:
        """Pull the shared parameters towards `weights`, by the wrapped method's names, with the strength `proximal`."""
        self.proximal = proximal
        self._anchor = dict(weights)

    def restart_average(self) -> None:
        """Let the moving average begin at the weights as they are."""
        if self.method.teacher is not None:
            self.method.teacher.load_state_dict(self.method.online.state_dict())
        else:
            self.encoder.load_state_dict(self.method.online.backbone.state_dict())

    def forward(self, views: Views, progress: Progress) -> PairLosses:
        """The wrapped method's pair losses, each with the alignment added: so `rebalance` adds it once."""
        pairs: PairLosses = self.method(views, progress)
        seen, self._seen = self._seen, None
        assert seen is not None, "every method looks at its views by its online network"
        if not self.config.alignment or not self.num_replayed:
            return pairs
        closeness = self._closeness(*seen)
        added = -self.config.alignment * closeness
        return replace(
            pairs,
            global_pairs=pairs.global_pairs + added,
            local_pairs=pairs.local_pairs + added,
            signals={**pairs.signals, "alignment": closeness.detach()},
        )

    def after_backward(self, progress: Progress) -> None:
        """The wrapped method's, then the gradient of the proximal term, of parameters that are trained in this step."""
        self.method.after_backward(progress)
        if not self.proximal:
            return
        for name, parameter in self.method.named_parameters():
            if name in self._anchor and parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - self._anchor[name], alpha=self.proximal)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """The wrapped method's, then the moving average kept here."""
        self.method.after_step(progress)
        if self.average is not None:
            update_ema(self.average, self.method.online.backbone, self.config.momentum)
            # This one sees images in evaluation alone, and takes the statistics over.
            for buffer, online in zip(self.average.buffers(), self.method.online.backbone.buffers(), strict=True):
                buffer.copy_(online)

    def _keep(self, module: nn.Module, views: tuple[list[Tensor], ...], outputs: tuple[Tensor, Tensor]) -> None:
        """Keep what the online network has just seen of global views, and its features of them."""
        globals_ = views[0]
        self._seen = (globals_, outputs[1][: len(globals_)])

    def _closeness(self, globals_: list[Tensor], features: Tensor) -> Tensor:
        """Mean cosine of the predicted and the averaged encoder's features of the replayed rows.

        Args:
            globals_: the global views that the online network saw, each (B, 3, G, G).
            features: its features of them, (V, B, width).
        """
        replayed = slice(-self.num_replayed, None)
        with torch.no_grad(), evaluating(self.encoder) as encoder:
            targets = encoder(torch.cat([view[replayed] for view in globals_])).float()
        predictions = self.predictor(features[:, replayed].flatten(0, 1))
        return F.cosine_similarity(predictions, targets, dim=1).mean()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """A module in evaluation mode within the context, and as it was afterwards."""
    was_training = module.training
    try:
        yield module.eval()
    finally:
        module.train(was_training)
