"""Quality of features: retrieval of images from recoloured crops of them, and all label-free figures at once."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from lowssl_core.images import Pixels
from lowssl_core.neighbors import nearest
from lowssl_core.preprocess import Preprocess
from lowssl_core.spectra import (
    Features,
    alignment,
    alpha_req,
    blocks,
    feature_deviation,
    lidar,
    rankme,
    uniformity,
)
from lowssl_core.views import sample_boxes

# What a retrieval copy may lose and how far its colours may move; hue as a share of the colour circle.
COPY_SCALE = (0.3, 1.0)
COPY_JITTER = 0.4
COPY_HUE = 0.1


def label_free_quality(features: Features, views: Features) -> dict[str, float]:
    """All figures that need no labels, of features (N, D) of images and (N, Q, D) of Q augmented copies of each.

    Memory: the arrays, of which `views` may be a np.memmap, two copies of `features`, and what the figures take.

    Args:
        features: of N images, two or more.
        views: of the images' copies, in the same order, two or more of each; retrieval looks at the first ones. With
            `retrieval_copies` of seeds 0 to Q - 1 as copies, retrieval is that of a run's quality.

    Returns:
        "retrieval" (`retrieval_recall`), "rankme", "lidar", "alpha_req" (left out where the features are too few or too
        far collapsed for it), "alignment", "uniformity" and "feature_deviation".

    Raises:
        ValueError: NaN or infinity, or shapes that do not fit.
    """
    if len(features.shape) != 2 or len(views.shape) != 3 or views.shape[::2] != features.shape:
        shapes = f"{tuple(features.shape)} and {tuple(views.shape)}"
        raise ValueError(f"features and views are {shapes}; expected (N, D) and (N, Q, D)")
    alpha = alpha_req(features)
    return {
        "retrieval": retrieval_recall(features, views[:, 0]),
        "rankme": rankme(features),
        "lidar": lidar(views),
        **({} if alpha is None else {"alpha_req": alpha}),
        "alignment": alignment(views),
        "uniformity": uniformity(features),
        "feature_deviation": float(feature_deviation(torch.cat(list(blocks(features, 4096))).float())),
    }


def retrieval_copies(images: Iterable[Pixels], seed: int) -> Iterator[Pixels]:
    """One copy of each image (`retrieval_copy`), made when it is asked for."""
    return (retrieval_copy(image, seed, index) for index, image in enumerate(images))


def retrieval_copy(image: Pixels, seed: int, index: int) -> Pixels:
    """A cropped, flipped and recoloured copy of an image, which depends on the seed, its index and itself alone.

    A copy is a box of .3 to 1 of the image's area with an aspect of 3/4 to 4/3, not resized; mirrored with probability
    .5; brightness, contrast and saturation scaled by U(.6, 1.4) and hue shifted by U(-.1, .1) of the circle.

    Args:
        image: (H, W, 3) uint8, of any size.
        seed: another seed, another copy.
        index: another index, another copy.
    """
    rng = np.random.default_rng((seed, index))
    box = sample_boxes(np.array([image.shape[:2]]), COPY_SCALE, rng)
    top, left, height, width = box[0].tolist()
    crop = image[top : top + height, left : left + width]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    picture = Image.fromarray(np.ascontiguousarray(crop))
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhancer(picture).enhance(rng.uniform(1 - COPY_JITTER, 1 + COPY_JITTER))
    return _shift_hue(picture, rng.uniform(-COPY_HUE, COPY_HUE))


def retrieval_recall(features: Features, copy_features: Features) -> float:
    """Share of images that are found first among all, by cosine, from the features of their copies.

    Args:
        features: (N, D), of the images.
        copy_features: (N, D), of the copies, in the same order.

    Features without any difference between images find one of N.
    """
    if features.shape != copy_features.shape:
        raise ValueError(f"{tuple(features.shape)} features and {tuple(copy_features.shape)} of copies: not one each")
    _, found = nearest(features, copy_features, 1)
    return float((found[:, 0] == torch.arange(len(found))).double().mean())


def raw_pixels(images: Iterable[Pixels], size: int = 16) -> Tensor:
    """Pixels as features (N, 3 * size^2), the yardstick of what needs no learning.

    Each image becomes evaluation-style input of `size` pixels less its own mean over pixels and colours: without
    that mean, which only says how bright an image is, cosines between images come out higher and find less.
    """
    preprocess = Preprocess(size=size)
    return centered_pixels(np.stack([preprocess(image) for image in images]))


def centered_pixels(inputs: Pixels) -> Tensor:
    """Pixels (N, 3 * size^2) of evaluation-style input (N, size, size, 3), less each image's own mean."""
    rows = inputs.reshape(len(inputs), -1).astype(np.float32)
    return torch.from_numpy(rows - rows.mean(1, keepdims=True))


def _shift_hue(picture: Image.Image, share: float) -> Pixels:
    """Turn the hues of an RGB picture by a share of the colour circle."""
    pixels = np.array(picture.convert("HSV"))
    pixels[..., 0] += np.uint8(round(share * 256) % 256)  # a byte wraps as the circle does
    return np.asarray(Image.fromarray(pixels, "HSV").convert("RGB"))
