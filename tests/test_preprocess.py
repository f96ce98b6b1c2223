import math

import numpy as np
import pytest
from torchvision.transforms import v2

from lowssl_core.preprocess import Preprocess


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth coloured picture with some noise: bicubic resizing has something to get wrong."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / a + columns / b) for a, b in ((3.0, 7.0), (9.0, 4.0), (5.0, 11.0))]
    return np.clip(127 + 90 * np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def cubic(x: float, a: float = -0.5) -> float:
    """Keys' cubic kernel."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def weights(length: int, start: float, side: float, size: int) -> np.ndarray:
    """(size, length) rows that resample [start, start + side) of `length` pixels, the kernel widened to the scale."""
    scale = side / size
    stretch = max(scale, 1.0)
    matrix = np.zeros((size, length))
    for row in range(size):
        center = start + (row + 0.5) * scale
        for pixel in range(length):
            if abs(pixel + 0.5 - center) < 2 * stretch:
                matrix[row, pixel] = cubic((pixel + 0.5 - center) / stretch)
        matrix[row] /= matrix[row].sum()
    return matrix


@pytest.mark.parametrize("shape", [(75, 100), (50, 37), (20, 20), (11, 64)])
def test_equals_bicubic_resampling_written_out(shape: tuple[int, int]) -> None:
    image = picture(*shape)
    height, width = shape
    side = min(shape) * 16 / 20
    rows = weights(height, (height - side) / 2, side, 16)
    columns = weights(width, (width - side) / 2, side, 16)
    expected = np.einsum("yh,hwc,xw->yxc", rows, image.astype(float), columns).clip(0, 255)
    # Pillow rounds to whole levels after each of the two directions.
    assert np.abs(Preprocess(size=16, resize=20)(image) - expected).max() < 2.5


def test_equals_resize_then_center_crop_where_those_round_nothing() -> None:
    image = picture(80, 120)
    then_crop = v2.Compose([v2.Resize(20, v2.InterpolationMode.BICUBIC), v2.CenterCrop(16)])
    expected = np.asarray(then_crop(v2.functional.to_pil_image(image)))
    np.testing.assert_array_equal(Preprocess(size=16, resize=20)(image), expected)


def test_the_usual_margin_is_256_to_224() -> None:
    assert Preprocess(size=224) == Preprocess(size=224, resize=256)
    assert Preprocess(size=32).resize == round(32 * 256 / 224) == 37


def test_an_image_and_its_half_give_nearly_the_same_input() -> None:
    image = np.kron(picture(40, 60), np.ones((2, 2, 1), np.uint8))
    halved = image[::2, ::2]
    difference = Preprocess(size=16)(image).astype(int) - Preprocess(size=16)(np.ascontiguousarray(halved))
    assert math.sqrt((difference**2).mean()) < 4


@pytest.mark.parametrize(("size", "resize"), [(0, 4), (8, 7), (-1, None)])
def test_impossible_sizes_are_refused(size: int, resize: int | None) -> None:
    with pytest.raises(ValueError, match="1 <= size <= resize"):
        Preprocess(size=size, resize=resize)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 4), (0, 8, 3)])
def test_other_arrays_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        Preprocess(size=4)(np.zeros(shape, np.uint8))
