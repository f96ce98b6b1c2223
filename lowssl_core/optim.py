"""Optimizers of the recipes (LARS, AdamW, SGD), their parameter groups and their per-step schedules."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowssl_core.schedules import Progress, cosine


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), as in the paper's recipes, in foreach operations.

    For each parameter p with gradient g: d = g + weight_decay * p; q = trust_coefficient * |p| / |d|, or 1 where
    either norm is 0 or the group's `use_trust_ratio` is off; mu <- momentum * mu + q * d; p <- p - lr * mu.

    Args:
        params: parameters, or groups with their own `lr`, `weight_decay` and `use_trust_ratio`.
        lr: step size.
        momentum: of the scaled gradients.
        weight_decay: decay, part of d.
        use_trust_ratio: whether q scales the step.
        trust_coefficient: the factor in q.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        use_trust_ratio: bool = True,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "use_trust_ratio": use_trust_ratio,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients that are there; parameters without one stay."""
        assert closure is None, "LARS takes no closure"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_group(group, parameters)

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        updates = torch._foreach_add(
            [cast(Tensor, p.grad) for p in parameters], parameters, alpha=group["weight_decay"]
        )
        if group["use_trust_ratio"]:
            torch._foreach_mul_(updates, _trust_ratios(parameters, updates, group["trust_coefficient"]))
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffers.append(state["momentum_buffer"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(parameters, buffers, alpha=-group["lr"])


def _trust_ratios(parameters: list[Tensor], updates: tuple[Tensor, ...], coefficient: float) -> list[Tensor]:
    weights = torch.stack(torch._foreach_norm(parameters))
    steps = torch.stack(torch._foreach_norm(updates))
    # where() instead of an if: nothing is read back from the device.
    ratios = torch.where((weights > 0) & (steps > 0), coefficient * weights / steps, 1.0)
    return list(ratios.unbind())


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Sort a module's trainable parameters into the groups of the paper's recipes.

    One-dimensional parameters (biases, norms): no decay and no trust ratio. Weights of depthwise convolutions
    (groups == input channels > 1; a 1-channel stem is none): no decay, but the trust ratio stays. The rest: both.

    Returns:
        Groups with `params`, `names` (the parameters' qualified names), `use_trust_ratio` and `decays`.
    """
    depthwise = {
        f"{name}.weight" if name else "weight"
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.conv._ConvNd) and 1 < part.groups == part.in_channels
    }
    kinds: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        has_trust = parameter.ndim > 1
        decays = has_trust and name not in depthwise
        group = kinds.setdefault(
            (decays, has_trust),
            {"params": [], "names": [], "use_trust_ratio": has_trust, "decays": decays},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(kinds.values())


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedules.

    Attributes:
        name: "lars", "adamw" or "sgd".
        base_lr: learning rate for a global batch of 256; scaled linearly with the batch.
        final_lr: where the cosine ends; not scaled.
        warmup_epochs: length of the linear warm-up in epochs; or
        warmup_steps: its length in steps, for short runs; give one of the two at most.
        warmup_start_lr: where the warm-up starts; not scaled.
        weight_decay: at the start.
        final_weight_decay: where weight decay goes on a cosine; absent: constant.
        momentum: of LARS and SGD, and the first beta of AdamW.
    """

    name: Literal["lars", "adamw", "sgd"] = "lars"
    base_lr: float = 0.48
    final_lr: float = 0.0048
    warmup_epochs: float | None = None
    warmup_steps: int | None = None
    warmup_start_lr: float = 0.0
    weight_decay: float = 1e-6
    final_weight_decay: float | None = None
    momentum: float = 0.9

    def __post_init__(self) -> None:
        amounts = ("base_lr", "final_lr", "warmup_start_lr", "weight_decay")
        optional = ("warmup_epochs", "warmup_steps", "final_weight_decay")
        for field in (*amounts, *(name for name in optional if getattr(self, name) is not None)):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} is {getattr(self, field)}; it is a number from 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it is a number from 0 to below 1")
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("warmup_epochs and warmup_steps are both given; give one of them")

    def build(self, module: nn.Module) -> Optimizer:
        """The optimizer over the module's trainable parameters, in the groups of `parameter_groups`."""
        groups = parameter_groups(module)
        if self.name == "lars":
            return LARS(groups, lr=0.0, momentum=self.momentum)
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum, foreach=True)
        return torch.optim.AdamW(groups, lr=0.0, betas=(self.momentum, 0.999), foreach=True)

    def warmup(self, steps_per_epoch: int) -> int:
        """How many steps the warm-up takes."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round((self.warmup_epochs or 0) * steps_per_epoch)

    def schedule(self, batch_size: int) -> "Schedule":
        """The learning rate and weight decay of each step, for a global batch of `batch_size`."""
        return Schedule(self, batch_size)


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay as functions of progress."""

    config: OptimConfig
    batch_size: int

    def learning_rate(self, progress: Progress) -> float:
        """Linear warm-up, then cosine, per step."""
        config = self.config
        return cosine(
            progress.step,
            progress.total_steps,
            config.base_lr * self.batch_size / 256,
            config.final_lr,
            warmup_steps=min(config.warmup(progress.steps_per_epoch), progress.total_steps - 1),
            warmup_start=config.warmup_start_lr,
        )

    def weight_decay(self, progress: Progress) -> float:
        """Constant, or a cosine between the two configured values."""
        config = self.config
        if config.final_weight_decay is None:
            return config.weight_decay
        return cosine(progress.step, progress.total_steps, config.weight_decay, config.final_weight_decay)

    def apply(self, optimizer: Optimizer, progress: Progress) -> tuple[float, float]:
        """Set every group's learning rate and weight decay for the step about to be taken; returns both."""
        rate, decay = self.learning_rate(progress), self.weight_decay(progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = decay if group["decays"] else 0.0
        return rate, decay
