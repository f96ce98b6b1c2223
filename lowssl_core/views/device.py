"""A whole batch's views on its device: crop, flip and resize as matrix products, color per image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lowssl_core.images import Pixels
from lowssl_core.views.batch import Views, normalize
from lowssl_core.views.parameters import ADJUSTMENTS, LUMA, NUM_GLOBALS, ViewParameters, ViewsConfig

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_NOTHING = -1.0

# Columns of a packed view: box, flip, four adjustments, their factors, gray, blur radius, solarize.
_BOX, _FLIP, _KINDS, _FACTORS = slice(0, 4), 4, slice(5, 9), slice(9, 13)
_GRAY, _RADIUS, _SOLARIZE, _COLUMNS = 13, 14, 15, 16


@dataclass(frozen=True)
class ImageBatch:
    """Decoded images and what their views are, packed for the trip to a device.

    `images` is (B, H, W, 3) uint8, each image in the top left corner of its place; `parameters` is
    (B, views, 16) float32 and stays on the host, which needs to know what was drawn.
    """

    images: Tensor
    parameters: Tensor

    def pin_memory(self) -> "ImageBatch":
        """The same in page-locked memory, from where copies to a GPU don't block."""
        return ImageBatch(self.images.pin_memory(), self.parameters.pin_memory())


