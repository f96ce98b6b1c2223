"""Projection heads, and the network of a backbone and a head that sees views of several sizes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Network(nn.Module):
    """A backbone and a head.

    Attributes:
        backbone: (B, 3, S, S) to (B, width).
        width: of the features.
        head: (N, width) to (N, D).
        autocast_dtype: the lower precision that the backbone runs in; None: as the weights are. Heads run in fp32.
    """

    def __init__(self, backbone: nn.Module, width: int, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.width = width
        self.head = head
        self.autocast_dtype: torch.dtype | None = None

    def forward(self, *resolutions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Look at views: the backbone once for each resolution, the head once for all (BatchNorm depends on it).

        Args:
            resolutions: lists of views, each view (B, 3, S, S) with one S within a list; an empty list adds nothing.

        Returns:
            The head's output (V, B, D) and the backbone's features (V, B, width), views in the order given.
        """
        views = [torch.cat(list(group)) for group in resolutions if group]
        features = torch.cat([self.look(images) for images in views]).float()
        batch = resolutions[0][0].shape[0]
        with torch.autocast(features.device.type, enabled=False):
            outputs = self.head(features)
        return outputs.view(-1, batch, outputs.shape[1]), features.view(-1, batch, features.shape[1])

    def look(self, images: Tensor) -> Tensor:
        """The backbone's features (B, width) of images (B, 3, S, S), in the network's precision."""
        dtype = self.autocast_dtype
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            return cast(Tensor, self.backbone(images))


class Normalize(nn.Module):
    """L2-normalises rows."""

    def forward(self, rows: Tensor) -> Tensor:
        """(N, D) to (N, D) with rows of length 1."""
        return F.normalize(rows, dim=-1)


class WeightNormLinear(nn.Module):
    """A linear map without bias whose (K, D) weight is gain * direction / |direction|, row by row.

    The gain starts at 1; DINO's CNN recipes keep it there (`gain_trainable` off).
    """

    def __init__(self, width: int, outputs: int, *, gain_trainable: bool) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(outputs, width))
        self.gain = nn.Parameter(torch.ones(outputs, 1), requires_grad=gain_trainable)
        nn.init.trunc_normal_(self.direction, std=0.02)

    def forward(self, rows: Tensor) -> Tensor:
        """(N, D) to (N, K)."""
        return F.linear(rows, self.gain * F.normalize(self.direction, dim=-1))


def mlp(widths: Sequence[int], *, activation: type[nn.Module], batchnorm: bool) -> nn.Sequential:
    """Linear layers from widths[0] to widths[-1]; BatchNorm (if asked) and activation between."""
    layers: list[nn.Module] = []
    for width, next_width in pairwise(widths[:-1]):
        # BatchNorm has its own shift.
        layers.append(nn.Linear(width, next_width, bias=not batchnorm))
        if batchnorm:
            layers.append(nn.BatchNorm1d(next_width))
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))
