"""BatchNorm statistics of many devices pooled into those of all their images together."""

import numpy as np

from lowssl_core.protocol.manifest import FloatArray, Manifest


class StatisticsPool:
    """The manifest's statistics of the replies so far, each device weighted by p_k = its weight / the sum.

    mean = sum p_k mean_k, var = sum p_k (var_k + mean_k^2) - mean^2: exactly the centralised statistics, were all
    images in one place. Computed by merging one device at a time (Chan et al. 1979), a sum of terms that are not
    negative: no cancellation can make a variance so. Other buffers are averaged. The order of devices changes
    rounding alone. Nothing here is float32 until the end.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self.weight = 0.0
        self._mean = np.zeros(_length(manifest.means))
        self._square_sum = np.zeros(_length(manifest.variances))  # weight * variance
        self._buffers = np.zeros(_length(manifest.buffers))

    def add(self, flat: FloatArray, weight: float) -> None:
        """Merge one device's statistics; `flat` is (size,), `weight` above 0."""
        manifest = self._manifest
        before, self.weight = self.weight, self.weight + weight
        share = weight / self.weight
        shift = flat[manifest.means] - self._mean
        self._mean += share * shift
        self._square_sum += weight * flat[manifest.variances].astype(np.float64) + before * share * shift**2
        self._buffers += share * (flat[manifest.buffers] - self._buffers)

    def write(self, flat: FloatArray) -> None:
        """Put the pooled statistics in their place in `flat` (size,); without devices it stays as it is."""
        if self.weight > 0:
            flat[self._manifest.means] = self._mean
            flat[self._manifest.variances] = self._square_sum / self.weight
            flat[self._manifest.buffers] = self._buffers


def _length(place: slice) -> int:
    return int(place.stop - place.start)
