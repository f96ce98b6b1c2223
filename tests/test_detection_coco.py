"""Annotations are read as they are meant or refused, and batches are the same however a run comes to them."""

import json
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from lowssl_core.detection.coco import CocoData, check_same_categories, decode_mask
from lowssl_core.detection.loading import DetectionLoader, Sample
from lowssl_core.detection.recipe import DetectionRecipe
from lowssl_core.distributed import Ranks
from lowssl_core.errors import UserError
from lowssl_core.images import BadImage
from lowssl_core.photos import open_photos

HEIGHT, WIDTH = 48, 64
CPU = torch.device("cpu")


def square(left: int = 10, top: int = 12, side: int = 20) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top : top + side, left : left + side] = 1
    return mask


def annotation(number: int, image_id: int, mask: np.ndarray, **changes: Any) -> dict[str, Any]:
    encoded = rle.encode(np.asfortranarray(mask))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": 5,
        "bbox": rle.toBbox(encoded).tolist(),
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()},
        **changes,
    }


def write(folder: Path, annotations: list[dict[str, Any]], num_images: int = 1, **changes: Any) -> Path:
    """An annotation file and its images, tiles of photographs."""
    photos = open_photos(split="test")
    (folder / "images").mkdir(exist_ok=True)
    images = []
    for number in range(1, num_images + 1):
        name = f"{number:03}.png"
        cv2.imwrite(str(folder / "images" / name), photos.read(number)[:HEIGHT, :WIDTH, ::-1])
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
    tree = {"images": images, "annotations": annotations, "categories": [{"id": 5, "name": "thing"}]} | changes
    path = folder / "annotations.json"
    path.write_text(json.dumps(tree))
    return path


def read(folder: Path, *annotations: dict[str, Any], **changes: Any) -> CocoData:
    return CocoData(write(folder, list(annotations), **changes), folder / "images")


# What is read


@pytest.mark.parametrize(
    "segmentation",
    [
        [[10, 12, 30, 12, 30, 32, 10, 32]],
        [[10, 12, 20, 12, 20, 32, 10, 32], [20, 12, 30, 12, 30, 32, 20, 32]],
        [[10, 12, 30, 12, 30, 32, 10, 32], [3, 3, 40, 40]],  # the second is a line
        {"size": [HEIGHT, WIDTH], "counts": annotation(1, 1, square())["segmentation"]["counts"]},
        {
            "size": [HEIGHT, WIDTH],
            "counts": [10 * 48 + 12, *([20, 28] * 19), 20, 48 * 64 - 10 * 48 - 12 - 19 * 48 - 20],
        },
    ],
    ids=["polygon", "polygons", "polygon and line", "compressed RLE", "RLE"],
)
def test_each_way_to_write_a_mask_gives_its_pixels(tmp_path, segmentation):
    data = read(tmp_path, annotation(1, 1, square(), segmentation=segmentation))
    assert np.array_equal(decode_mask(data.instances[0][0].mask), square())
    assert np.array_equal(data.targets(0).masks[0].numpy(), square())


def test_boxes_become_corners_within_the_image(tmp_path):
    data = read(tmp_path, annotation(1, 1, square(), bbox=[-5, 12.5, 40, 100]))
    assert data.targets(0).boxes.tolist() == [[0, 12.5, 35, HEIGHT]]
    assert data.targets(0).labels.tolist() == [1]


def test_crowds_and_what_has_no_area_are_judged_but_not_learnt(tmp_path):
    nothing = np.zeros((HEIGHT, WIDTH), np.uint8)
    annotations = [
        annotation(1, 1, square(), iscrowd=1),
        annotation(2, 1, nothing, bbox=[1, 1, 5, 5]),
        annotation(3, 1, square(), bbox=[4, 4, 0, 9]),
        annotation(4, 1, square(), bbox=[WIDTH, 4, 9, 9]),
        annotation(5, 1, square(), segmentation=[[1, 1, 4, 4]]),
        annotation(6, 2, square()),
    ]
    path = write(tmp_path, annotations, num_images=3)
    data = CocoData(path, tmp_path / "images")
    assert [len(each) for each in data.instances] == [5, 1, 0]
    assert len(data.targets(0).labels) == 0
    assert data.targets(2).masks.shape == (0, HEIGHT, WIDTH)
    learnable = CocoData(path, tmp_path / "images", learnable=True)
    assert learnable.image_ids == [2]


