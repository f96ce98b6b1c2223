"""The fixed images on which a run is judged."""

import numpy as np
import pytest
import torch

from lowssl_core.backbones import build_backbone
from lowssl_core.monitor import MonitorConfig, QualityProbe
from lowssl_core.neighbors import knn_accuracy
from lowssl_core.photos import open_photos
from lowssl_core.preprocess import Preprocess
from lowssl_core.quality import raw_pixels, retrieval_copies, retrieval_recall
from lowssl_core.sources import ArraySource

CONFIG = MonitorConfig(quality_images=12)


@pytest.fixture(scope="module")
def probe() -> QualityProbe:
    train, test = open_photos(split="train"), open_photos(split="test")
    return QualityProbe(train, test, Preprocess(size=32), CONFIG, shrink_to=None)


def test_the_figures_of_raw_pixels_are_those_of_the_measures_themselves(probe: QualityProbe) -> None:
    figures = probe.measure_pixels()
    pixels, copies = raw_pixels(probe.images), raw_pixels(retrieval_copies(probe.images, seed=0))
    assert figures["retrieval"] == retrieval_recall(pixels, copies)
    train, test = open_photos(split="train"), open_photos(split="test")
    chosen = np.random.default_rng(0).permutation(len(train))[:120]
    by_pixels = {test.read(i).tobytes(): test.label(i) for i in range(len(test))}
    expected = knn_accuracy(
        raw_pixels([train.read(int(i)) for i in chosen]),
        torch.tensor([train.label(int(i)) for i in chosen]),
        pixels,
        torch.tensor([by_pixels[image.tobytes()] for image in probe.images]),
    )
    assert figures["knn"] == pytest.approx(expected)


def test_measuring_changes_neither_the_backbones_mode_nor_its_state(probe: QualityProbe) -> None:
    backbone, _ = build_backbone("resnet_tiny")
    backbone.train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    first, second = probe.measure(backbone), probe.measure(backbone)
    assert first == second
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_held_out_images_of_other_classes_are_not_voted_on() -> None:
    train = open_photos(split="train")
    images = [train.read(i) for i in range(20)]
    other = ArraySource(
        images, [str(i) for i in range(20)], description="others", labels=[0, 1] * 10, classes=["a", "b"]
    )
    figures = QualityProbe(train, other, Preprocess(size=32), CONFIG, shrink_to=None).measure_pixels()
    assert "knn" not in figures
    assert "retrieval" in figures


def test_without_held_out_images_the_bank_and_the_queries_share_none() -> None:
    train = open_photos(split="train")
    probe = QualityProbe(train, None, Preprocess(size=32), CONFIG, shrink_to=None)
    bank = {image.tobytes() for image in probe._bank}
    assert bank
    assert not bank & {image.tobytes() for image in probe.images}
