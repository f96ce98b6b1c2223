import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from lowssl_core.views import sample_boxes
from lowssl_core.views.geometry import DRAWS_PER_BOX, TRIES, boxes_from_uniforms


def box_by_the_book(
    uniforms: list[float], height: int, width: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """One box from its uniform numbers, as RandomResizedCrop's definition reads."""
    for attempt in range(TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniforms[attempt])
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * uniforms[TRIES + attempt])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(uniforms[-2] * (height - h + 1)), int(uniforms[-1] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def test_boxes_follow_the_definition_one_by_one() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(8, 400, (3000, 2))
    sizes[:200, 0] = 9  # slivers, where most tries fail
    for scale in ((0.05, 0.3), (0.3, 1.0), (0.9, 1.0)):
        uniforms = rng.random((len(sizes), DRAWS_PER_BOX))
        boxes = boxes_from_uniforms(uniforms, sizes[:, 0], sizes[:, 1], *scale)
        expected = [box_by_the_book(u, *s, scale) for u, s in zip(uniforms.tolist(), sizes.tolist(), strict=True)]
        np.testing.assert_array_equal(boxes, expected)


def test_boxes_lie_inside_their_images() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(8, 600, (5000, 2))
    top, left, height, width = sample_boxes(sizes, (0.05, 1.0), rng).T
    assert (np.minimum(top, left) >= 0).all()
    assert (np.minimum(height, width) >= 1).all()
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()


def test_images_too_long_for_any_box_get_the_centered_one() -> None:
    sizes = np.array([[10, 500], [500, 10], [300, 300]])
    boxes = sample_boxes(sizes, (1.0, 1.0), np.random.default_rng(0))
    np.testing.assert_array_equal(boxes[:2], [[0, 243, 10, 13], [243, 0, 13, 10]])


@pytest.mark.parametrize("size", [(375, 500), (64, 64), (60, 200)])
@pytest.mark.parametrize("scale", [(0.3, 1.0), (0.05, 0.3)])
def test_boxes_are_distributed_as_torchvisions(size: tuple[int, int], scale: tuple[float, float]) -> None:
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(2500)])
    ours = sample_boxes(np.tile(size, (20_000, 1)), scale, np.random.default_rng(0))
    for measure in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    ):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 0.001
