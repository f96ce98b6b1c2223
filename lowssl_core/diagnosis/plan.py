"""What a diagnosis trains: the swept values, the recipe of each, and where its trainings lie."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowssl_core.backbones import backbone_grid, build_backbone
from lowssl_core.errors import UserError
from lowssl_core.losses import default_alpha
from lowssl_core.measurement import measure_views
from lowssl_core.recipe import Recipe, load_recipe
from lowssl_core.sources import Source, open_source
from lowssl_core.sources.layout import SPLITS
from lowssl_core.sources.opening import open_held_out
from lowssl_core.views import Measurement

Kind = Literal["crop-scale", "pixel-scale", "alpha"]
# What is swept where nothing else is asked for; of pixel scales these are ratios, and the nearest sizes are taken.
CROP_SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
RATIOS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True, kw_only=True)
class DiagnosisOptions:
    """What is swept, and where.

    Attributes:
        kind: what is swept.
        recipe: as `load_recipe` takes it.
        overrides: of the recipe.
        data: images to train on, as `open_source` takes them; with labels the bank of k-NN.
        eval_data: images to judge on; None: the test or validation split of `data`, or `data` itself.
        out: folder of the trainings and the figure.
        json: file for all numbers.
        values: those to sweep; None: the usual ones.
        seeds: how many trainings each value gets, with the recipe's seed and the ones after it.
        device: where networks run, as `choose_device` takes it.
    """

    kind: Kind
    recipe: str
    overrides: Sequence[str]
    data: str
    eval_data: str | None
    out: Path
    json: Path
    values: Sequence[float] | None
    seeds: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Swept:
    """One value of a sweep.

    Attributes:
        value: s0, the local size in pixels, or alpha.
        recipe: the one with this value; local size and alpha are numbers.
        measurement: of its views on the data.
        is_own: whether it is the recipe as the user gave it.
    """

    value: float
    recipe: Recipe
    measurement: Measurement
    is_own: bool

    def overrides(self, seed: int) -> list[str]:
        """What makes the user's recipe this one, with another seed, as `load_recipe` takes it."""
        views = self.recipe.views
        return [
            f"views.global_scale={list(views.global_scale)}",
            f"views.local_scale={list(views.local_scale)}",
            f"views.local_size={views.local_size}",
            f"alpha={self.recipe.alpha}",
            f"seed={seed}",
        ]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Everything a diagnosis is going to do.

    Attributes:
        options: what was asked for.
        own: the recipe as the user gave it, but local size and alpha are numbers.
        own_measurement: of its views.
        swept: the values, ascending.
        train: the training images.
        judged_on: the data to judge on, as `open_source` takes it.
        judged: those images.
        has_labels: whether there is a k-NN accuracy: other images than the training ones, with the same classes.
    """

    options: DiagnosisOptions
    own: Recipe
    own_measurement: Measurement
    swept: Sequence[Swept]
    train: Source
    judged_on: str
    judged: Source
    has_labels: bool

    @property
    def seeds(self) -> range:
        """The same for each value, so that values are compared in pairs."""
        return range(self.own.seed, self.own.seed + self.options.seeds)

    def trainings(self) -> Iterator[tuple[Swept, int]]:
        """All of them, value and seed: the first seed of every value comes before the second of any."""
        return ((swept, seed) for seed in self.seeds for swept in self.swept)

    def folder(self, swept: Swept, seed: int) -> Path:
        """Where a training lies: recipe and data are in the name, so that sweeps share it and never mix it up."""
        recipe = dataclasses.replace(swept.recipe, seed=seed)
        views = recipe.views
        key = digest(recipe.hash(), absolute(self.options.data), self.train.description)
        name = f"s{views.global_scale[0]:g}-local{views.local_size}-alpha{recipe.alpha:.3g}-seed{seed}-{key}"
        return self.options.out / "runs" / name


def plan(options: DiagnosisOptions) -> Sweep:
    """Open what the user named and find the swept recipes.

    Raises:
        UserError: data, recipe or values cannot be used.
    """
    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: wanted a whole number from 1")
    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.views.num_locals == 0:
        raise UserError(f"recipe {options.recipe}: views.num_locals is 0; a diagnosis is of local views")
    train = open_source(options.data)
    judged_on = options.eval_data or _held_out(options.data) or options.data
    judged = open_source(judged_on)
    is_same = judged.description == train.description and absolute(judged_on) == absolute(options.data)
    measurement = measure_views(recipe, train, build_backbone(recipe.backbone.name)[0])
    own = dataclasses.replace(
        recipe,
        alpha=default_alpha_of(recipe) if recipe.alpha is None else recipe.alpha,
        views=dataclasses.replace(recipe.views, local_size=measurement.local_size),
    )
    return Sweep(
        options=options,
        own=own,
        own_measurement=measurement,
        swept=sweep_values(options.kind, own, train, options.values),
        train=train,
        judged_on=judged_on,
        judged=judged,
        has_labels=train.classes is not None and judged.classes == train.classes and not is_same,
    )


def default_alpha_of(recipe: Recipe) -> float:
    """The alpha at which all pairs of views count the same: 1 / (1 + V) for each method.

    DINO and SwAV have 2 global and 2V local pairs, MoCo 1 and V.
    """
    return default_alpha(1, recipe.views.num_locals)


def sweep_values(kind: Kind, own: Recipe, source: Source, values: Sequence[float] | None) -> list[Swept]:
    """The values of a sweep, ascending.

    Args:
        kind: what is swept.
        own: the user's recipe, its local size and alpha as numbers.
        source: the training images.
        values: those asked for; None: the usual ones and the recipe's own.

    Raises:
        UserError: a value out of range, or one given twice.
    """
    backbone, _ = build_backbone(own.backbone.name)
    grid = backbone_grid(backbone)
    if values is None:
        values = _usual_values(kind, own, measure_views(own, source, backbone), grid)
    for value in values:
        _check_value(kind, own, value, grid)
    if len(set(values)) < len(values):
        raise UserError(f"--values {' '.join(f'{value:g}' for value in values)}: one is given twice")
    swept = []
    for value in sorted(values):
        recipe = _with_value(kind, own, value)
        measured = measure_views(recipe, source, backbone)
        views = dataclasses.replace(recipe.views, local_size=measured.local_size)
        recipe = dataclasses.replace(recipe, views=views)
        swept.append(Swept(value=value, recipe=recipe, measurement=measured, is_own=recipe == own))
    return swept


def _with_value(kind: Kind, own: Recipe, value: float) -> Recipe:
    """The recipe with a swept value; with crop scales the size is matched anew, so that pixel scales stay equal."""
    if kind == "alpha":
        return dataclasses.replace(own, alpha=value)
    if kind == "pixel-scale":
        return dataclasses.replace(own, views=dataclasses.replace(own.views, local_size=int(value)))
    views = dataclasses.replace(
        own.views,
        global_scale=(value, own.views.global_scale[1]),
        local_scale=(own.views.local_scale[0], value),
        local_size="matched",
    )
    return dataclasses.replace(own, views=views)


def _usual_values(kind: Kind, own: Recipe, measured: Measurement, grid: int) -> list[float]:
    if kind == "alpha":
        assert own.alpha is not None, "plan has put in the default"
        # Of values that differ by rounding alone the recipe's own is kept.
        return list({round(value, 9): value for value in (*ALPHAS, default_alpha_of(own), own.alpha)}.values())
    if kind == "pixel-scale":
        matched = measured.local_size * math.sqrt(measured.ratio)
        sizes = {max(grid, grid * round(matched / math.sqrt(ratio) / grid)) for ratio in RATIOS}
        return [float(size) for size in {*sizes, measured.local_size} if size <= own.views.global_size]
    low, high = own.views.local_scale[0], own.views.global_scale[1]
    # Where globals begin where locals end, that is the recipe's own s0.
    own_scale = {own.views.global_scale[0]} & {own.views.local_scale[1]}
    return [scale for scale in {*CROP_SCALES, *own_scale} if low <= scale <= high]


def _check_value(kind: Kind, own: Recipe, value: float, grid: int) -> None:
    """Refuse what cannot be swept.

    Raises:
        UserError: the value is out of range.
    """
    if kind == "alpha" and not 0 <= value <= 1:
        raise UserError(f"--values {value:g}: alpha is a number from 0 to 1")
    if kind == "pixel-scale" and not (float(value).is_integer() and value >= 1 and value % grid == 0):
        wanted = "whole numbers from 1" if grid == 1 else f"multiples of {grid}, as {own.backbone.name} needs them"
        raise UserError(f"--values {value:g}: local sizes in pixels are {wanted}")
    low, high = own.views.local_scale[0], own.views.global_scale[1]
    if kind == "crop-scale" and not low <= value <= high:
        raise UserError(
            f"--values {value:g}: s0 is from the smallest local crop to the largest global, {low:g} to {high:g}"
        )


def _held_out(data: str) -> str | None:
    """The held-out split of the data at `data`, as `open_source` takes it, or None."""
    try:
        split = open_held_out(data).split
    except UserError:
        return None
    head, _, tail = data.rpartition("::")
    return f"{head if head and tail in SPLITS else data}::{split}"


def absolute(origin: str) -> str:
    """The data's path as one that does not depend on the working folder."""
    return str(Path(origin).expanduser().absolute())


def digest(*parts: str) -> str:
    """Ten hexadecimal digits that tell these texts from others."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]
