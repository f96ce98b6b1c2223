"""What the views of an image are: the recipe's settings, and the draw of one image's boxes and magnitudes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from lowssl_core.views.geometry import DRAWS_PER_BOX, boxes_from_uniforms

NUM_GLOBALS = 2

Adjustment = Literal["brightness", "contrast", "saturation", "hue"]
ADJUSTMENTS: tuple[Adjustment, ...] = ("brightness", "contrast", "saturation", "hue")

# Red, green and blue in gray: ITU-R 601, as Pillow converts.
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class PhotometricConfig:
    """Color changes after crop and flip; the defaults are DINO's and MoCo's (Caron et al., 2021, section 3.2).

    The 3-tuples are for the first global view, the second, and every local view. `blur_radius` is the range of the
    Gaussian's standard deviation in pixels of the view.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_probability: float = 0.8
    gray_probability: float = 0.2
    blur_probability: tuple[float, float, float] = (1.0, 0.1, 0.5)
    solarize_probability: tuple[float, float, float] = (0.0, 0.2, 0.0)
    blur_radius: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; a jitter strength is 0 or more")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue is {self.hue}; its strength is a share of the color circle, 0 to 0.5")
        _check_probabilities("jitter_probability", (self.jitter_probability,))
        _check_probabilities("gray_probability", (self.gray_probability,))
        for name in ("blur_probability", "solarize_probability"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} takes three values: first global view, second global view, locals")
            _check_probabilities(name, getattr(self, name))
        if not 0 < self.blur_radius[0] <= self.blur_radius[1]:
            raise ValueError(f"blur_radius is {self.blur_radius}; it takes 0 < smallest <= largest, in pixels")


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Two global and `num_locals` local views of each image; sizes in pixels, scales as shares of the image's area.

    `local_size` "matched" is solved from the data's own image sizes (`matched_local_size`).
    """

    global_size: int = 224
    num_locals: int = 6
    local_size: int | Literal["matched"] = "matched"
    global_scale: tuple[float, float] = (0.3, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.3)
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)

    def __post_init__(self) -> None:
        if self.global_size < 1:
            raise ValueError(f"global_size is {self.global_size}; it takes a number of pixels, 1 or more")
        if self.num_locals < 0:
            raise ValueError(f"num_locals is {self.num_locals}; it takes 0 or more")
        if self.local_size != "matched" and not (isinstance(self.local_size, int) and self.local_size >= 1):
            raise ValueError(f'local_size is {self.local_size!r}; it takes a number of pixels or "matched"')
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} is ({low}, {high}); it takes 0 < smallest <= largest <= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewParameters:
    """One view of one image, everything drawn.

    `box` is top, left, height, width in the image's pixels; `size` the view's side; `jitter` the color adjustments
    with their factors in the order in which they apply (empty: none); `blur_radius` 0 is no blur.
    """

    box: tuple[int, int, int, int]
    size: int
    flip: bool = False
    jitter: tuple[tuple[Adjustment, float], ...] = ()
    gray: bool = False
    blur_radius: float = 0.0
    solarize: bool = False

    def rescaled(self, size: tuple[int, ...], new_size: tuple[int, ...]) -> "ViewParameters":
        """The same view of the image after it was resized from `size` to `new_size`, heights and widths."""
        top, left, height, width = self.box
        rows, columns = new_size[0] / size[0], new_size[1] / size[1]
        top, bottom = round(top * rows), round((top + height) * rows)
        left, right = round(left * columns), round((left + width) * columns)
        return replace(self, box=(top, left, max(bottom - top, 1), max(right - left, 1)))


# Columns of the block of uniform numbers, after those of the box; one row is one view.
_FLIP, _JITTER, _GRAY, _BLUR, _RADIUS, _SOLARIZE = range(DRAWS_PER_BOX, DRAWS_PER_BOX + 6)
_FACTORS = slice(_SOLARIZE + 1, _SOLARIZE + 5)
_ORDER = slice(_SOLARIZE + 5, _SOLARIZE + 9)
_DRAWS_PER_VIEW = _SOLARIZE + 9


def sample_parameters(
    config: ViewsConfig, local_size: int, height: int, width: int, rng: np.random.Generator
) -> list[ViewParameters]:
    """Draw the views of one image of `height` x `width` pixels, globals first.

    Takes the same count of numbers from `rng` whatever is drawn, so the draw for an image depends on nothing but
    the generator's state and the image's size.
    """
    photometric, views = config.photometric, NUM_GLOBALS + config.num_locals
    draws = rng.random((views, _DRAWS_PER_VIEW))
    low, high = _scale_ranges(config)
    boxes = boxes_from_uniforms(draws[:, :DRAWS_PER_BOX], height, width, low, high).tolist()
    least, most = _jitter_ranges(photometric)
    factors = (least + (most - least) * draws[:, _FACTORS]).tolist()
    orders = draws[:, _ORDER].argsort(axis=1).tolist()
    active = (least != most).tolist()
    smallest, largest = photometric.blur_radius
    return [
        ViewParameters(
            box=tuple(boxes[view]),
            size=config.global_size if view < NUM_GLOBALS else local_size,
            flip=row[_FLIP] < 0.5,
            jitter=tuple((ADJUSTMENTS[i], factors[view][i]) for i in orders[view] if active[i])
            if row[_JITTER] < photometric.jitter_probability
            else (),
            gray=row[_GRAY] < photometric.gray_probability,
            blur_radius=smallest + (largest - smallest) * row[_RADIUS]
            if row[_BLUR] < photometric.blur_probability[min(view, NUM_GLOBALS)]
            else 0.0,
            solarize=row[_SOLARIZE] < photometric.solarize_probability[min(view, NUM_GLOBALS)],
        )
        for view, row in enumerate(draws.tolist())
    ]


@cache
def _scale_ranges(config: ViewsConfig) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The smallest and largest crop scale of each view, globals first: two (views,) arrays."""
    scales = np.array([config.global_scale] * NUM_GLOBALS + [config.local_scale] * config.num_locals, np.float64)
    return scales[:, 0], scales[:, 1]


@cache
def _jitter_ranges(photometric: PhotometricConfig) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The smallest and largest factor of each adjustment, two (4,) arrays, as torchvision's ColorJitter has them."""
    strengths = np.array([photometric.brightness, photometric.contrast, photometric.saturation])
    return (
        np.append(np.maximum(0, 1 - strengths), -photometric.hue),
        np.append(1 + strengths, photometric.hue),
    )


def _check_probabilities(name: str, values: Sequence[float]) -> None:
    for value in values:
        if not 0 <= value <= 1:
            raise ValueError(f"{name} holds {value}; a probability is 0 to 1")
