"""Encoders whose weights are worth exporting: as spread as trained ones, so that each of them shows in the features."""

import dataclasses

import numpy as np
import torch
from torch import nn

from lowssl_core.encoder import Encoder
from lowssl_core.evaluation.timm_models import untrained
from lowssl_core.images import Pixels
from lowssl_core.photos import PHOTOGRAPHS, open_photos, read_photograph
from lowssl_core.recalibration import recalibrate_batchnorm
from lowssl_core.views import normalize


def lively_encoder(name: str, size: int) -> Encoder:
    """An untrained encoder with BatchNorm as training leaves it: statistics of real images, scales and shifts spread.

    Fresh networks have statistics of 0 and 1, scales of 1 and shifts of 0, which an export could lose unnoticed.
    """
    like = untrained("resnet_tiny").info
    encoder = untrained(name, like=dataclasses.replace(like, size=size, resize=size * 8 // 7))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in encoder.backbone.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.6, 1.4, generator=generator)
                layer.bias.normal_(0, 0.2, generator=generator)
    inputs = np.stack([encoder.preprocess(picture) for picture in tiles(16)])
    recalibrate_batchnorm(encoder.backbone, [normalize(torch.from_numpy(inputs))])
    return Encoder(encoder.backbone, dataclasses.replace(encoder.info, name=f"lively {name}", weights_hash=""))


def photographs(count: int) -> list[Pixels]:
    """The first of the packaged photographs, whole."""
    return [read_photograph(photograph) for photograph in PHOTOGRAPHS[:count]]


def tiles(count: int) -> list[Pixels]:
    """Train tiles of all packaged photographs, (64, 64, 3), all different."""
    source = open_photos()
    chosen = np.random.default_rng(0).permutation(len(source))[:count]
    return [np.asarray(source.read(int(index))) for index in chosen]
