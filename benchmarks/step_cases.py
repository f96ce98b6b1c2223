"""What `step.py` measures: one method and backbone, as the fast or the plain step, in a process of its own."""

import multiprocessing
import platform
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import repeat
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from plain_step import plain_optimizer, plain_train
from torch import Tensor
from torch.nn import functional

from lowssl_core.backbones import backbone_grid
from lowssl_core.compute import prepare
from lowssl_core.methods import Method
from lowssl_core.methods.swav import SwAV
from lowssl_core.recipe import Recipe, load_recipe, recipe_names
from lowssl_core.schedules import Progress
from lowssl_core.train import train
from lowssl_core.views import Views

SEED = 0
# In epoch 20 no layer is frozen any more and SwAV's queue is in use.
START = Progress(step=20_000, total_steps=200_000, steps_per_epoch=1000)


class Timing(NamedTuple):
    """Seconds of a step by the clock, and of the process's CPU time."""

    wall: float
    cpu: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method and backbone at one size; the defaults are the full recipe's.

    The recipe is the matched one, on other backbones that of MobileNetV2. Heads have the recipes' widths, but for
    ViT-Ti's DINO below 224 px: its 65536 outputs, meant for a batch 64 times as large, would hide the backbone, so it
    has 4096 like the others. `queue_length` is MoCo's (None: the recipe's). SwAV's queue is 3 batches at
    small sizes, as in the recipe (3840 embeddings, batch 1024).
    """

    method: str
    backbone: str
    batch: int
    global_size: int = 224
    local_size: int = 128
    queue_length: int | None = None
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.backbone == "vit_tiny":  # sides are multiples of its patches
            for name in ("global_size", "local_size"):
                object.__setattr__(self, name, max(16, getattr(self, name) // 16 * 16))

    def recipe(self) -> Recipe:
        """The recipe, in this case's sizes."""
        name = f"{self.method}-{self.backbone.replace('_', '-')}-matched"
        overrides = [f"data.batch_size={self.batch}", f"backbone.name={self.backbone}"]
        overrides += [f"views.global_size={self.global_size}", f"views.local_size={self.local_size}"]
        if self.queue_length is not None and self.method == "moco":
            overrides.append(f"method.queue_length={self.queue_length}")
        if self.global_size < 224 and self.method == "swav":
            overrides.append(f"method.queue_length={3 * self.batch}")
        if self.global_size < 224 and self.method == "dino":
            overrides.append("method.outputs=4096")
        return load_recipe(name if name in recipe_names() else f"{self.method}-mobilenetv2-matched", overrides)

    def as_dict(self) -> dict[str, Any]:
        """The case as JSON takes it."""
        return asdict(self)


def build_method(case: Case, *, plain: bool) -> Method:
    """The case's method, the same weights on both sides, with a full queue."""
    recipe, device = case.recipe(), torch.device(case.device)
    torch.manual_seed(SEED)
    method = recipe.method.build(recipe.backbone, case.batch)
    if isinstance(method, SwAV):
        method.queue.copy_(functional.normalize(torch.randn_like(method.queue), dim=-1))
        method.set_extra_state(torch.tensor(method.queue.shape[1]))
    for size in (case.global_size, case.local_size):
        assert size % backbone_grid(method.online.backbone) == 0, f"{case.backbone} does not take {size} px"
    return method.to(device).train() if plain else prepare(method, device, recipe.compute)


def random_views(case: Case, *, plain: bool) -> Views:
    """Views of noise, the same on both sides but for the layout that each side works in."""
    generator = torch.Generator().manual_seed(SEED)
    layout = torch.contiguous_format if plain else torch.channels_last

    def view(size: int) -> Tensor:
        return torch.randn(case.batch, 3, size, size, generator=generator).contiguous(memory_format=layout)

    num_locals = case.recipe().views.num_locals
    return Views([view(case.global_size) for _ in range(2)], [view(case.local_size) for _ in range(num_locals)]).to(
        case.device
    )


def steps(case: Case, *, plain: bool) -> Iterator[Tensor]:
    """Train on the same views for ever; yields each step's loss."""
    method, views, recipe = build_method(case, plain=plain), random_views(case, plain=plain), case.recipe()
    schedule = recipe.optim.schedule(case.batch)
    torch.manual_seed(SEED)
    if plain:
        optimizer = plain_optimizer(recipe.optim, method)
        yield from plain_train(method, repeat(views), optimizer, schedule, start=START, alpha=recipe.alpha)
    else:
        optimizer = recipe.optim.build(method)
        for report in train(method, repeat(views), optimizer, schedule, start=START, alpha=recipe.alpha):
            yield report.loss


class Worker:
    """A process that takes one step of a case at a time, when asked."""

    def __init__(self, case: Case, *, plain: bool) -> None:
        # Spawned, not forked: it starts with nothing but what this program imports.
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=_work, args=(other_end, case, plain), daemon=True)
        self._process.start()
        other_end.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()

    def step(self) -> Timing:
        """Take a step."""
        return self._ask("step")

    def peak_mib(self) -> float:
        """The most memory, in MiB, that the process held at a time: on the device, or in all on a CPU."""
        return self._ask("peak")

    def _ask(self, question: str) -> Any:
        self._connection.send(question)
        return self._connection.recv()


def _work(connection: Connection, case: Case, plain: bool) -> None:
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    trainer = steps(case, plain=plain)
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        connection.send(_step(trainer, case.device) if question == "step" else _peak_mib(case.device))


def _step(trainer: Iterator[Tensor], device: str) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    next(trainer)
    synchronize(device)
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def synchronize(device: str) -> None:
    """Wait for what the device has been told to do."""
    if device != "cpu":
        torch.accelerator.synchronize()


def _peak_mib(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    # Linux counts KiB, macOS bytes.
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
