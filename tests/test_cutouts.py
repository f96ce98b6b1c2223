"""The composed pictures: masks are exact, splits share nothing they need not, and one seed gives one set."""

import importlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from lowssl_core.detection.coco import CocoData, decode_mask


@pytest.fixture(scope="module")
def cutouts() -> Any:
    # The benchmarks are programs beside the package, which import each other as they lie.
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        return importlib.import_module("cutouts")


@pytest.fixture(scope="module")
def material(cutouts: Any) -> Any:
    return cutouts.still_lifes()


@pytest.fixture(scope="module")
def folder(cutouts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cutouts")
    assert cutouts.main(["--out", str(out), "--train", "6", "--val", "3", "--size", "64", "80"]) == 0
    return out


def test_what_is_written_can_be_read_as_coco_data(folder: Path) -> None:
    for split, count in (("train", 6), ("val", 3)):
        data = CocoData(folder / f"{split}.json", folder / split)
        assert data.classes == ("coin", "cat", "cup", "flower")
        assert len(data) == count
        for index, instances in enumerate(data.instances):
            assert 1 <= len(instances) <= 5
            height, width = data.sizes_of[index]
            assert data.read(index)
            assert 64 <= min(height, width) <= max(height, width) <= 80
            masks = [decode_mask(each.mask) for each in instances]
            assert np.sum(masks, axis=0).max() == 1  # what is covered belongs to what covers it
            for each, mask in zip(instances, masks, strict=True):
                assert each.area == mask.sum()
                assert list(each.box) == list(cv2.boundingRect(mask))


def test_a_seed_gives_the_same_set_and_another_gives_another(cutouts: Any, material: Any) -> None:
    one, again, other = (
        [cutouts.compose(material["train"], (64, 80), np.random.default_rng(seed)) for _ in range(2)]
        for seed in (1, 1, 2)
    )
    assert all(np.array_equal(here.pixels, there.pixels) for here, there in zip(one, again, strict=True))
    assert one[0].pixels.shape != other[0].pixels.shape or not np.array_equal(one[0].pixels, other[0].pixels)


def test_masks_are_exact(cutouts: Any) -> None:
    """Pasted onto black, a cut-out without black pixels is seen just where its mask says."""
    cutout = cutouts.Cutout(np.full((30, 20, 3), 200, np.uint8), np.tri(30, 20, dtype=bool))
    ground = [np.zeros((100, 100, 3), np.uint8)]
    material = cutouts.Material(cutouts={"thing": [cutout]}, backgrounds=ground)
    for seed in range(10):
        picture = cutouts.compose(material, (60, 70), np.random.default_rng(seed))
        visible = np.logical_or.reduce([mask for _, mask in picture.objects])
        assert np.array_equal(picture.pixels.any(2), visible)


def test_coins_and_backgrounds_of_the_splits_are_different_ones(cutouts: Any, material: Any) -> None:
    coins = cutouts.cut_coins()
    assert len(coins) == 24
    train, val = (material[split].cutouts["coin"] for split in ("train", "val"))
    assert len(train) + len(val) == 24
    assert not any(np.array_equal(one.pixels, other.pixels) for one in train for other in val)
    for one, other in zip(material["train"].backgrounds, material["val"].backgrounds, strict=True):
        assert one.shape[0] == other.shape[0]
        assert min(one.shape[1], other.shape[1]) > 100
    assert cutouts.TRAIN_SHARE < cutouts.VAL_START


def test_no_object_is_hidden_by_more_than_three_quarters(cutouts: Any) -> None:
    square = cutouts.Cutout(np.full((30, 30, 3), 200, np.uint8), np.ones((30, 30), bool))
    material = cutouts.Material(cutouts={"thing": [square]}, backgrounds=[np.zeros((100, 100, 3), np.uint8)])
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(60):
        for _, mask in cutouts.compose(material, (60, 70), rng).objects:
            _, _, width, height = cv2.boundingRect(mask.astype(np.uint8))
            shares.append(mask.sum() / (width * height))  # of at most the whole square
    assert 0.25 <= min(shares) < 0.5
    assert max(shares) == 1


def test_sheets_are_drawn(folder: Path) -> None:
    sheet = cv2.imread(str(folder / "train-sheet.png"))
    assert sheet.shape[1] > 6 * 2 * 64
    assert len(json.loads((folder / "train.json").read_text())["images"]) == 6
