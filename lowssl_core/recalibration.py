"""BatchNorm statistics estimated anew on evaluation-style images, pooled over all of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowssl_core.embedding import input_batches
from lowssl_core.encoder import Encoder
from lowssl_core.images import BadImage
from lowssl_core.sources import Source
from lowssl_core.sources.memory import read_pixels


@dataclass(frozen=True, kw_only=True)
class Recalibration:
    """What was done: how many BatchNorm layers were changed (0: there are none), on how many images."""

    layers: int
    images: int


class _Pool:
    """Sums over every value that reaches one BatchNorm layer, by channel, in float64."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.count = 0
        self.sum = torch.zeros(layer.num_features, dtype=torch.float64)
        self.squares = torch.zeros(layer.num_features, dtype=torch.float64)

    def add(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A forward pre-hook: `inputs[0]` is (B, C, ...)."""
        values = inputs[0].detach().transpose(0, 1).flatten(1).double()
        self.count += values.shape[1]
        self.sum += values.sum(1).cpu()
        self.squares += values.square().sum(1).cpu()


def recalibrate_batchnorm(backbone: nn.Module, batches: Iterable[Tensor]) -> Recalibration:
    """Replace every BatchNorm's running mean and variance by those of all `batches` together.

    While they are estimated each batch is normalised by its own statistics, so batches should be large and mixed. What
    is pooled is the mean and the mean square of all values, as in "precise BatchNorm" (Wu and Johnson, "Rethinking
    'Batch' in BatchNorm", 2021, section 3): no moving average, and batches count by their size. With a single batch the
    result is exactly what BatchNorm itself computes. Everything else stays in evaluation mode.

    Args:
        backbone: changed in place; handed back in evaluation mode.
        batches: normalised images (B, 3, S, S) on the backbone's device; at least two images each.

    Returns:
        How many layers and images; a backbone without BatchNorm is left as it is, and the batches unread.

    Raises:
        ValueError: there are no batches, or one of a single image.
    """
    layers = [
        layer
        for layer in backbone.modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats and layer.running_mean is not None
    ]
    backbone.eval()
    if not layers:
        return Recalibration(layers=0, images=0)
    pools = [_Pool(layer) for layer in layers]
    images = 0
    momenta = [layer.momentum for layer in layers]
    hooks = [
        layer.register_forward_pre_hook(partial(_Pool.add, pool)) for layer, pool in zip(layers, pools, strict=True)
    ]
    try:
        for layer in layers:
            layer.train()
            layer.momentum = 0.0  # normalises by the batch and leaves the running statistics alone
        with torch.no_grad():
            for batch in batches:
                if len(batch) < 2:
                    raise ValueError("a batch of one image has no statistics to be normalised by")
                backbone(batch)
                images += len(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        backbone.eval()
    if images == 0:
        raise ValueError("there are no images to re-estimate BatchNorm on")
    for layer, pool in zip(layers, pools, strict=True):
        _set_statistics(layer, pool)
    return Recalibration(layers=len(layers), images=images)


def mixed_batches(source: Source, encoder: Encoder, *, limit: int, batch_size: int = 128) -> Iterator[Tensor]:
    """Evaluation-style input for `encoder`: at most `limit` images of `source`, in a fixed random order.

    Images that cannot be read are passed over, and so is one that would be alone in the last batch.
    """
    order = np.random.default_rng(0).permutation(len(source))[:limit]
    for batch in input_batches(_readable(source, order), encoder.preprocess, batch_size, encoder.backbone):
        if len(batch) > 1:
            yield batch


def _readable(source: Source, order: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    for index in order:
        try:
            yield read_pixels(source, int(index))
        except BadImage:
            continue


def _set_statistics(layer: _BatchNorm, pool: _Pool) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean = pool.sum / pool.count
    variance = (pool.squares / pool.count - mean.square()).clamp(min=0)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance * pool.count / (pool.count - 1))  # unbiased, as BatchNorm keeps it