def pack_images(images: Sequence[Pixels], parameters: Sequence[Sequence[ViewParameters]]) -> ImageBatch:
    """Pad (H, W, 3) uint8 images to the largest height and width, and pack each one's views, globals first."""
    height, width = (max(image.shape[side] for image in images) for side in (0, 1))
    padded = np.zeros((len(images), height, width, 3), np.uint8)
    for place, image in zip(padded, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    packed = torch.tensor([[_pack(view) for view in views] for views in parameters], dtype=torch.float32)
    return ImageBatch(torch.from_numpy(padded), packed)


class DeviceViews:
    """Makes the views of a batch of images on `device`, normalized, without waiting for it.

    The same views as CpuViews.render makes of the same parameters, but for rounding between the operations.
    """

    def __init__(self, config: ViewsConfig, local_size: int, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._sizes = [config.global_size] * NUM_GLOBALS + [local_size] * config.num_locals
        reach = round(3 * config.photometric.blur_radius[1])
        self._shifts = {size: _shifts(size, reach).to(self.device) for size in set(self._sizes)}
        self._luma = torch.tensor(LUMA, device=self.device)

    def __call__(self, batch: ImageBatch) -> Views:
        """The views of `batch`, each (B, 3, S, S)."""
        images = batch.images.to(self.device, non_blocking=True)
        # Each row's colors side by side: both products of the resize then run on it without another copy.
        planes = images.permute(0, 1, 3, 2).float().contiguous()
        views = [self._view(planes, batch.parameters[:, view], size) for view, size in enumerate(self._sizes)]
        return Views(views[:NUM_GLOBALS], views[NUM_GLOBALS:])

    def _view(self, planes: Tensor, host: Tensor, size: int) -> Tensor:
        """One view of every image: `planes` is (B, H, 3, W), `host` (B, 16), the result (B, 3, size, size)."""
        on_device = host.to(self.device, non_blocking=True)
        pixels = _resized_crops(planes, on_device, size)
        for kinds, factors in zip(host[:, _KINDS].T, on_device[:, _FACTORS].T, strict=True):
            pixels = self._adjust(pixels, kinds, factors)
        gray, blurred, solarized = (self._rows(host[:, column] > 0) for column in (_GRAY, _RADIUS, _SOLARIZE))
        if len(gray):
            pixels[gray] = (self._luma @ pixels[gray].flatten(2)).view(-1, 1, size, size).expand(-1, 3, -1, -1)
        if len(blurred):
            pixels[blurred] = self._blur(pixels[blurred], on_device[blurred, _RADIUS])
        if len(solarized):
            pixels[solarized] = torch.minimum(pixels[solarized], 255 - pixels[solarized])
        return normalize(pixels.round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous())

    def _adjust(self, pixels: Tensor, kinds: Tensor, factors: Tensor) -> Tensor:
        """The adjustment at one place of the order, (B,) kinds on the host and factors on the device."""
        if (kinds >= 0).logical_and(kinds != _HUE).any():
            kind = kinds.to(self.device, non_blocking=True)
            is_contrast, is_saturation = kind == _CONTRAST, kind == _SATURATION
            factor = torch.where((kind == _NOTHING) | (kind == _HUE), 1.0, factors)
            flat = pixels.flatten(2)
            # Every adjustment but hue: factor * pixel + (1 - factor) * (nothing, mean gray or the pixel's gray).
            matrix = factor[:, None, None] * torch.eye(3, device=self.device)
            rest = ((1 - factor) * is_saturation)[:, None, None] * self._luma.expand(3, 3)
            mean = (self._luma @ flat.mean(dim=2).T) * (1 - factor) * is_contrast
            pixels = torch.baddbmm(mean[:, None, None].expand(-1, 3, 1), matrix + rest, flat).view_as(pixels)
            pixels.clamp_(0, 255)
        turned = self._rows(kinds == _HUE)
        if len(turned):
            pixels[turned] = _turn_hue(pixels[turned], factors[turned])
        return pixels

    def _blur(self, pixels: Tensor, radii: Tensor) -> Tensor:
        """Gaussian blur of (B, 3, S, S) by (B,) radii, cut at three deviations, with the edges repeated."""
        size = pixels.shape[-1]
        shifts = self._shifts[size]
        reach = shifts.shape[0] // 2
        offsets = torch.arange(-reach, reach + 1, device=self.device)
        weights = torch.exp(-0.5 * (offsets / radii[:, None]) ** 2) * (offsets.abs() <= (3 * radii[:, None]).round())
        weights /= weights.sum(dim=1, keepdim=True)
        matrix = (weights @ shifts.flatten(1)).view(-1, 1, size, size)
        return matrix @ pixels @ matrix.transpose(2, 3)

    def _rows(self, chosen: Tensor) -> Tensor:
        """Indices on the device of what a mask on the host chooses: the host knows their number without waiting."""
        return chosen.nonzero()[:, 0].to(self.device, non_blocking=True)


def _pack(view: ViewParameters) -> list[float]:
    missing = len(ADJUSTMENTS) - len(view.jitter)
    return [
        *view.box,
        view.flip,
        *(ADJUSTMENTS.index(adjustment) for adjustment, _ in view.jitter),
        *[_NOTHING] * missing,
        *(factor for _, factor in view.jitter),
        *[0.0] * missing,
        view.gray,
        view.blur_radius,
        view.solarize,
    ]


def _resized_crops(planes: Tensor, parameters: Tensor, size: int) -> Tensor:
    """The boxes of (B, H, 3, W) images, resized and flipped: (B, 3, size, size), 0 to 255."""
    batch, height, _, width = planes.shape
    top, left, box_height, box_width = parameters[:, _BOX].T
    rows = _resize_weights(top, box_height, height, size)
    columns = _resize_weights(left, box_width, width, size)
    flip = parameters[:, _FLIP, None, None] > 0
    columns = torch.where(flip, columns.flip(1), columns)
    shrunk = rows @ planes.flatten(2)  # (B, size, 3 * W)
    shrunk = shrunk.view(batch, size * 3, width) @ columns.transpose(1, 2)
    return shrunk.view(batch, size, 3, size).permute(0, 2, 1, 3).clamp(0, 255)


def _resize_weights(starts: Tensor, lengths: Tensor, source: int, size: int) -> Tensor:
    """(B, size, source): what each source pixel adds to each pixel of a box resized to `size`, as Pillow weighs it.

    Bicubic (a = -1/2), stretched by the scale when shrinking, cut at the box's edges and normalized.
    """
    scale = (lengths / size)[:, None, None]
    centers = (torch.arange(size, device=starts.device)[:, None] + 0.5) * scale
    positions = torch.arange(source, device=starts.device) - starts[:, None, None]
    distance = ((positions + 0.5 - centers) / scale.clamp(min=1)).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = weights * ((positions >= 0) & (positions < lengths[:, None, None]))
    return weights / weights.sum(dim=2, keepdim=True)


def _turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Add `turns` (B,), in full circles, to the hue of (B, 3, S, S); value and chroma stay (Smith, 1978)."""
    red, green, blue = pixels.unbind(1)
    value, largest = pixels.max(dim=1)
    chroma = value - pixels.amin(dim=1)
    sixth = torch.where(largest == 0, green - blue, torch.where(largest == 1, blue - red, red - green))
    hue = sixth / chroma.clamp(min=1e-6) + 2 * largest + 6 * turns[:, None, None]
    offsets = torch.arange(5, 0, -2, device=pixels.device)[:, None, None]  # 5, 3, 1: made there, nothing is sent
    phase = (hue[:, None] + offsets).remainder(6)
    return value[:, None] - chroma[:, None] * torch.minimum(phase, 4 - phase).clamp(0, 1)


def _shifts(size: int, reach: int) -> Tensor:
    """(2 * reach + 1, size, size): the matrices that shift a row by -reach to reach pixels, repeating its edges."""
    positions = torch.arange(size) + torch.arange(-reach, reach + 1)[:, None]
    return one_hot(positions.clamp(0, size - 1), size).float()
