"""One image's views on one CPU core: decode once, crop first, uint8 throughout, SIMD kernels."""

from typing import cast

import cv2
import numpy as np
import torch
from cv2.typing import MatLike

from lowssl_core.images import ImageLimits, Pixels, decode, read_size
from lowssl_core.views.parameters import (
    LUMA,
    NUM_GLOBALS,
    Adjustment,
    ViewParameters,
    ViewsConfig,
    sample_parameters,
)

# A saturation of f is _GRAY + f * _COLOR, as a matrix on red, green and blue.
_GRAY = np.tile(np.array(LUMA), (3, 1))
_COLOR = np.eye(3) - _GRAY


class CpuViews:
    """Makes the views of one image: (2, G, G, 3) globals and (V, L, L, 3) locals, uint8 RGB.

    Takes a compressed image, which is decoded at reduced size where its smallest box allows it, or (H, W, 3) pixels.
    Everything drawn comes from the generator given. Raises BadImage.
    """

    def __init__(self, config: ViewsConfig, local_size: int, limits: ImageLimits | None = None) -> None:
        self.config = config
        self.local_size = local_size
        self.limits = limits or ImageLimits()

    def __call__(self, data: bytes | Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
        """Draw the views' parameters from `rng` and make them."""
        image, parameters = read_for_views(data, self.config, self.local_size, rng, self.limits)
        return self.render(image, parameters)

    def render(self, image: Pixels, parameters: list[ViewParameters]) -> tuple[Pixels, Pixels]:
        """Make the views that `parameters` describe, globals first, of an (H, W, 3) uint8 image."""
        cv2.setNumThreads(0)  # one image is one core's work; several images are the loader's workers' business
        size = self.config.global_size
        globals_ = np.empty((NUM_GLOBALS, size, size, 3), np.uint8)
        locals_ = np.empty((self.config.num_locals, self.local_size, self.local_size, 3), np.uint8)
        for view, out in zip(parameters, [*globals_, *locals_], strict=True):
            render_view(image, view, out)
        return globals_, locals_


def read_for_views(
    data: bytes | Pixels,
    config: ViewsConfig,
    local_size: int,
    rng: np.random.Generator,
    limits: ImageLimits | None = None,
) -> tuple[Pixels, list[ViewParameters]]:
    """An image's pixels and its views' parameters, which are drawn from the header's size, before decoding.

    A JPEG all of whose boxes are at least 2, 4 or 8 times as large as their views is decoded at that fraction of
    its size, and the boxes are scaled with it. Raises BadImage.
    """
    if isinstance(data, np.ndarray):
        return data, sample_parameters(config, local_size, data.shape[0], data.shape[1], rng)
    limits = limits or ImageLimits()
    height, width = read_size(data, limits)
    parameters = sample_parameters(config, local_size, height, width, rng)
    image = decode(data, reduce=_reduction(parameters), limits=limits)
    if image.shape[:2] != (height, width):
        parameters = [view.rescaled((height, width), image.shape[:2]) for view in parameters]
    return image, parameters


def _reduction(parameters: list[ViewParameters]) -> int:
    """The largest reduction of the image after which no view has to be enlarged."""
    spare = min(min(view.box[2:]) // view.size for view in parameters)
    return max(reduce for reduce in (1, 2, 4, 8) if reduce <= max(spare, 1))


def render_view(image: Pixels, view: ViewParameters, out: Pixels) -> None:
    """Make one view of `image`, (H, W, 3) uint8, in `out`, (size, size, 3) uint8 and contiguous."""
    resized_crop(image, view.box, view.flip, out)
    for adjustment, factor in view.jitter:
        adjust(out, adjustment, factor)
    pixels: MatLike = cv2.cvtColor(out, cv2.COLOR_RGB2GRAY) if view.gray else out
    if view.blur_radius:
        blur(pixels, view.blur_radius)
    if view.solarize:
        cv2.min(pixels, cv2.bitwise_not(pixels), dst=pixels)  # the same as inverting what is 128 or more
    if view.gray:
        cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB, dst=out)


def resized_crop(image: Pixels, box: tuple[int, int, int, int], flip: bool, out: Pixels) -> None:
    """Resize a box (top, left, height, width) of `image` into `out`: bicubic, anti-aliased, as Pillow does it."""
    top, left, height, width = box
    crop = image[top : top + height, left : left + width]
    crop = cast(Pixels, cv2.flip(crop, 1)) if flip else crop.copy()
    # What `interpolate` calls; given where to write, it makes no planar result and is twice as fast.
    torch.ops.aten._upsample_bicubic2d_aa.out(
        torch.from_numpy(crop.transpose(2, 0, 1)[None]),
        out.shape[:2],
        align_corners=False,
        out=torch.from_numpy(out.transpose(2, 0, 1)[None]),
    )


def adjust(pixels: Pixels, adjustment: Adjustment, factor: float) -> None:
    """Apply one color adjustment to a uint8 RGB image in place, rounded and clipped, as torchvision's on PIL images."""
    if adjustment == "brightness":
        cv2.convertScaleAbs(pixels, dst=pixels, alpha=factor)
    elif adjustment == "contrast":
        red, green, blue, _ = cv2.mean(pixels)
        mean = int(LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + 0.5)
        cv2.addWeighted(pixels, factor, pixels, 0, (1 - factor) * mean, dst=pixels)
    elif adjustment == "saturation":
        cv2.transform(pixels, _GRAY + factor * _COLOR, dst=pixels)
    else:
        cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL, dst=pixels)
        # Hue is a byte that wraps; adding (shift, 0, 0) to whole rows is what NumPy does with SIMD.
        shift = np.zeros((pixels.shape[1], 3), np.uint8)
        shift[:, 0] = round(factor * 256) % 256
        rows = pixels.reshape(pixels.shape[0], -1)
        np.add(rows, shift.reshape(-1), out=rows)
        cv2.cvtColor(pixels, cv2.COLOR_HSV2RGB_FULL, dst=pixels)


def blur(pixels: MatLike, radius: float) -> None:
    """Blur by a Gaussian with a standard deviation of `radius` pixels, in place; edges are repeated."""
    kernel = cv2.getGaussianKernel(2 * round(3 * radius) + 1, radius, cv2.CV_32F)
    # Twice as fast as GaussianBlur, whose path for bytes is written to be bit-exact.
    cv2.sepFilter2D(pixels, -1, kernel, kernel, dst=pixels, borderType=cv2.BORDER_REPLICATE)
