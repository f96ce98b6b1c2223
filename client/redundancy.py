"""Which of many features is most redundant: nearest pairs by cosine, kept up to date as features come and go."""

import numpy as np
from numpy.typing import NDArray

_BLOCK = 256
# Below any cosine: the similarity to what is not there.
_NONE = np.float32(-2)


def normalized(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Features (N, D) with rows of length 1, rows of zeros as they are.

    Raises:
        ValueError: a feature that is not finite.
    """
    if not np.isfinite(features).all():
        raise ValueError("features with NaN or infinity have no neighbors")
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    units: NDArray[np.float32] = (features / np.maximum(lengths, 1e-12)).astype(np.float32)
    return units


def nearest_similarity(features: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N,) the cosine of each of N normalized features with the nearest of M others; 256 x M numbers at a time."""
    blocks = [features[start : start + _BLOCK] @ others.T for start in range(0, len(features), _BLOCK)]
    return np.concatenate([block.max(axis=1) for block in blocks])


class NearestPairs:
    """Normalized features in numbered places, each with its nearest other one.

    Adding one takes a comparison with all, O(N D); removing one as many comparisons as there are features whose
    nearest it was, on average one. The first look at N features takes O(N^2 D), in blocks of 256 rows.

    Args:
        features: (N, D), rows of length 1; they get the places 0 to N - 1.
    """

    def __init__(self, features: NDArray[np.float32]) -> None:
        self._features = features.copy()
        self._present = np.ones(len(features), dtype=bool)
        self._nearest = np.full(len(features), -1, dtype=np.int64)
        self._similarity = np.full(len(features), _NONE, dtype=np.float32)
        self._find(np.arange(len(features)))

    def __len__(self) -> int:
        return int(self._present.sum())

    def add(self, feature: NDArray[np.float32]) -> int:
        """Add a feature (D,); returns its place, a free one or the next."""
        free = np.flatnonzero(~self._present)
        place = int(free[0]) if len(free) else self._grow()
        similarity = self._similarities(feature[None])[0]
        self._features[place] = feature
        self._present[place] = True
        closer = similarity > self._similarity
        self._nearest[closer] = place
        self._similarity[closer] = similarity[closer]
        self._set(np.array([place]), similarity[None])
        return place

    def remove(self, place: int) -> None:
        """Remove the feature in a place."""
        self._present[place] = False
        self._nearest[place], self._similarity[place] = -1, _NONE
        self._find(np.flatnonzero(self._present & (self._nearest == place)))

    def closest(self) -> tuple[int, int]:
        """The places of the two features with the smallest cosine distance, the lower place first; needs two."""
        assert len(self) >= 2, "a pair takes two"
        one = int(self._similarity.argmax())
        other = int(self._nearest[one])
        return min(one, other), max(one, other)

    def most_redundant(self) -> int:
        """The one of the closest pair whose next nearest feature is closer too: less is lost with it.

        The rule that names the pair alone (Purushwalkam et al. 2022, section 5, "The Challenges of Continuous
        Self-Supervised Learning", https://arxiv.org/abs/2203.12710) leaves this open: both are equally near each other.
        """
        pair = self.closest()
        similarity = self._similarities(self._features[list(pair)])
        similarity[:, list(pair)] = _NONE
        return pair[int(similarity.max(axis=1).argmax())]

    def _similarities(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, all places): cosines of features (N, D) with those that are present."""
        similarity = features @ self._features.T
        similarity[:, ~self._present] = _NONE
        return similarity

    def _find(self, places: NDArray[np.int64]) -> None:
        """Look for the nearest of the features in some places."""
        for start in range(0, len(places), _BLOCK):
            block = places[start : start + _BLOCK]
            self._set(block, self._similarities(self._features[block]))

    def _set(self, places: NDArray[np.int64], similarity: NDArray[np.float32]) -> None:
        """Take over the nearest of some places from their similarities (N, all places)."""
        rows = np.arange(len(places))
        similarity[rows, places] = _NONE
        nearest = similarity.argmax(axis=1)
        self._similarity[places] = similarity[rows, nearest]
        self._nearest[places] = np.where(self._similarity[places] > _NONE, nearest, -1)

    def _grow(self) -> int:
        """Make room for as many again; returns the first new place."""
        count = len(self._features)
        more = max(count, 16)
        self._features = np.concatenate([self._features, np.zeros((more, self._features.shape[1]), np.float32)])
        self._present = np.concatenate([self._present, np.zeros(more, dtype=bool)])
        self._nearest = np.concatenate([self._nearest, np.full(more, -1, dtype=np.int64)])
        self._similarity = np.concatenate([self._similarity, np.full(more, _NONE, dtype=np.float32)])
        return count
