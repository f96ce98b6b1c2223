"""A recipe's views measured on the images of a source: their sizes, and the local size that matches."""

import numpy as np
from torch import nn

from lowssl_core.backbones import backbone_grid
from lowssl_core.errors import UserError
from lowssl_core.recipe import Recipe
from lowssl_core.sources import Source
from lowssl_core.views import Measurement, measure

# Images whose sizes decide the matched local size.
SIZED_IMAGES = 2000


def measure_views(recipe: Recipe, source: Source, backbone: nn.Module) -> Measurement:
    """What a recipe's views are on the images of `source`, as a run has them: shrunk, sizes on the backbone's grid.

    Raises:
        UserError: the backbone cannot take views of these sizes.
    """
    sizes = source.sizes(np.random.default_rng(recipe.seed), SIZED_IMAGES)
    if recipe.data.shrink_to is not None:
        shortest = sizes.min(axis=1, keepdims=True)
        sizes = np.round(sizes * np.minimum(1, recipe.data.shrink_to / shortest)).astype(np.int64)
    grid = backbone_grid(backbone)
    measurement = measure(recipe.views, sizes, grid=grid)
    for name, size in (("global_size", recipe.views.global_size), ("local_size", measurement.local_size)):
        if size % grid:
            raise UserError(f"views.{name} is {size}; {recipe.backbone.name} takes multiples of {grid}")
    return measurement
