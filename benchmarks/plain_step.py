"""The training step as a plain transcription of the equations: what the fast step is measured against.

The mathematics is that of `lowssl_core`, the code that of the methods' public releases: NCHW images, fp32, loops in
Python over pairs of views, parameters (optimizer and moving average) and Sinkhorn's rows and columns. The backbone runs
once for each resolution, as in those releases: a forward for each view would have other BatchNorm statistics, so be
other mathematics. Nothing here waits for the device, though the releases read the loss back at every step.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from lowssl_core.losses import default_alpha
from lowssl_core.methods.dino import DINO
from lowssl_core.methods.heads import Network
from lowssl_core.methods.method import Method
from lowssl_core.methods.moco import MoCo
from lowssl_core.methods.swav import SwAV
from lowssl_core.optim import OptimConfig, Schedule, parameter_groups
from lowssl_core.schedules import Progress, cosine
from lowssl_core.views import Views


class PlainLARS(Optimizer):
    """LARS, one parameter after the other."""

    def __init__(self, groups: Iterable[dict[str, object]], momentum: float, trust_coefficient: float = 0.001) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad.add(parameter, alpha=group["weight_decay"])
                if group["use_trust_ratio"]:
                    weight_norm, update_norm = torch.norm(parameter), torch.norm(update)
                    one = torch.ones_like(weight_norm)
                    ratio = torch.where(
                        weight_norm > 0,
                        torch.where(update_norm > 0, group["trust_coefficient"] * weight_norm / update_norm, one),
                        one,
                    )
                    update = update.mul(ratio)
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.add_(state["momentum_buffer"], alpha=-group["lr"])


def plain_optimizer(config: OptimConfig, module: nn.Module) -> Optimizer:
    """The optimizer of a recipe, as a loop over parameters."""
    groups = parameter_groups(module)
    if config.name == "lars":
        return PlainLARS(groups, momentum=config.momentum)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, foreach=False)
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.momentum, 0.999), foreach=False)


def plain_train(
    method: Method,
    batches: Iterable[Views],
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    start: Progress,
    alpha: float | None,
) -> Iterator[Tensor]:
    """What `lowssl_core.train.train` does, with only the weights, queues and centers of `method`; yields each loss."""
    step = {DINO: _dino, SwAV: _swav, MoCo: _moco}[type(method)]
    progress = start
    for views in batches:
        schedule.apply(optimizer, progress)
        optimizer.zero_grad()
        global_losses, local_losses = step(method, views, progress)
        weight = default_alpha(len(global_losses), len(local_losses)) if alpha is None else alpha
        loss = _mean(global_losses)
        if local_losses:
            loss = weight * loss + (1 - weight) * _mean(local_losses)
        loss.backward()
        method.after_backward(progress)
        optimizer.step()
        _after_step(method, progress)
        progress = progress.advanced()
        yield loss.detach()
        if progress.is_done:
            return


def _mean(losses: Sequence[Tensor]) -> Tensor:
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total / len(losses)


def _look(network: Network, views: Views, first_global: int = 0) -> Sequence[Tensor]:
    """The head's output (B, D) of each view: the backbone for each resolution, the head once for all."""
    globals_ = views.globals[first_global:]
    features = network.backbone(torch.cat(globals_))
    if views.locals:
        features = torch.cat([features, network.backbone(torch.cat(views.locals))])
    return network.head(features).chunk(len(globals_) + len(views.locals))


def _dino(method: DINO, views: Views, progress: Progress) -> tuple[list[Tensor], list[Tensor]]:
    config = method.config
    with torch.no_grad():
        logits = method.teacher.head(method.teacher.backbone(torch.cat(views.globals)))
        targets = functional.softmax((logits - method.center) / method.teacher_temperature(progress), dim=-1).chunk(2)
        center = logits.mean(dim=0, keepdim=True).squeeze(0)
        method.center.copy_(method.center * config.center_momentum + center * (1 - config.center_momentum))
    predictions = [output / config.student_temperature for output in _look(method.online, views)]
    return _cross_entropies(targets, predictions)


