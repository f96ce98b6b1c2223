"""How images get from the folder into the memory: made ready, and looked at by the encoder."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from client.arrivals import Arrivals
from client.continual import evaluating
from client.memory import ReplayMemory, Staged, compact
from client.redundancy import nearest_similarity
from lowssl_core.embedding import embed_inputs
from lowssl_core.images import BadImage, NotEnoughMemory, decode
from lowssl_core.preprocess import Preprocess

# Images that are made ready and embedded at a time.
_LOT = 16


class Intake:
    """The way of images into a memory.

    Args:
        arrivals: where they come from.
        memory: where they go.
        encoder: the moving average of the encoder, whose features tell which images are alike.
        width: of its features.
        preprocess: what it looks at.
        side: pixels of the shorter side of what is kept.
    """

    def __init__(
        self,
        arrivals: Arrivals,
        memory: ReplayMemory,
        encoder: nn.Module,
        width: int,
        preprocess: Preprocess,
        side: int,
    ) -> None:
        self._arrivals, self._memory = arrivals, memory
        self._encoder, self._width = encoder, width
        self._preprocess, self._side = preprocess, side

    def take_in(self, now: int, *, limit: int, refresh: int) -> None:
        """Stage new images until `limit` are staged, after features that waited longest were taken anew.

        Args:
            now: the encoder's step.
            limit: how many new images; fewer where the memory has no more room.
            refresh: how many features at most.

        Raises:
            OSError: the disk is full.
        """
        self._memory.refresh(self.embed, now, refresh, width=self._width)
        staged = set(self._memory.keys(staged=True))
        fresh = [key for key in self._arrivals.new(limit) if key not in staged][: max(0, limit - len(staged))]
        for start in range(0, len(fresh), _LOT):
            lot = self._made_ready(fresh[start : start + _LOT])
            if self._memory.stage(lot, now) < len(lot):
                return

    def distances(self) -> NDArray[np.float32]:
        """(N,) the cosine distance of each new image from the nearest one remembered; (0,) if nothing is."""
        new, known = self._memory.features(staged=True), self._memory.features(staged=False)
        if not len(new) or not len(known):
            return np.zeros(0, dtype=np.float32)
        return 1 - nearest_similarity(new, known)

    def embed(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """(N, width) features of encoded images."""
        if not images:
            return np.zeros((0, self._width), dtype=np.float32)
        inputs = np.stack([self._preprocess(decode(data)) for data in images])
        with evaluating(self._encoder) as encoder:
            features: NDArray[np.float32] = embed_inputs(encoder, inputs).numpy()
        return features

    def _made_ready(self, keys: Sequence[str]) -> list[Staged]:
        ready: list[tuple[str, bytes]] = []
        for key in keys:
            if self._memory.holds(key):  # from before the index of arrivals was lost
                self._arrivals.mark_learned([key])
                continue
            try:
                data = self._arrivals.read(key)
            except BadImage:
                continue  # the next scan finds out what became of it
            try:
                ready.append((key, self._compact(data)))
            except NotEnoughMemory:
                continue  # it stays new
            except BadImage as error:
                self._arrivals.put_aside(key, error.reason)
        features = self.embed([data for _, data in ready])
        return [Staged(key, data, feature) for (key, data), feature in zip(ready, features, strict=True)]

    def _compact(self, data: bytes) -> bytes:
        """An image as it is kept; BadImage if it cannot be used or would take too much of the memory."""
        kept = compact(data, self._side)
        if len(kept) > self._memory.largest_image:
            raise BadImage(
                f"huge: {len(kept):,} bytes of a memory that takes images up to {self._memory.largest_image:,}"
            )
        return kept
