"""Quality of features: RankMe, weighted k-NN, and retrieval of images from recoloured crops, no labels needed."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lowssl_core.preprocess import Preprocess
from lowssl_core.views import sample_boxes

Pixels = NDArray[np.uint8]

# What a retrieval copy may lose and how far its colours may move; hue as a share of the colour circle.
COPY_SCALE = (0.3, 1.0)
COPY_JITTER = 0.4
COPY_HUE = 0.1


def rankme(features: Tensor) -> float:
    """exp(entropy of the normalised singular values) of features (N, D): their effective rank, 0 to min(N, D).

    Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by Their
    Rank" (2023), equation 1. Features that are all zero have rank 0.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum()
    return float(entropy.exp()) if shares.any() else 0.0


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> float:
    """Share of queries whose class wins the vote of their `k` nearest in the bank, each weighing exp(cosine / T).

    Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018), section 3.4.

    Args:
        bank: features (N, D), of any lengths; a bank smaller than `k` votes whole.
        bank_labels: (N,) classes from 0.
        queries: features (M, D).
        query_labels: (M,).
        k: how many vote.
        temperature: T.
        chunk: how many queries are compared with the bank at a time.
    """
    classes = int(torch.cat([bank_labels, query_labels]).max()) + 1
    bank = F.normalize(bank.float())
    right = 0
    for rows, labels in zip(torch.split(queries, chunk), torch.split(query_labels, chunk), strict=True):
        similarity, nearest = (F.normalize(rows.float()) @ bank.T).topk(min(k, len(bank)))
        votes = torch.zeros(len(rows), classes, device=rows.device)
        votes.scatter_add_(1, bank_labels[nearest], ((similarity - 1) / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return right / len(queries)


def retrieval_copies(images: Sequence[Pixels], seed: int) -> list[Pixels]:
    """One cropped, flipped and recoloured copy of each image, which depends on the seed, its index and itself alone.

    A copy is a box of .3 to 1 of the image's area with an aspect of 3/4 to 4/3, not resized; mirrored with probability
    .5; brightness, contrast and saturation scaled by U(.6, 1.4) and hue shifted by U(-.1, .1) of the circle.

    Args:
        images: (H, W, 3) uint8 each, of any sizes.
        seed: another seed, other copies.
    """
    return [_copy(image, np.random.default_rng((seed, index))) for index, image in enumerate(images)]


def retrieval_recall(features: Tensor, copy_features: Tensor, *, chunk: int = 1024) -> float:
    """Share of images that are found first among all, by cosine, from the features of their copies.

    Args:
        features: (N, D), of the images.
        copy_features: (N, D), of the copies, in the same order.
        chunk: how many copies are compared with the images at a time.

    Features without any difference between images find one of N.
    """
    if features.shape != copy_features.shape:
        raise ValueError(f"{tuple(features.shape)} features and {tuple(copy_features.shape)} of copies: not one each")
    images = F.normalize(features.float())
    found = torch.cat([(F.normalize(rows.float()) @ images.T).argmax(1) for rows in torch.split(copy_features, chunk)])
    return float((found == torch.arange(len(found), device=found.device)).double().mean())


def raw_pixels(images: Iterable[Pixels], size: int = 16) -> Tensor:
    """Pixels as features (N, 3 * size^2), the yardstick of what needs no learning.

    Each image becomes evaluation-style input of `size` pixels less its own mean over pixels and colours: without
    that mean, which only says how bright an image is, cosines between images come out higher and find less.
    """
    preprocess = Preprocess(size=size)
    rows = np.stack([preprocess(image).reshape(-1) for image in images]).astype(np.float32)
    return torch.from_numpy(rows - rows.mean(1, keepdims=True))


def _copy(image: Pixels, rng: np.random.Generator) -> Pixels:
    box = sample_boxes(np.array([image.shape[:2]]), COPY_SCALE, rng)
    top, left, height, width = box[0].tolist()
    crop = image[top : top + height, left : left + width]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    picture = Image.fromarray(np.ascontiguousarray(crop))
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhancer(picture).enhance(rng.uniform(1 - COPY_JITTER, 1 + COPY_JITTER))
    return _shift_hue(picture, rng.uniform(-COPY_HUE, COPY_HUE))


def _shift_hue(picture: Image.Image, share: float) -> Pixels:
    """Turn the hues of an RGB picture by a share of the colour circle."""
    pixels = np.array(picture.convert("HSV"))
    pixels[..., 0] += np.uint8(round(share * 256) % 256)  # a byte wraps as the circle does
    return np.asarray(Image.fromarray(pixels, "HSV").convert("RGB"))
