"""The paper's views as plain torchvision v1 transforms over PIL images: what the fast pipeline is measured against."""

import io
import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

from lowssl_core.views import IMAGENET_MEAN, IMAGENET_STD, ViewsConfig


class GaussianBlur:
    """PIL's Gaussian blur with probability p and a radius from U(radius)."""

    def __init__(self, p: float, radius: tuple[float, float]) -> None:
        self.p = p
        self.radius = radius

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.radius)))


class Solarize:
    """Invert every value from 128 up, with probability p."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.p else image


class YardstickViews:
    """All views of one compressed image, globals first: normalized float tensors (3, S, S)."""

    def __init__(self, config: ViewsConfig, local_size: int) -> None:
        kinds = [(config.global_size, config.global_scale, kind) for kind in (0, 1)]
        kinds += [(local_size, config.local_scale, 2)] * config.num_locals
        self.transforms = [_transform(config, *kind) for kind in kinds]

    def __call__(self, data: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [transform(image) for transform in self.transforms]


def _transform(config: ViewsConfig, size: int, scale: tuple[float, float], kind: int) -> Callable[[Image.Image], Any]:
    photometric = config.photometric
    jitter = transforms.ColorJitter(
        photometric.brightness, photometric.contrast, photometric.saturation, photometric.hue
    )
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([jitter], photometric.jitter_probability),
            transforms.RandomGrayscale(photometric.gray_probability),
            GaussianBlur(photometric.blur_probability[kind], photometric.blur_radius),
            Solarize(photometric.solarize_probability[kind]),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
