"""How good a model is: k-NN accuracy of each class on images held out from all devices."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lowssl_core.embedding import embed
from lowssl_core.errors import UserError
from lowssl_core.neighbors import knn_accuracy
from lowssl_core.preprocess import Preprocess
from lowssl_core.protocol.manifest import FloatArray, manifest_of, pack, unpack
from lowssl_core.recipe import Recipe
from lowssl_core.sources import Source
from lowssl_core.sources.memory import load_images

NEIGHBORS = 20
Accuracies = NDArray[np.float64]


class Judge:
    """Judges flat models of one recipe by their trained encoder's features.

    The vote is among labelled training images, drawn by class from all of the data, whichever device has them.

    Args:
        recipe: whose models.
        train: images that vote.
        held_out: images that are asked for, of the same classes.
        images: how many of those at most, as many of each class as there are; twice as many vote.
        device: where encoders run.

    Attributes:
        manifest: of the models.
        start: (size,) the model that training starts from.
        shares: (classes,) of the images asked for.

    Raises:
        UserError: a class without a held-out image.
    """

    def __init__(self, recipe: Recipe, train: Source, held_out: Source, *, images: int, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self._method = recipe.method.build(recipe.backbone, recipe.data.batch_size)
        self.manifest = manifest_of(self._method)
        self.start = pack(self._method.federated_state(), self.manifest)
        self._backbone = self._method.online.backbone.to(device).eval()
        self._preprocess = Preprocess(size=recipe.views.global_size)
        self._bank, self._bank_labels = self._load(train, 2 * images)
        self._asked, self._asked_labels = self._load(held_out, images)
        classes = len(train.classes or ())
        counts = torch.bincount(self._asked_labels, minlength=classes)
        if missing := [name for name, count in zip(held_out.classes or (), counts, strict=True) if not count]:
            raise UserError(f"{held_out.description}: class {missing[0]} has no image to judge on")
        self.shares: Accuracies = (counts / counts.sum()).double().numpy()

    def accuracies(self, flat: FloatArray) -> Accuracies:
        """(classes,) the k-NN accuracy of each class with a model's encoder."""
        self._method.load_state_dict(unpack(flat, self.manifest), strict=False)
        bank, asked = (embed(self._backbone, images, self._preprocess, 256) for images in (self._bank, self._asked))
        labels = self._asked_labels
        return np.array(
            [
                knn_accuracy(bank, self._bank_labels, asked[labels == kind], labels[labels == kind], k=NEIGHBORS)
                for kind in range(len(self.shares))
            ]
        )

    def _load(self, source: Source, count: int) -> tuple[list[NDArray[np.uint8]], torch.Tensor]:
        """Images made ready once, since every model looks at them, and their labels."""
        images, labels, _ = load_images(source, _drawn(source, count), shrink_to=self._preprocess.resize)
        assert labels is not None, "sources without labels are refused before"
        return images, torch.tensor(labels)


def _drawn(source: Source, count: int) -> Sequence[int]:
    """At most so many images of a source, as many of each class as there are, always the same ones."""
    labels = np.array([source.label(index) for index in range(len(source))])
    each = max(1, count // len(source.classes or ()))
    rng = np.random.default_rng(0)
    kept = [rng.permutation(np.flatnonzero(labels == kind))[:each] for kind in np.unique(labels)]
    return sorted(np.concatenate(kept).tolist())
