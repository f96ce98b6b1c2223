"""A round of local training: what is asked, which images each batch is made of, and what came of it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from client.drift import DriftReading
from lowssl_core.order import Draw, Order, Stream


@dataclass(frozen=True, kw_only=True)
class RoundTask:
    """What a round is asked to do.

    Attributes:
        number: of the federation's round, or the device's own count.
        run: which of the server's runs it belongs to, "" for none; with the number it tells rounds apart.
        version: of the global model that arrived with it.
        proximal: mu of FedProx, 0 for none.
    """

    number: int
    run: str = ""
    version: int = 0
    proximal: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a round trains, and on what.

    Attributes:
        new_share: of the images of a batch, new ones; the rest is replayed.
        new_images: how many new images a round takes at most; the others wait for the next one.
        epochs: passes over the new images; a round without new images takes as many over the memory, up to
            `new_images` of it.
        steps: so many steps instead.
    """

    new_share: float = 0.25
    new_images: int = 512
    epochs: float = 2.0
    steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.new_share <= 1:
            raise ValueError(f"new_share is {self.new_share}; it is a number above 0, up to 1")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs is {self.epochs}; it is a number above 0")
        for name in ("new_images", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it is a whole number from 1")


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round as it was planned; it says nothing of single images.

    Attributes:
        task: what was asked.
        first_step: the learner's clock when it began.
        steps: how many it takes; 0: there is nothing to learn from.
        new_images: seen for the first time.
        memory_images: that may be replayed.
        new_rows: of each batch, new images.
        replayed_rows: of each batch, replayed ones.
        mu: the share of its own weights that the device kept when the global model arrived; None: none arrived.
        drift: share of the new images that are far from the memory; None where it cannot be told.
        alarm: whether that share has risen by more than chance.
    """

    task: RoundTask
    first_step: int
    steps: int
    new_images: int
    memory_images: int
    new_rows: int
    replayed_rows: int
    mu: float | None
    drift: float | None
    alarm: bool

    @property
    def rows(self) -> int:
        """Images of a batch."""
        return self.new_rows + self.replayed_rows

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Round":
        """Read what `dataclasses.asdict` made of a round."""
        return cls(**tree | {"task": RoundTask(**tree["task"])})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a round.

    Attributes:
        round: as it was planned.
        steps: that were taken.
        images: different images that were trained on, the weight of the round's update.
        replayed_images: how many of them came from the memory.
        loss: mean over the steps; None without any.
        seconds: spent on the steps.
    """

    round: Round
    steps: int
    images: int
    replayed_images: int
    loss: float | None
    seconds: float


def compose(batch_size: int, new_share: float, new: int, memory: int) -> tuple[int, int]:
    """How many new and replayed images a batch holds where so many of each exist; no image twice, fewer if need be."""
    wanted = min(new, max(1, round(batch_size * new_share)))
    replayed = min(memory, batch_size - wanted)
    return min(new, batch_size - replayed), replayed


def count_steps(budget: Budget, new: int, memory: int, new_rows: int, replayed_rows: int) -> int:
    """How many steps a round takes; a batch of one image has no BatchNorm statistics, so none then."""
    if new_rows + replayed_rows < 2:
        return 0
    if budget.steps is not None:
        return budget.steps
    if new:
        return math.ceil(budget.epochs * new / new_rows)
    return math.ceil(budget.epochs * min(memory, budget.new_images) / replayed_rows)


def plan_round(
    task: RoundTask,
    budget: Budget,
    *,
    first_step: int,
    batch_size: int,
    images: tuple[int, int],
    mu: float | None,
    reading: DriftReading,
) -> Round:
    """A round over so many new and remembered `images`; the rest as `Round` has it."""
    new, memory = images
    new_rows, replayed_rows = compose(batch_size, budget.new_share, new, memory)
    return Round(
        task=task,
        first_step=first_step,
        steps=count_steps(budget, new, memory, new_rows, replayed_rows),
        new_images=new,
        memory_images=memory,
        new_rows=new_rows,
        replayed_rows=replayed_rows,
        mu=mu,
        drift=reading.share,
        alarm=reading.alarm,
    )


def draws(plan: Round, seed: int, start: int) -> Iterator[Draw]:
    """The batches of a round from its step `start` on, a pure function of seed, round and step.

    Indices count the new images first, then the memory's; the new ones of a batch come first too. Each kind is drawn
    without replacement, pass after pass. A draw's epoch is the learner's step, so that no image gets views again.
    """
    kinds = []
    counts = ((0, plan.new_images, plan.new_rows), (plan.new_images, plan.memory_images, plan.replayed_rows))
    for kind, (offset, images, rows) in enumerate(counts):
        if rows:
            # One stream of random numbers for each round and kind.
            stream = Stream((seed << 64) + 2 * plan.first_step + kind)
            order = Order(images, rows, stream, rank=0, world_size=1, start_step=start)
            kinds.append((offset, iter(order)))
    for step in range(start, plan.steps):
        indices = [offset + next(order).indices for offset, order in kinds]
        yield Draw(plan.first_step + step, np.concatenate(indices))
