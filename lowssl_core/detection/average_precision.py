"""COCO's average precision of a detector's boxes and masks, as pycocotools computes it."""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection import MaskRCNN

from lowssl_core.detection.coco import CocoData
from lowssl_core.detection.loading import image_tensor
from lowssl_core.distributed import rank, world_size
from lowssl_core.errors import UserError
from lowssl_core.images import BadImage, decode
from lowssl_core.meter import Meter

Detection = Mapping[str, Any]
"""One found object in COCO's format for results: image_id, category_id, score, bbox, segmentation (RLE)."""

Kind = Literal["box", "mask"]
KINDS: tuple[Kind, ...] = ("box", "mask")
# The first six of the twelve numbers of pycocotools; the others are recalls.
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_MASK_THRESHOLD = 0.5


def judge(detector: MaskRCNN, data: CocoData) -> dict[Kind, dict[str, float]] | None:
    """Average precision of boxes and of masks on `data`; on ranks but the first, None. All ranks call it together."""
    share = range(rank(), len(data), world_size())
    found: list[Detection] = []
    with contextlib.ExitStack() as stack:
        meter = stack.enter_context(Meter("detecting", len(share), "images")) if rank() == 0 else None
        for index in share:
            found += detect(detector, data, index)
            if meter:
                meter.advance()
    gathered = _gather(found)
    if rank() > 0:
        return None
    return {kind: average_precision(data, gathered, kind) for kind in KINDS}


@torch.no_grad()
def detect(detector: MaskRCNN, data: CocoData, index: int) -> list[Detection]:
    """What the detector finds in one image, which is seen alone: nothing depends on its neighbors in a batch.

    Raises:
        UserError: the image cannot be read; leaving it out would make the figures those of other data.
    """
    try:
        pixels = decode(data.read(index))
    except BadImage as error:
        raise UserError(f"--val-images: {data.name(index)}: {error.reason}") from None
    device = next(detector.parameters()).device
    output = detector.eval()([image_tensor(pixels).to(device).float() / 255])[0]
    masks = (output["masks"][:, 0] >= _MASK_THRESHOLD).to(torch.uint8).cpu().numpy()
    boxes = output["boxes"].double().cpu().numpy()
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {
            "image_id": data.image_ids[index],
            "category_id": data.category_ids[label - 1],
            "score": score,
            "bbox": box.tolist(),
            "segmentation": rle.encode(np.asfortranarray(mask)),
        }
        for box, mask, label, score in zip(
            boxes, masks, output["labels"].tolist(), output["scores"].double().tolist(), strict=True
        )
    ]


def average_precision(data: CocoData, detections: Sequence[Detection], kind: Kind) -> dict[str, float]:
    """COCO's six average precisions as shares, those of sizes of which `data` has no object left out."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells of each of its steps
        evaluation = COCOeval(
            _index(data, _annotations(data)),
            _index(data, _results(detections, kind)),
            "bbox" if kind == "box" else "segm",
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = zip(NAMES, evaluation.stats[: len(NAMES)].tolist(), strict=True)
    return {name: value for name, value in values if value >= 0}


def _annotations(data: CocoData) -> Iterable[dict[str, Any]]:
    for image_id, instances in zip(data.image_ids, data.instances, strict=True):
        for each in instances:
            yield {
                "id": each.id,
                "image_id": image_id,
                "category_id": data.category_ids[each.label - 1],
                "bbox": list(each.box),
                "area": each.area,
                "iscrowd": int(each.is_crowd),
                "segmentation": each.mask,
            }


def _results(detections: Iterable[Detection], kind: Kind) -> Iterable[dict[str, Any]]:
    """Detections as `COCO.loadRes` would make them, which takes no empty list: the size of each is that of its kind."""
    for number, each in enumerate(detections, 1):
        area = each["bbox"][2] * each["bbox"][3] if kind == "box" else float(rle.area(each["segmentation"]))
        yield {**each, "id": number, "area": area, "iscrowd": 0}


def _index(data: CocoData, annotations: Iterable[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": image_id, "height": height, "width": width}
            for image_id, (height, width) in zip(data.image_ids, data.sizes_of, strict=True)
        ],
        "categories": [{"id": number} for number in data.category_ids],
        "annotations": list(annotations),
    }
    coco.createIndex()
    return coco


def _gather(found: list[Detection]) -> list[Detection]:
    """Every rank's detections, in the order of images."""
    if world_size() == 1:
        return found
    parts: list[list[Detection]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, found)
    return sorted((each for part in parts for each in part), key=lambda each: int(each["image_id"]))
