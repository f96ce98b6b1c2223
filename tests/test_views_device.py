from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from skimage import data
from torch import Tensor

from lowssl_core.images import Pixels
from lowssl_core.views import (
    IMAGENET_STD,
    CpuViews,
    DeviceViews,
    PhotometricConfig,
    ViewParameters,
    Views,
    ViewsConfig,
    normalize,
    pack_images,
    read_for_views,
)

PLAIN = PhotometricConfig(jitter_probability=0, gray_probability=0, blur_probability=(0, 0, 0))
SWAV = PhotometricConfig(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur_probability=(0.5, 0.5, 0.5))


def images() -> list[Pixels]:
    sizes = {"coffee": (140, 100), "astronaut": (128, 128), "chelsea": (90, 150), "rocket": (200, 60)}
    return [cv2.resize(getattr(data, name)(), size).astype(np.uint8) for name, size in sizes.items()]


def both(config: ViewsConfig, device: str = "cpu") -> tuple[Views, list[Tensor]]:
    """The device's views and, for each of them, what CpuViews makes of the same parameters."""
    rng = np.random.default_rng(0)
    read = [read_for_views(image, config, 36, rng) for image in images()]
    made = DeviceViews(config, 36, device)(pack_images([image for image, _ in read], [views for _, views in read]))
    one_by_one = [CpuViews(config, 36).render(image, views) for image, views in read]
    expected = [
        normalize(torch.from_numpy(np.stack([one[kind][view] for one in one_by_one])))
        for kind, count in ((0, 2), (1, config.num_locals))
        for view in range(count)
    ]
    return made, expected


def levels(difference: Tensor) -> Tensor:
    """Mean absolute difference of each image, in levels of 0 to 255."""
    return (difference * 255 * torch.tensor(IMAGENET_STD)[:, None, None]).abs().mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    ("photometric", "bound"), [(PLAIN, 0.3), (PhotometricConfig(), 1.5), (SWAV, 2.5)], ids=["plain", "DINO", "SwAV"]
)
def test_device_views_are_the_cpu_views(photometric: PhotometricConfig, bound: float) -> None:
    made, expected = both(ViewsConfig(global_size=64, photometric=photometric))
    assert [len(made.globals), len(made.locals)] == [2, 6]
    for view, reference in zip([*made.globals, *made.locals], expected, strict=True):
        assert view.shape == reference.shape
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert levels(view - reference).max() < bound


@pytest.mark.parametrize(
    "change",
    [
        {"flip": True},
        {"jitter": (("brightness", 1.4),)},
        {"jitter": (("contrast", 1.4),)},
        {"jitter": (("contrast", 0.5), ("brightness", 1.5), ("contrast", 1.5))},
        {"jitter": (("saturation", 1.6),)},
        {"jitter": (("hue", 0.15),)},
        {"gray": True},
        {"blur_radius": 0.4},
        {"blur_radius": 2.0},
        {"solarize": True},
    ],
    ids=str,
)
def test_each_operation_is_the_cpus(change: dict[str, object]) -> None:
    config = ViewsConfig(global_size=64, num_locals=0)
    for image in images():
        view = ViewParameters(box=(4, 6, 50, 52), size=64)
        views = [view, replace(view, **change)]  # type: ignore[arg-type]
        made = DeviceViews(config, 36, "cpu")(pack_images([image], [views]))
        expected = normalize(torch.from_numpy(CpuViews(config, 36).render(image, views)[0]))
        assert (
            levels(made.globals[0] - expected[:1]).max() < 0.3
        )  # rounded or not between the two directions of resizing
        assert levels(made.globals[1] - expected[1:]).max() < 1.0


def test_padding_does_not_show() -> None:
    config = ViewsConfig(global_size=32, photometric=PLAIN)
    image, views = read_for_views(images()[2], config, 18, np.random.default_rng(0))
    device = DeviceViews(config, 18, "cpu")
    alone = device(pack_images([image], [views]))
    white = np.full((300, 310, 3), 255, np.uint8)
    among = device(pack_images([white, image], [views, views]))
    for one, two in zip(alone.globals + alone.locals, among.globals + among.locals, strict=True):
        torch.testing.assert_close(one[0], two[1], atol=0.02, rtol=0)


def test_two_crop_recipes_have_no_locals() -> None:
    made, _ = both(ViewsConfig(global_size=32, num_locals=0))
    assert (len(made.globals), made.locals) == (2, [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_makes_the_same_views() -> None:
    made, expected = both(ViewsConfig(global_size=64), "cuda")
    for view, reference in zip([*made.globals, *made.locals], expected, strict=True):
        assert levels(view.cpu() - reference).max() < 1.5
