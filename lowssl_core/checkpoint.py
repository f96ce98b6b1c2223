"""Checkpoints: one safetensors file that holds a whole run, written atomically, without pickle."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowssl_core.distributed import gather_rows, rank, world_size
from lowssl_core.errors import UserError
from lowssl_core.methods.method import Method
from lowssl_core.recipe import Recipe, differences, recipe_from_dict
from lowssl_core.schedules import Progress
from lowssl_core.tensor_file import read_format, read_sealed, tensor_names, write_sealed

FORMAT = "lowssl-checkpoint-1"

Branch = Literal["student", "teacher"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run as it was between two steps.

    Attributes:
        recipe: all that decides the result.
        progress: the clock; with the recipe's seed it is also the sampler's position.
        facts: what else the run knows of itself, as JSON (its data, sizes of views, seconds so far).
        tensors: the method's state ("method."), the optimizer's ("optimizer.PARAMETER."), and the random number
            generators' states ("rng.cpu", "rng.cuda": one row for each rank).
    """

    recipe: Recipe
    progress: Progress
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def take_checkpoint(
    method: Method, optimizer: Optimizer, *, recipe: Recipe, progress: Progress, facts: Mapping[str, Any]
) -> Checkpoint:
    """The run's state; every rank must call this together, for the generators' states are gathered."""
    device = next(method.parameters()).device
    tensors = {f"method.{name}": value for name, value in method.state_dict().items()}
    tensors |= optimizer_tensors(optimizer)
    tensors["rng.cpu"] = gather_rows(torch.get_rng_state().unsqueeze(0).to(device))
    if device.type == "cuda":
        tensors["rng.cuda"] = gather_rows(torch.cuda.get_rng_state(device).unsqueeze(0).to(device))
    return Checkpoint(recipe=recipe, progress=progress, facts=facts, tensors=tensors)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically: after a crash the file is the old one or the new one, whole."""
    facts = {
        "recipe": checkpoint.recipe.as_dict(),
        "progress": asdict(checkpoint.progress),
        "run": checkpoint.facts,
    }
    write_sealed(path, checkpoint.tensors, format=FORMAT, facts=facts)


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint, by its metadata; nothing else of it is checked."""
    return read_format(path) == FORMAT


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        UserError: no such file, a file of another kind, or a damaged one.
    """
    file = read_sealed(path, format=FORMAT, kind="checkpoint of lowssl-pretrain")
    facts = file.facts
    return Checkpoint(
        recipe=recipe_from_dict(facts["recipe"]),
        progress=Progress(**facts["progress"]),
        facts=facts["run"],
        tensors=file.tensors,
    )


def restore(checkpoint: Checkpoint, method: Method, optimizer: Optimizer, *, recipe: Recipe) -> None:
    """Put a checkpoint's state into a freshly built method and optimizer, and the generators' where ranks agree.

    Raises:
        UserError: the checkpoint is of another recipe.
    """
    if changed := differences(checkpoint.recipe, recipe):
        raise UserError(f"the checkpoint was made with another recipe (there, here): {'; '.join(changed)}")
    tensors = checkpoint.tensors
    method.load_state_dict(tensors_below(tensors, "method."))
    restore_optimizer(optimizer, tensors)
    if len(tensors["rng.cpu"]) == world_size():
        # Copies: a generator reads its state from where a tensor's memory begins, not from where its row does.
        torch.set_rng_state(tensors["rng.cpu"][rank()].clone())
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"][rank()].clone())


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as "optimizer.PARAMETER.KEY", for groups with their parameters' `names`."""
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in _named_parameters(optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put what `optimizer_tensors` gave into a freshly built optimizer; other tensors may stand beside it."""
    for name, parameter in _named_parameters(optimizer):
        # A copy into the parameter's own memory format: sums in another order would end the run's exactness.
        for key, value in tensors_below(tensors, f"optimizer.{name}.").items():
            like = parameter if value.shape == parameter.shape else value
            optimizer.state[parameter][key] = torch.empty_like(like, dtype=value.dtype).copy_(value)


def backbone_state(checkpoint: Checkpoint, branch: Branch) -> dict[str, Tensor]:
    """The weights of the trained backbone ("student") or of its moving average ("teacher").

    Raises:
        UserError: the method has no such branch.
    """
    state = tensors_below(checkpoint.tensors, f"method.{'online' if branch == 'student' else 'teacher'}.backbone.")
    if not state:
        raise UserError(f"a {checkpoint.recipe.method.name} checkpoint has no {branch}; take the student")
    return state


def has_teacher(path: Path) -> bool:
    """Whether the method of the run whose checkpoint is at `path` keeps a moving average of the trained network."""
    return any(name.startswith("method.teacher.backbone.") for name in tensor_names(path))


def tensors_below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _named_parameters(optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    return [
        (name, parameter)
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    ]