def test_labels_follow_category_ids_and_not_the_files_order(tmp_path):
    categories = [{"id": 9, "name": "late"}, {"id": 5, "name": "early"}]
    data = read(tmp_path, annotation(1, 1, square(), category_id=9), categories=categories)
    assert data.classes == ("early", "late")
    assert data.targets(0).labels.tolist() == [2]


def test_an_image_of_another_size_than_annotated_is_bad(tmp_path):
    data = read(tmp_path, annotation(1, 1, square()))
    cv2.imwrite(str(tmp_path / "images" / "001.png"), np.zeros((HEIGHT, WIDTH - 1, 3), np.uint8))
    with pytest.raises(BadImage) as caught:
        data.read(0)
    assert caught.value.reason == "63x48 pixels, but its annotations are for 64x48"


# What is refused

Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("annotations"), "it has no list 'annotations'"),
        (lambda tree: tree.update(images={}), "it has no list 'images'"),
        (lambda tree: tree.update(images=[]), "annotation 1 is of an image that is not there, id 1"),
        (lambda tree: tree.update(images=[], annotations=[]), "it has no images"),
        (lambda tree: tree.update(categories=[]), "it has no categories"),
        (lambda tree: tree["annotations"][0].update(category_id=6), "is of a category that is not there, id 6"),
        (lambda tree: tree["annotations"][0].update(id=0), "has the id 0: wanted unique ids from 1"),
        (lambda tree: tree["images"].append(tree["images"][0]), "entry 1 of 'images' has the id 1: wanted unique ids"),
        (lambda tree: tree["images"][0].pop("height"), "entry 0 of 'images' has no usable 'height'"),
        (lambda tree: tree["images"][0].update(width="64"), "entry 0 of 'images' has no usable 'width'"),
        (lambda tree: tree["annotations"].append(3), "entry 1 of 'annotations' has no usable 'id'"),
        (lambda tree: tree["annotations"][0].update(bbox=[1, 2, 3]), "annotation 1 has the bbox [1, 2, 3]"),
        (lambda tree: tree["annotations"][0].update(bbox=[1, 2, 3, "4"]), "wanted x, y, width and height"),
        (lambda tree: tree["annotations"][0].update(segmentation=[7]), "segmentation that cannot be read"),
        (lambda tree: tree["annotations"][0].update(segmentation={}), "segmentation that cannot be read"),
        (
            lambda tree: tree["annotations"][0]["segmentation"].update(size=[64, 48]),
            "has a mask of [64, 48] for an image of [48, 64]",
        ),
        (lambda tree: tree["annotations"][0]["segmentation"].update(counts=[5, 5]), "whose runs do not fill the image"),
        (lambda tree: tree["annotations"][0]["segmentation"].update(counts="zz9"), "annotation 1 has a "),
        (lambda tree: tree["annotations"][0]["segmentation"].update(counts="\u2603"), "annotation 1 has a "),
    ],
)
def test_a_wrong_annotation_file_is_refused_with_the_entry(tmp_path, change: Change, message: str):
    path = write(tmp_path, [annotation(1, 1, square())])
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError) as caught:
        CocoData(path, tmp_path / "images")
    text = str(caught.value)
    assert text.startswith(str(path))
    assert message in text
    assert "\n" not in text


def test_missing_files_are_named(tmp_path):
    path = write(tmp_path, [annotation(1, 1, square())], num_images=3)
    (tmp_path / "images" / "002.png").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 3 images of .*annotations.json, for example 002.png"):
        CocoData(path, tmp_path / "images")
    with pytest.raises(UserError, match="elsewhere: no such folder of images"):
        CocoData(path, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"none\.json: No such file or directory"):
        CocoData(tmp_path / "none.json", tmp_path / "images")
    path.write_text("{")
    with pytest.raises(UserError, match=r"annotations\.json: not JSON"):
        CocoData(path, tmp_path / "images")