def _swav(method: SwAV, views: Views, progress: Progress) -> tuple[list[Tensor], list[Tensor]]:
    config = method.config
    with torch.no_grad():
        method.prototypes.weight.copy_(functional.normalize(method.prototypes.weight, dim=1))
    embeddings = _look(method.online, views)
    scores = [method.prototypes(embedding) for embedding in embeddings]
    batch, length = len(embeddings[0]), method.queue.shape[1]
    codes = []
    with torch.no_grad():
        for view in (0, 1):
            rows = scores[view].detach()
            if length and progress.epoch >= config.queue_start_epoch and method._queued == length:
                rows = torch.cat([method.queue[view] @ method.prototypes.weight.t(), rows])
            codes.append(_sinkhorn(rows, config.epsilon, config.iterations)[-batch:])
        for view in (0, 1):
            if length:
                method.queue[view, batch:] = method.queue[view, :-batch].clone()
                method.queue[view, :batch] = embeddings[view].detach()
        method._queued = min(method._queued + batch, length)
    return _cross_entropies(codes, [row / config.temperature for row in scores])


def _sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    codes = torch.exp(scores / epsilon).t()  # (K, B)
    num_prototypes, batch = codes.shape
    codes /= torch.sum(codes)
    for _ in range(iterations):
        codes /= torch.sum(codes, dim=1, keepdim=True)
        codes /= num_prototypes
        codes /= torch.sum(codes, dim=0, keepdim=True)
        codes /= batch
    return (codes * batch).t()


def _cross_entropies(targets: Sequence[Tensor], predictions: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Global and local pairs' losses of tables (B, K), each pair on its own."""
    global_losses, local_losses = [], []
    for target_view, target in enumerate(targets):
        for view, prediction in enumerate(predictions):
            if view == target_view:
                continue
            loss = torch.sum(-target * functional.log_softmax(prediction, dim=-1), dim=-1).mean()
            (global_losses if view < 2 else local_losses).append(loss)
    return global_losses, local_losses


def _moco(method: MoCo, views: Views, progress: Progress) -> tuple[list[Tensor], list[Tensor]]:
    config = method.config
    images = views.globals[0]
    with torch.no_grad():
        order = torch.randperm(len(images), device=images.device)
        groups = images[order].chunk(max(1, min(config.key_groups, len(images) // 2)))
        shuffled = torch.cat([method.teacher.head(method.teacher.backbone(group)) for group in groups])
        keys = shuffled[torch.argsort(order)]
    queue = method.queue.clone()
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    losses = []
    for query in _look(method.online, views, first_global=1):
        own = torch.einsum("nc,nc->n", query, keys).unsqueeze(-1)
        others = torch.einsum("nc,kc->nk", query, queue)
        losses.append(functional.cross_entropy(torch.cat([own, others], dim=1) / config.temperature, labels))
    method._new_keys = keys
    return losses[:1], losses[1:]


@torch.no_grad()
def _after_step(method: Method, progress: Progress) -> None:
    if isinstance(method, DINO):
        _move(method, cosine(progress.step, progress.total_steps, method.config.momentum, 1.0))
    if isinstance(method, MoCo):
        _move(method, method.config.momentum)
        keys = method._new_keys
        assert keys is not None
        places = (method.queue_end + torch.arange(len(keys), device=keys.device)) % len(method.queue)
        method.queue.index_copy_(0, places, keys)
        method.queue_end.copy_((method.queue_end + len(keys)) % len(method.queue))


def _move(method: DINO | MoCo, momentum: float) -> None:
    for kept, online in zip(method.teacher.parameters(), method.online.parameters(), strict=True):
        kept.mul_(momentum).add_((1 - momentum) * online)
