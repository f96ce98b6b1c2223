import numpy as np
import torch
from torchvision.transforms import Compose, Normalize, ToTensor

from lowssl_core.views import IMAGENET_MEAN, IMAGENET_STD, Views, normalize


def test_normalize_is_to_tensor_and_imagenets_statistics() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), np.uint8)
    plain = Compose([ToTensor(), Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    normalized = normalize(torch.from_numpy(images))
    torch.testing.assert_close(normalized, torch.stack([plain(image) for image in images]))
    assert normalized.is_contiguous(memory_format=torch.channels_last)


def test_views_move_together() -> None:
    views = Views([torch.zeros(1, 3, 4, 4)] * 2, [torch.zeros(1, 3, 2, 2)])
    moved = views.to("meta")
    assert [view.device.type for view in moved.globals + moved.locals] == ["meta"] * 3
    assert [len(moved.globals), len(moved.locals)] == [2, 1]
