"""AP against a slow transcription of COCO's definition, and its fixed points."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as rle

from lowssl_core.detection.average_precision import KINDS, NAMES, average_precision
from lowssl_core.detection.coco import CocoData

SIZE = (160, 200)
THRESHOLDS = [0.5 + 0.05 * step for step in range(10)]
# As pycocotools rounds them: a recall may fall on one exactly.
RECALLS = np.linspace(0, 1, 101).tolist()
RANGES = {"AP": (0, 1e10), "APs": (0, 32**2), "APm": (32**2, 96**2), "APl": (96**2, 1e10)}
# Neither starting at 1 nor following each other, as in COCO.
CATEGORIES = (3, 7)

Mask = NDArray[np.uint8]


def rectangle(x: float, y: float, width: float, height: float) -> Mask:
    mask = np.zeros(SIZE, np.uint8)
    mask[round(y) : round(y + height), round(x) : round(x + width)] = 1
    return mask


def ellipse(x: float, y: float, width: float, height: float) -> Mask:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    inside = ((columns - x - width / 2) / (width / 2)) ** 2 + ((rows - y - height / 2) / (height / 2)) ** 2 <= 1
    return inside.astype(np.uint8)


def encoded(mask: Mask) -> dict[str, Any]:
    return rle.encode(np.asfortranarray(mask))


def data_of(folder: Path, truths: list[dict[str, Any]], num_images: int) -> CocoData:
    """A data set with these objects, whose images need no content: AP looks at annotations alone."""
    images = folder / "images"
    images.mkdir()
    entries = []
    for number in range(1, num_images + 1):
        (images / f"{number}.png").touch()
        entries.append({"id": 10 * number, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]})
    annotations = []
    for number, truth in enumerate(truths, 1):
        mask = encoded(truth["mask"])
        segmentation = {"size": mask["size"], "counts": mask["counts"].decode()}
        fields = {key: truth[key] for key in ("image_id", "category_id", "bbox", "iscrowd")}
        annotations.append(fields | {"id": number, "area": int(truth["mask"].sum()), "segmentation": segmentation})
    categories = [{"id": number, "name": str(number)} for number in CATEGORIES]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": categories}))
    return CocoData(path, images)


def detections_of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    fields = ("image_id", "category_id", "bbox", "score")
    return [{key: each[key] for key in fields} | {"segmentation": encoded(each["mask"])} for each in found]


# The oracle: loops over the definition at cocodataset.org/#detection-eval


def overlap(kind: str, found: dict[str, Any], truth: dict[str, Any]) -> float:
    """IoU; with a crowd the share of what was found that lies in it."""
    if kind == "mask":
        both = float((found["mask"] & truth["mask"]).sum())
        sizes = float(found["mask"].sum()), float(truth["mask"].sum())
    else:
        (x, y, w, h), (u, v, a, b) = found["bbox"], truth["bbox"]
        both = max(0.0, min(x + w, u + a) - max(x, u)) * max(0.0, min(y + h, v + b) - max(y, v))
        sizes = w * h, a * b
    union = sizes[0] if truth["iscrowd"] else sizes[0] + sizes[1] - both
    return both / union if union else 0.0


def size_of(kind: str, found: dict[str, Any]) -> float:
    return float(found["mask"].sum()) if kind == "mask" else found["bbox"][2] * found["bbox"][3]


def judged(kind: str, found: list[Any], truths: list[Any], threshold: float, low: float, high: float) -> list[Any]:
    """(score, is right) of one image's detections of one category, those that are not counted left out."""
    uncounted = [bool(t["iscrowd"]) or not low <= t["mask"].sum() <= high for t in truths]
    taken: set[int] = set()
    rows = []
    for each in sorted(found, key=lambda d: -d["score"])[:100]:
        best, match = min(threshold, 1 - 1e-10), None
        # Objects that count are preferred to those that do not, whatever the overlap.
        for index in sorted(range(len(truths)), key=lambda i: uncounted[i]):
            if index in taken and not truths[index]["iscrowd"]:
                continue
            if match is not None and not uncounted[match] and uncounted[index]:
                break
            if (value := overlap(kind, each, truths[index])) >= best:
                best, match = value, index
        if match is not None:
            taken.add(match)
            if not uncounted[match]:
                rows.append((each["score"], True))
        elif low <= size_of(kind, each) <= high:
            rows.append((each["score"], False))
    return rows


def area_under(rows: list[Any], count: int) -> float:
    """Mean over 101 recalls of the best precision at that recall or above."""
    rows = sorted(rows, key=lambda row: -row[0])
    points = []
    right = 0
    for place, (_, is_right) in enumerate(rows, 1):
        right += is_right
        points.append((right / count, right / place))
    best = [max((p for r, p in points if r >= recall), default=0.0) for recall in RECALLS]
    return sum(best) / len(best)