def test_other_categories_in_val_than_in_train_are_refused(tmp_path):
    train = read(tmp_path, annotation(1, 1, square()))
    other = tmp_path / "other"
    other.mkdir()
    val = read(other, annotation(1, 1, square()), categories=[{"id": 5, "name": "thing"}, {"id": 6, "name": "more"}])
    check_same_categories(train, train)
    with pytest.raises(UserError, match="differ in their categories: id 6 is 'absent' and 'more'"):
        check_same_categories(train, val)


# Batches


def loader(folder: Path, *, ranks: Ranks = Ranks(), workers: int = 0, **changes: Any) -> DetectionLoader:  # noqa: B008
    recipe = DetectionRecipe(batch_size=2, seed=3, **changes)
    annotations = [annotation(number, number, square(left=2 * number, side=10 + number)) for number in range(1, 8)]
    path = write(folder, annotations, num_images=7) if not (folder / "annotations.json").exists() else None
    data = CocoData(path or folder / "annotations.json", folder / "images", learnable=True)
    return DetectionLoader(data, recipe, ranks, workers=workers, device=CPU)


def equal(one: Sample, other: Sample) -> bool:
    pairs = zip([one.image, *one.targets], [other.image, *other.targets], strict=True)
    return all(torch.equal(here, there) for here, there in pairs)


def test_batches_are_the_same_from_any_step_with_workers_and_over_ranks(tmp_path):
    straight = list(islice(loader(tmp_path).batches(0), 7))
    for start, workers in ((4, 0), (2, 1)):
        later = list(islice(loader(tmp_path, workers=workers).batches(start), 3))
        pairs = zip(chain(*straight[start : start + 3]), chain(*later), strict=True)
        assert all(equal(*pair) for pair in pairs)
    parts = [list(islice(loader(tmp_path, ranks=Ranks(rank, 2)).batches(0), 3)) for rank in range(2)]
    together = [[*one, *other] for one, other in zip(*parts, strict=True)]
    assert all(equal(*pair) for pair in zip(chain(*straight[:3]), chain(*together), strict=True))


def test_boxes_and_masks_are_mirrored_with_their_image(tmp_path):
    data = loader(tmp_path)._data
    tiles = {data.name(i): cv2.imread(str(tmp_path / "images" / data.name(i)), cv2.IMREAD_COLOR_RGB) for i in range(7)}
    mirrored = 0
    for sample in chain(*islice(loader(tmp_path).batches(0), 12)):
        pixels = sample.image.permute(1, 2, 0).numpy()
        [index] = [i for i in range(7) if np.array_equal(np.sort(pixels, 1), np.sort(tiles[data.name(i)], 1))]
        is_mirrored = not np.array_equal(pixels, tiles[data.name(index)])
        mirrored += is_mirrored
        mask, [box] = sample.targets.masks[0].numpy(), sample.targets.boxes.tolist()
        expected = data.targets(index).masks[0].numpy()
        assert np.array_equal(mask, expected[:, ::-1] if is_mirrored else expected)
        left, top, width, height = cv2.boundingRect(mask)
        assert box == [left, top, left + width, top + height]
    assert 0 < mirrored < 24


def test_a_bad_image_is_replaced_and_named_until_there_are_too_many(tmp_path):
    loader(tmp_path)
    (tmp_path / "images" / "003.png").write_bytes(b"")
    tolerant = loader(tmp_path, max_bad_fraction=0.2)
    batches = list(islice(tolerant.batches(0), 9))
    assert tolerant.set_aside == {"003.png": "empty file"}
    assert all(len(batch) == 2 for batch in batches)
    with pytest.raises(UserError, match=r"1 of 7 images cannot be used.*003.png \(empty file\)"):
        list(islice(loader(tmp_path).batches(0), 9))


def test_a_batch_that_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(UserError, match="batch_size is 2: not a multiple of the 3 processes"):
        loader(tmp_path, ranks=Ranks(0, 3))
    data = loader(tmp_path)._data
    with pytest.raises(UserError, match="fewer than one batch, batch_size = 8"):
        DetectionLoader(data, DetectionRecipe(batch_size=8), Ranks(), workers=0, device=CPU)
