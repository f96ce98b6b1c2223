"""A recipe's views on one's own images before any training: measured as a run does, as a table and a figure."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowssl_core.backbones import build_backbone
from lowssl_core.errors import UserError
from lowssl_core.figures import views_figure
from lowssl_core.measurement import measure_views
from lowssl_core.recipe import Recipe
from lowssl_core.sources import Source
from lowssl_core.sources.memory import load_images
from lowssl_core.views import Measurement, ViewsConfig

# How many images the one for the figure is chosen from.
CANDIDATES = 32


def preview(path: Path, recipe: Recipe, source: Source) -> Measurement:
    """Measure a recipe's views on the images of `source` and write the figure to `path`.

    Raises:
        UserError: a backbone that does not take views of these sizes, or no readable image.
    """
    backbone, _ = build_backbone(recipe.backbone.name)
    measurement = measure_views(recipe, source, backbone)
    views_figure(path, _choose_image(source, recipe.data.shrink_to), recipe.views, measurement)
    return measurement


def views_table(config: ViewsConfig, measured: Measurement) -> str:
    """A measurement in lines."""
    rows = [
        ("", "global", "local", ""),
        ("number and size", f"2 x {config.global_size} px", f"{config.num_locals} x {measured.local_size} px", ""),
        ("scale", *(f"{low:g} to {high:g}" for low, high in (config.global_scale, config.local_scale)), ""),
        (
            "mean crop scale",
            f"{measured.global_crop_scale:.3f}",
            f"{measured.local_crop_scale:.3f}",
            "share of the image's area",
        ),
        (
            "mean pixel scale",
            f"{measured.global_pixel_scale:.3f}",
            f"{measured.local_pixel_scale:.3f}",
            "source pixels per pixel of the view",
        ),
    ]
    lines = [f"{name:<20}{globals_:>12}{locals_:>14}   {unit}".rstrip() for name, globals_, locals_, unit in rows]
    lines.append(f"{'mean(PS_l / PS_g)':<20}{measured.ratio:>12.3f}")
    lines.append(f"{'matched local size':<20}{f'{measured.matched_size} px':>12}")
    return "\n".join(lines)


def _choose_image(source: Source, shrink_to: int | None) -> NDArray[np.uint8]:
    """The image with the strongest contrast of a few drawn: a plain wall would show nothing."""
    images, _, _ = load_images(source, limit=CANDIDATES, shrink_to=shrink_to)
    if not images:
        raise UserError(f"{source.description}: none of {CANDIDATES} images drawn can be read")
    return max(images, key=lambda image: float(image.mean(2).std()))