def slow_average_precision(kind: str, found: list[Any], truths: list[Any]) -> dict[str, float]:
    values = {}
    images = sorted({each["image_id"] for each in (*found, *truths)})
    for name, (low, high) in RANGES.items():
        table = []
        for category in CATEGORIES:
            ours = [t for t in truths if t["category_id"] == category]
            count = sum(not t["iscrowd"] and low <= t["mask"].sum() <= high for t in ours)
            if not count:
                continue
            row = []
            for threshold in THRESHOLDS:
                rows: list[Any] = []
                for image in images:
                    here = [d for d in found if d["image_id"] == image and d["category_id"] == category]
                    rows += judged(kind, here, [t for t in ours if t["image_id"] == image], threshold, low, high)
                row.append(area_under(rows, count))
            table.append(row)
        if not table:
            continue
        means = np.mean(table, axis=0)
        values[name] = float(means.mean())
        if name == "AP":
            values |= {"AP50": float(means[0]), "AP75": float(means[5])}
    return values


def scene(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Objects of all sizes on four images, one a crowd, and detections of them that are more or less off."""
    rng = np.random.default_rng(seed)
    truths, found = [], []
    for image in range(1, 5):
        for number in range(5):
            width, height = rng.uniform(10, 130, 2)
            box = [float(v) for v in (rng.uniform(0, 200 - width), rng.uniform(0, 160 - height), width, height)]
            category = int(rng.choice(CATEGORIES))
            shape = ellipse if rng.random() < 0.5 else rectangle
            truths.append({"image_id": 10 * image, "category_id": category, "bbox": box, "mask": shape(*box)})
            truths[-1]["iscrowd"] = int(image == 2 and number == 0)
            for _ in range(rng.integers(0, 3)):
                shift = rng.normal(0, 0.06, 4) * [width, height, width, height]
                guess = (np.array(box) + shift).clip(0, None)
                guess[2:] = np.minimum(guess[2:].clip(4), [200 - guess[0], 160 - guess[1]])
                right = category if rng.random() < 0.8 else int(rng.choice(CATEGORIES))
                guessed = {"image_id": 10 * image, "category_id": right, "bbox": guess.tolist()}
                found.append(guessed | {"mask": shape(*guess), "score": float(rng.random())})
    return truths, found


# The truths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_ap_is_cocos_definition(tmp_path, kind, seed):
    truths, found = scene(seed)
    values = average_precision(data_of(tmp_path, truths, 4), detections_of(found), kind)
    expected = slow_average_precision(kind, found, truths)
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=1e-9), name
    assert 0.05 < values["AP"] < 0.95


def test_ap_of_a_case_that_can_be_counted_by_hand(tmp_path):
    """Two objects: one found exactly, one at IoU 2/3, and between them in score one that is not there.

    Up to IoU .65 (four thresholds) precision is 1 at recalls to 1/2 (51 of 101) and 2/3 beyond; above, 1 to 1/2 alone.
    """
    box, other = [10, 10, 40, 40], [100, 50, 60, 60]
    truths = [
        {"image_id": 10, "category_id": 3, "bbox": each, "mask": rectangle(*each), "iscrowd": 0}
        for each in (box, other)
    ]
    guesses = [(0.9, box), (0.8, [10, 100, 40, 40]), (0.7, [100, 50, 60, 40])]
    found = [
        {"image_id": 10, "category_id": 3, "bbox": each, "mask": rectangle(*each), "score": score}
        for score, each in guesses
    ]
    high, low = (51 + 50 * 2 / 3) / 101, 51 / 101
    for kind in KINDS:
        values = average_precision(data_of_once(tmp_path, truths), detections_of(found), kind)
        assert values["AP50"] == pytest.approx(high)
        assert values["AP75"] == pytest.approx(low)
        assert values["AP"] == pytest.approx((4 * high + 6 * low) / 10)
        assert "APs" not in values  # no object is small


def data_of_once(folder: Path, truths: list[dict[str, Any]]) -> CocoData:
    path = folder / "annotations.json"
    return CocoData(path, folder / "images") if path.exists() else data_of(folder, truths, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_perfect_detections_have_ap_1_and_none_have_0(tmp_path, kind):
    truths, _ = scene(0)
    data = data_of(tmp_path, truths, 4)
    perfect = [each | {"score": 0.5} for each in truths if not each["iscrowd"]]
    assert average_precision(data, detections_of(perfect), kind) == dict.fromkeys(NAMES, pytest.approx(1.0))
    assert average_precision(data, [], kind) == dict.fromkeys(NAMES, 0.0)


def test_boxes_and_masks_are_judged_apart(tmp_path):
    truths, _ = scene(1)
    data = data_of(tmp_path, truths, 4)
    empty = np.zeros(SIZE, np.uint8)
    found = detections_of([each | {"score": 0.5, "mask": empty} for each in truths if not each["iscrowd"]])
    assert average_precision(data, found, "box")["AP"] == pytest.approx(1.0)
    assert average_precision(data, found, "mask")["AP"] == 0.0
