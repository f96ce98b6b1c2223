"""Watching a run: label-free quality and k-NN every few epochs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lowssl_core.embedding import embed
from lowssl_core.images import Pixels
from lowssl_core.loader import load_images
from lowssl_core.neighbors import knn_accuracy
from lowssl_core.preprocess import Preprocess
from lowssl_core.quality import raw_pixels, retrieval_copies, retrieval_recall
from lowssl_core.sources import Source
from lowssl_core.spectra import rankme


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """How closely a run is watched.

    Attributes:
        log_every_steps: steps between two lines of metrics.
        checkpoint_every_epochs: epochs between two checkpoints; one is also written at the end and when stopped.
        quality_every_epochs: epochs between two measurements of quality; 0: only at the end.
        quality_images: how many images retrieval and RankMe look at, and at most ten times as many k-NN's bank has.
    """

    log_every_steps: int = 10
    checkpoint_every_epochs: int = 1
    quality_every_epochs: int = 10
    quality_images: int = 500

    def __post_init__(self) -> None:
        if min(self.log_every_steps, self.checkpoint_every_epochs) < 1 or self.quality_every_epochs < 0:
            raise ValueError("log_every_steps and checkpoint_every_epochs are whole numbers from 1, quality's from 0")
        if self.quality_images < 2:
            raise ValueError(f"quality_images is {self.quality_images}; it is at least 2")


class QualityProbe:
    """A fixed set of images on which a backbone is judged again and again.

    RankMe of the features; recall@1 of each image from a cropped, recoloured, flipped copy of it; and, where there are
    labels, k-NN accuracy. With images held out (`queries`), those are looked at and the training images are the bank;
    without, both are drawn, without overlap, from the training images.

    Args:
        source: training images.
        queries: images held out, or None.
        preprocess: evaluation-style input.
        config: sizes of the sets.
        shrink_to: as in training (`DataConfig.shrink_to`).
    """

    def __init__(
        self,
        source: Source,
        queries: Source | None,
        preprocess: Preprocess,
        config: MonitorConfig,
        shrink_to: int | None,
    ) -> None:
        self._preprocess = preprocess
        count = config.quality_images
        order = np.random.default_rng(0).permutation(len(source))
        if queries is None:
            count = min(count, max(2, len(source) // 3))
            chosen, order = order[:count], order[count:]
            self.images, self._labels, _ = load_images(source, chosen.tolist(), shrink_to=shrink_to)
        else:
            self.images, self._labels, _ = load_images(queries, limit=count, shrink_to=shrink_to)
        self.copies = list(retrieval_copies(self.images, seed=0))
        self._bank: Sequence[Pixels] = ()
        self._bank_labels: Sequence[int] | None = None
        # Labels of another set of classes would be compared as if they were the same.
        shares_classes = queries is None or queries.classes == source.classes
        if self._labels is not None and source.classes is not None and shares_classes:
            self._bank, self._bank_labels, _ = load_images(source, order[: 10 * count].tolist(), shrink_to=shrink_to)

    def measure(self, backbone: nn.Module) -> dict[str, float]:
        """Judge `backbone` in evaluation mode; it is handed back in the mode it came in.

        Returns:
            "rankme", "retrieval" and, with labels, "knn".
        """
        was_training = backbone.training
        backbone.eval()
        quality = self._judge(lambda images: embed(backbone, images, self._preprocess))
        backbone.train(was_training)
        return quality

    def measure_pixels(self) -> dict[str, float]:
        """The same figures of raw pixels (`raw_pixels`): what needs no learning."""
        return self._judge(raw_pixels)

    def _judge(self, features_of: Callable[[Sequence[Pixels]], Tensor]) -> dict[str, float]:
        features = features_of(self.images)
        quality = {"rankme": rankme(features), "retrieval": retrieval_recall(features, features_of(self.copies))}
        if self._bank_labels is not None and self._labels is not None:
            labels = torch.tensor(self._bank_labels), torch.tensor(self._labels)
            quality["knn"] = knn_accuracy(features_of(self._bank), labels[0], features, labels[1])
        return quality
