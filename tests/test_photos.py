"""The packaged photographs: tiles with content, and a test split that shares no pixel with the train split."""

import socket
from collections import Counter

import cv2
import numpy as np
import pytest

from lowssl_core.photos import (
    MIN_DEVIATION,
    PHOTOGRAPHS,
    TILE,
    find_test_boxes,
    find_train_boxes,
    open_photos,
    read_photograph,
)
from lowssl_core.sources import open_source


def test_train_and_test_tiles_share_no_pixel() -> None:
    for photograph in PHOTOGRAPHS:
        height, width = read_photograph(photograph).shape[:2]
        tested, trained = np.zeros((height, width), int), np.zeros((height, width), int)
        for box in find_test_boxes(height, width):
            tested[box.top : box.top + box.side, box.left : box.left + box.side] += 1
        for box in find_train_boxes(height, width):
            trained[box.top : box.top + box.side, box.left : box.left + box.side] += 1
            assert box.top + box.side <= height
            assert box.left + box.side <= width
        assert tested.max() == 1
        assert not np.any(tested * trained)
        assert 0.15 < tested.mean() < 0.45
        assert (trained > 0).mean() > 0.3


def test_numbers_are_those_of_the_docstring() -> None:
    for split, count in (("train", "1,877 train"), ("test", "166 test")):
        source = open_source("photos", split=split)
        assert count == f"{len(source):,} {split}"
        assert count in str(open_photos.__doc__)


def test_every_tile_has_content_and_every_photograph_tiles() -> None:
    for split, fewest in (("train", 90), ("test", 8)):
        source = open_photos(split=split)
        tiles = np.stack([np.asarray(source.read(i)) for i in range(len(source))])
        assert tiles.shape[1:] == (TILE, TILE, 3)
        assert all(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY).std() >= MIN_DEVIATION for tile in tiles)
        counts = Counter(source.label(i) for i in range(len(source)))
        assert len(counts) == len(PHOTOGRAPHS)
        assert min(counts.values()) >= fewest
        assert len({source.name(i) for i in range(len(source))}) == len(source)


def test_photos_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "socket", refuse)
    assert len(open_source("photos")) > 0
