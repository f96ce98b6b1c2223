"""FedEMA's blend of a device's own weights with a global model that arrives.

Zhuang, Wen, Zhang 2022, "Divergence-aware Federated Self-Supervised Learning", https://arxiv.org/abs/2204.04385,
sections 4.2 and 4.3.
"""

from dataclasses import dataclass, field

import numpy as np

from lowssl_core.protocol.manifest import FloatArray, Manifest, check_flat

TAU = 0.7


@dataclass(frozen=True, kw_only=True)
class Blend:
    """What a blend came to.

    Attributes:
        flat: (size,) the device's new state.
        mu: the share of the device's own weights in it.
        divergence: |W_g - W_k|, the Euclidean distance of the trained parameters before.
        scale: the device's lambda, to be kept for its later blends; None where it could not be set yet.
    """

    flat: FloatArray = field(repr=False)
    mu: float
    divergence: float
    scale: float | None


def blend(
    local: FloatArray, arrived: FloatArray, manifest: Manifest, *, scale: float | None, tau: float = TAU
) -> Blend:
    """W_k <- mu W_k + (1 - mu) W_g with mu = min(lambda |W_g - W_k|, 1).

    At a device's first blend lambda is set to tau / |W_g - W_k|, so that mu is tau then; later a device whose weights
    went further from the others' keeps more of its own. BatchNorm statistics are pooled with the same two shares:
    means by themselves, variances through mean squares, which is exact.

    What is kept adds up. With a learning rate that stays, |W_g - W_k| comes to x times that of the first blend, where
    x^2 = 1 + (tau x^2)^2 if each round leads at right angles to what was kept. For a tau above .5 there is no such x:
    mu goes to 1, and the device learns alone.

    Args:
        local: (size,) the device's state, W_k.
        arrived: (size,) the global one, W_g.
        manifest: what stands where.
        scale: the device's lambda; None: this is its first blend.
        tau: the share of its own weights that a device keeps at its first blend.

    Raises:
        ValueError: an array that is not the manifest's, or a tau out of range.
    """
    check_flat(local, manifest)
    check_flat(arrived, manifest)
    if not 0 <= tau <= 1:
        raise ValueError(f"tau is {tau}; it is a number from 0 to 1")
    trained = slice(manifest.trained_size)
    divergence = float(np.linalg.norm(arrived[trained].astype(np.float64) - local[trained]))
    if scale is None and divergence > 0:
        scale = tau / divergence
    mu = 0.0 if scale is None else min(scale * divergence, 1.0)
    # In float64: the variances are differences of squares.
    own, other = local.astype(np.float64), arrived.astype(np.float64)
    flat = mu * own + (1 - mu) * other
    means, variances = manifest.means, manifest.variances
    squares = mu * (own[variances] + own[means] ** 2) + (1 - mu) * (other[variances] + other[means] ** 2)
    flat[variances] = np.maximum(squares - flat[means] ** 2, 0)
    return Blend(flat=flat.astype(np.float32), mu=mu, divergence=divergence, scale=scale)
