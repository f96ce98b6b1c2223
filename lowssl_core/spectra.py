"""Label-free figures of features: their spectrum (RankMe, LiDAR, alpha-ReQ) and their spread on the unit sphere."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Features = Tensor | NDArray[Any]  # what has rows and can be sliced, a np.memmap too

_BLOCK = 4096  # rows in float64 at a time: 64 MiB of 2,048 dimensions

# Differences below this many roundings of the largest value are no differences.
_ROUNDINGS = 10

# The ranks that alpha is fitted over, and why: see `alpha_req`.
_FIRST_RANK, _LAST_RANK = 4, 100


def blocks(features: Features, size: int) -> Iterator[Tensor]:
    """Rows of features (N, ...), `size` at a time, on the CPU, in the type that they have.

    Raises:
        ValueError: a row with NaN or infinity.
    """
    for start in range(0, len(features), size):
        rows = features[start : start + size]
        # A copy, as torch takes no read-only memory, which a np.memmap may be.
        block = rows.detach().cpu() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))
        finite = block.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            raise ValueError(f"features hold NaN or infinity, first in row {start + int(finite.int().argmin())}")
        yield block


def rankme(features: Features) -> float:
    """exp(entropy of the normalised singular values) of features (N, D): their effective rank, 0 to min(N, D).

    Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by Their
    Rank" (2023), equation 1, without its epsilon, which only guards the logarithm of 0. Features that are all zero
    have rank 0, other constant ones 1. Memory: a few blocks of 4,096 rows and D x D, float64.
    """
    return _effective_rank(_singular_values(features))


def lidar(views: Features, *, delta: float = 1e-4) -> float:
    """exp(entropy of the normalised eigenvalues) of W^-1/2 B W^-1/2: how many directions tell images from their views.

    Thilak et al., "LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL Architectures" (2023), equations 1
    to 4 of arXiv:2312.04000v1. Each image is a class and its views are the samples: B is the covariance of the images'
    means, W that of the views around their image's mean plus `delta` I, by the unbiased normalisers N - 1 and
    N (Q - 1). The epsilon beside the shares is left out as in `rankme`. Where the images' means do not differ, the rank
    is 0.

    N should be above D, as B has at most rank N - 1; the paper takes Q = 50 and finds 10 nearly as good. Compare
    figures of the same N and Q alone, and mind that they depend on the features' scale where W is not far above
    `delta`. Memory: a few blocks of 4,096 views and some six matrices of D x D, float64.

    Args:
        views: features (N, Q, D) of Q augmented views of N images, both from 2.
        delta: what regularises W.
    """
    num_images, num_views, width = _shape_of_views(views)
    size = max(1, _BLOCK // num_views)
    mean = torch.zeros(width, dtype=torch.float64)
    for block in blocks(views, size):
        mean += block.double().mean(dim=1).sum(dim=0) / num_images
    between = torch.zeros(width, width, dtype=torch.float64)
    within = torch.zeros_like(between)
    energy, epsilon = 0.0, 0.0
    for block in blocks(views, size):
        samples = block.double()
        means = samples.mean(dim=1)
        between.addmm_((means - mean).T, means - mean)
        around = (samples - means.unsqueeze(1)).flatten(0, 1)
        within.addmm_(around.T, around)
        energy += float(means.square().sum())
        epsilon = torch.finfo(block.dtype).eps
    if float(between.trace()) <= (_ROUNDINGS * epsilon) ** 2 * energy:
        return 0.0
    within = within / (num_images * (num_views - 1)) + delta * torch.eye(width, dtype=torch.float64)
    # With W = L L^T, L^-1 B L^-T has the eigenvalues of W^-1/2 B W^-1/2.
    root = torch.linalg.cholesky(within)
    half = torch.linalg.solve_triangular(root, between / (num_images - 1), upper=False)
    whitened = torch.linalg.solve_triangular(root, half.T, upper=False)
    return _effective_rank(torch.linalg.eigvalsh((whitened + whitened.T) / 2).clamp(min=0))


def alpha_req(features: Features) -> float | None:
    """How fast the eigenvalues of the features' covariance fall: alpha of the power law, rank^-alpha, fitted to them.

    Agrawal et al., "alpha-ReQ: Assessing Representation Quality in Self-Supervised Learning by Measuring Eigenspectrum
    Decay" (2022), which finds good features near 1. The line through the logarithms of eigenvalues and ranks is that of
    the authors' published code: least squares over ranks 4 to 100, each weighing 1 / rank, so that all parts of the
    logarithmic axis count alike. The first three eigenvalues stand apart from the law as a rule, and those beyond 100
    are the ones that a small set of images estimates worst. Alphas over different ranks cannot be compared.

    Eigenvalues that rounding alone can make are left out, and so are ranks that features (N, D) of few images or
    dimensions lack.

    Returns:
        alpha, or None where fewer than two eigenvalues are left: constant features, or all but collapsed ones.
    """
    total, energy, epsilon = torch.zeros(features.shape[1], dtype=torch.float64), 0.0, 0.0
    for block in blocks(features, _BLOCK):
        total += block.double().sum(dim=0)
        energy += float(block.double().square().sum())
        epsilon = torch.finfo(block.dtype).eps
    values = _singular_values(features, total / len(features))[_FIRST_RANK - 1 : _LAST_RANK]
    values = values[values > _ROUNDINGS * epsilon * math.sqrt(energy)]
    if len(values) < 2:
        return None
    ranks = torch.arange(_FIRST_RANK, _FIRST_RANK + len(values), dtype=torch.float64)
    weights = ranks.reciprocal() / ranks.reciprocal().sum()
    across = ranks.log() - weights @ ranks.log()
    # An eigenvalue is a singular value's square, over N - 1, which shifts the line but does not turn it.
    return -2 * float((weights * across) @ values.log() / ((weights * across) @ across))


def alignment(views: Features) -> float:
    """Mean squared distance of the L2-normalised features of two views of one image: 0, all alike, to 4.

    Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere" (2020), section 4.1.1, with exponent 2. All pairs of the views (N, Q, D) of an image count.
    """
    num_images, num_views, _ = _shape_of_views(views)
    total = 0.0
    for block in blocks(views, max(1, _BLOCK // num_views)):
        units = F.normalize(block.double(), dim=-1)
        # The squared distances of Q points sum, over their pairs, to Q times those from their mean.
        total += float((units - units.mean(dim=1, keepdim=True)).square().sum())
    return 2 * total / (num_images * (num_views - 1))


def uniformity(features: Features) -> float:
    """ln of the mean of exp(-2 |x - y|^2) over pairs of different L2-normalised features (N, D): 0, all alike, to -8.

    Wang and Isola (2020), section 4.1.2, with t = 2. Independent directions spread evenly are near -4 in many
    dimensions. All N (N - 1) / 2 pairs count; memory: a few blocks of 2,048 rows and of 2,048 x 2,048, float64.
    """
    num, size = len(features), _BLOCK // 2
    if num < 2:
        raise ValueError(f"uniformity is of pairs: {num} features have none")
    total = 0.0
    for index, rows in enumerate(blocks(features, size)):
        first = F.normalize(rows.double(), dim=-1)
        for offset, others in enumerate(blocks(features[index * size :], size)):
            second = F.normalize(others.double(), dim=-1)
            products = first @ second.T
            squares = first.square().sum(dim=1, keepdim=True) + second.square().sum(dim=1) - 2 * products
            kernel = (-2 * squares.clamp(min=0)).exp()
            total += float(kernel.triu(1).sum() if offset == 0 else kernel.sum())
    return math.log(total / (num * (num - 1) / 2))


def feature_deviation(features: Tensor) -> Tensor:
    """The mean over dimensions of the standard deviation of L2-normalised features (N, D), times sqrt(D); a scalar.

    1: directions spread evenly, 0: the same for every image. Chen and He, "Exploring Simple Siamese Representation
    Learning" (2021), section 4.1.
    """
    rows = F.normalize(features, dim=-1)
    scale: float = rows.shape[1] ** 0.5
    return rows.std(dim=0, correction=0).mean() * scale


def _shape_of_views(views: Features) -> tuple[int, int, int]:
    if len(views.shape) != 3 or min(views.shape[:2]) < 2:
        raise ValueError(f"views are {tuple(views.shape)}; expected (images, views of each, dimensions), two or more")
    num_images, num_views, width = views.shape
    return num_images, num_views, width


def _singular_values(features: Features, mean: Tensor | float = 0.0) -> Tensor:
    """Singular values of features (N, D) less `mean`, float64, largest first.

    Many rows are brought to a triangle of the same singular values, block by block. The eigenvalues of the D x D Gram
    matrix would cost some 40 % less, but their roots lose half of the digits: RankMe of float64 features of rank 1 in
    512 dimensions was off by 3e-5 that way, and by 5e-13 this way.
    """
    triangle = torch.zeros(0, features.shape[1], dtype=torch.float64)
    for block in blocks(features, _BLOCK):
        rows = torch.cat([triangle, block.double() - mean])
        triangle = rows if len(rows) <= _BLOCK else torch.linalg.qr(rows, mode="r")[1]
    values: Tensor = torch.linalg.svdvals(triangle)
    return values


def _effective_rank(values: Tensor) -> float:
    """exp(entropy) of values from 0, normalised to sum 1; 0 where there are none above 0."""
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0
