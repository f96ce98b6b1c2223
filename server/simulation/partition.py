"""Which images each simulated device has: alike, by Dirichlet shares of the classes, or of a few classes only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lowssl_core.errors import UserError

ACCEPTED = "iid, dirichlet:ALPHA (above 0) or classes:K (from 1)"
Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Partition:
    """How images are given out: "iid", "dirichlet" with alpha as `value`, "classes" with their number as `value`."""

    kind: Literal["iid", "dirichlet", "classes"]
    value: float = 0.0


def parse_partition(text: str) -> Partition:
    """Read what a user writes after --partition.

    Raises:
        UserError: anything but what `ACCEPTED` says.
    """
    kind, _, value = text.partition(":")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    match kind:
        case "iid" if not value:
            return Partition(kind="iid")
        case "dirichlet" if 0 < number < math.inf:
            return Partition(kind="dirichlet", value=number)
        case "classes" if number >= 1 and number.is_integer():
            return Partition(kind="classes", value=number)
    raise UserError(f"--partition {text}: wanted {ACCEPTED}")


def class_shares(
    partition: Partition, labels: Sequence[int], devices: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(devices, classes) the share of each class that a device would have if there were images enough.

    Dirichlet: each device's shares are drawn from Dir(alpha p) with the data's own shares p (Hsu et al. 2019,
    "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", section 3).
    Classes: K of them each and alike, the same number of devices for every class as far as that goes.

    Raises:
        UserError: more classes a device than there are.
    """
    prior = np.bincount(labels) / len(labels)
    if partition.kind == "iid":
        return np.tile(prior, (devices, 1))
    if partition.kind == "dirichlet":
        # A class without images has no share in any device; a gamma variate of shape 0 is 0.
        drawn = rng.standard_gamma(partition.value * np.tile(prior, (devices, 1)))
        drawn[drawn.sum(axis=1) == 0] = prior  # alpha so small that all of them underflow
        return np.asarray(drawn / drawn.sum(axis=1, keepdims=True), dtype=np.float64)
    count, present = int(partition.value), np.flatnonzero(prior)
    if count > len(present):
        raise UserError(f"--partition classes:{count}: the data has {len(present)} classes")
    shares = np.zeros((devices, len(prior)))
    taken = np.zeros(len(present))
    for row in shares:
        # Those that the fewest devices have; among equals by chance.
        chosen = np.lexsort((rng.random(len(present)), taken))[:count]
        taken[chosen] += 1
        row[present[chosen]] = 1 / count
    return shares


def partition_images(
    partition: Partition, labels: Sequence[int], devices: int, *, images: int | None, seed: int
) -> list[Indices]:
    """Give each device as many images, each image to one device at most.

    Devices take turns; at each a class is drawn by the device's shares of those classes that have images left, and an
    image of it. A device all of whose classes have run out takes from the others.

    Args:
        partition: how.
        labels: class of each image.
        devices: how many.
        images: of each device; None: as many as there are for all.
        seed: of everything that is drawn.

    Returns:
        For each device the indices of its images, in the order in which they were drawn.

    Raises:
        UserError: more images than there are, or not one for each device.
    """
    available = len(labels) // devices
    if available < 1 or (images is not None and images > available):
        wanted = "" if images is None else f" of {images} images"
        raise UserError(f"{devices} devices{wanted}: the data has {len(labels)} images")
    rng = np.random.default_rng([seed, devices])
    shares = class_shares(partition, labels, devices, rng)
    pools = [rng.permutation(np.flatnonzero(np.asarray(labels) == kind)).tolist() for kind in range(shares.shape[1])]
    given: list[list[int]] = [[] for _ in range(devices)]
    for _ in range(available if images is None else images):
        for device, indices in enumerate(given):
            left = np.array([len(pool) for pool in pools], dtype=np.float64)
            weights = shares[device] * (left > 0)
            if weights.sum() == 0:
                weights = left
            indices.append(pools[int(rng.choice(len(pools), p=weights / weights.sum()))].pop())
    return [np.array(indices, dtype=np.int64) for indices in given]
