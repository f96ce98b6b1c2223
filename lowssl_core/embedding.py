"""Features of images from a backbone in evaluation mode, a batch at a time."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowssl_core.preprocess import Preprocess
from lowssl_core.views import normalize


def embed(
    backbone: nn.Module, images: Iterable[NDArray[np.uint8]], preprocess: Preprocess, batch_size: int = 64
) -> Tensor:
    """Features (N, D) of images, float32, on the CPU, not L2-normalised; `backbone` must be in evaluation mode."""
    if backbone.training:
        raise ValueError("the backbone is in training mode: features would depend on how images are batched")
    with torch.inference_mode():
        features = [backbone(batch).float().cpu() for batch in input_batches(images, preprocess, batch_size, backbone)]
    if not features:
        raise ValueError("there are no images to embed")
    return torch.cat(features).clone()  # a plain tensor: one of inference mode cannot be trained on


def embed_inputs(backbone: nn.Module, inputs: NDArray[np.uint8]) -> Tensor:
    """Features (B, D), float32, on the CPU, of evaluation-style input (B, size, size, 3); as `embed` otherwise."""
    device = next(backbone.parameters()).device
    with torch.inference_mode():
        features: Tensor = backbone(normalize(torch.from_numpy(inputs).to(device))).float().cpu()
    return features.clone()


def input_batches(
    images: Iterable[NDArray[np.uint8]], preprocess: Preprocess, batch_size: int, backbone: nn.Module
) -> Iterator[Tensor]:
    """Evaluation-style input for `backbone` on its device, (B, 3, size, size) each, a batch at a time."""
    device = next(backbone.parameters()).device
    remaining = iter(images)
    while batch := [preprocess(image) for image in islice(remaining, batch_size)]:
        yield normalize(torch.from_numpy(np.stack(batch)).to(device))
