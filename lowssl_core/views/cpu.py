"""One image's views on one CPU core: decode once, crop first, uint8 throughout, SIMD kernels."""

import cv2
import numpy as np
import torch
from cv2.typing import MatLike
from torch.nn import functional

from lowssl_core.images import ImageLimits, Pixels, decode, read_size
from lowssl_core.views.parameters import NUM_GLOBALS, ViewParameters, ViewsConfig, sample_parameters

# ITU-R 601 luma, as Pillow's conversion to gray has it.
LUMA = np.array([0.299, 0.587, 0.114])


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
        cv2.setNumThreads(0)  # one image is one core's work; the pool of threads is the loader's
        image, parameters = read_for_views(data, self.config, self.local_size, rng, self.limits)
        size = self.config.global_size
        globals_ = np.empty((NUM_GLOBALS, size, size, 3), np.uint8)
        locals_ = np.empty((self.config.num_locals, self.local_size, self.local_size, 3), np.uint8)
        for view, one in enumerate(parameters):
            out = globals_[view] if view < NUM_GLOBALS else locals_[view - NUM_GLOBALS]
            render(image, one, out)
        return globals_, locals_


def read_for_views(
    data: bytes | Pixels,
    config: ViewsConfig,
    local_size: int,
    rng: np.random.Generator,
    limits: ImageLimits | None = None,
) -> tuple[Pixels, list[ViewParameters]]:
    """An image's pixels and the parameters of its views, drawn before decoding from the size in the header."""
    if isinstance(data, np.ndarray):
        return data, sample_parameters(config, local_size, data.shape[0], data.shape[1], rng)
    limits = limits or ImageLimits()
    height, width = read_size(data, limits)
    parameters = sample_parameters(config, local_size, height, width, rng)
    image = decode(data, limits=limits)
    return image, parameters


def render(image: Pixels, view: ViewParameters, out: Pixels) -> None:
    """Make one view of `image`, (H, W, 3) uint8, in `out`, (size, size, 3) uint8."""
    pixels: MatLike = resized_crop(image, view.box, view.size)
    for name, factor in view.jitter:
        pixels = _adjust(pixels, name, factor)
    if view.gray:
        pixels = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if view.blur_radius:
        pixels = cv2.GaussianBlur(pixels, (0, 0), view.blur_radius, borderType=cv2.BORDER_REPLICATE)
    if view.solarize:
        pixels = cv2.min(pixels, cv2.bitwise_not(pixels))
    if view.flip:
        cv2.flip(pixels, 1, dst=out)
    else:
        out[:] = pixels


def resized_crop(image: Pixels, box: tuple[int, int, int, int], size: int) -> Pixels:
    """The box (top, left, height, width) of `image` as (size, size, 3): bicubic, anti-aliased, as Pillow resizes."""
    top, left, height, width = box
    crop = torch.from_numpy(image[top : top + height, left : left + width])
    resized = functional.interpolate(
        crop.permute(2, 0, 1).unsqueeze(0), size=(size, size), mode="bicubic", antialias=True
    )
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def _adjust(pixels: MatLike, name: str, factor: float) -> MatLike:
    if name == "brightness":
        return cv2.addWeighted(pixels, factor, pixels, 0, 0)
    if name == "contrast":
        mean = float(np.dot(cv2.mean(pixels)[:3], LUMA))
        return cv2.addWeighted(pixels, factor, pixels, 0, (1 - factor) * round(mean))
    if name == "saturation":
        return cv2.transform(pixels, factor * np.eye(3) + (1 - factor) * LUMA)
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(factor * 255) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
