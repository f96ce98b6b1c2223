"""A batch of views as methods take it, and the one normalization from uint8 to float."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# Mean and standard deviation of ImageNet's pixels, red, green, blue, on a scale of 0 to 1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Views:
    """Views of B images: each a (B, 3, S, S) normalized float tensor in channels_last memory.

    `globals` holds the two global views, `locals` the local ones (empty: a recipe of two crops).
    """

    globals: list[Tensor]
    locals: list[Tensor]

    def to(self, device: torch.device | str) -> "Views":
        """The same views on `device`."""
        return Views(
            [view.to(device, non_blocking=True) for view in self.globals],
            [view.to(device, non_blocking=True) for view in self.locals],
        )


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, S, S, 3) to float (B, 3, S, S) in channels_last memory, by ImageNet's mean and deviation."""
    batch, height, width, _ = images.shape
    # Rows of width * 3 numbers, not of 3: the innermost loop is then long enough for SIMD.
    rows = images.reshape(batch, height, width * 3).float()
    shift, scale = _affine(width, images.device)
    torch.addcmul(shift, rows, scale, out=rows)
    return rows.view(batch, height, width, 3).permute(0, 3, 1, 2)


@cache
def _affine(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What is added to and multiplied with a row of `width` pixels, (3 * width,) each; sent to the device only once."""
    with torch.inference_mode(False):  # kept for training, wherever the first call comes from
        mean, deviation = (torch.tensor(values).repeat(width) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (-mean / deviation).to(device), (255 * deviation).reciprocal().to(device)
