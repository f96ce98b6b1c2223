import numpy as np
import pytest

from lowssl_core.views import ViewsConfig, matched_local_size, measure, pixel_scale_ratio

SQUARE, PHOTOGRAPH = np.array([[256, 256]]), np.array([[375, 500]])

# Global scale, local scale, local size, ratio on 256 x 256 images, ratio on 375 x 500 images.
TABLE = [
    ((0.3, 1.0), (0.05, 0.3), 96, 1.77, 1.89),
    ((0.3, 1.0), (0.05, 0.3), 112, 1.30, 1.39),
    ((0.3, 1.0), (0.05, 0.3), 128, 1.00, 1.07),
    ((0.3, 1.0), (0.05, 0.3), 144, 0.79, 0.84),
    ((0.3, 1.0), (0.05, 0.3), 160, 0.64, 0.68),
    ((0.14, 1.0), (0.05, 0.14), 96, 1.29, 1.40),
    ((0.25, 1.0), (0.05, 0.25), 96, 1.64, None),
    ((0.4, 1.0), (0.05, 0.4), 96, 2.01, None),
]


@pytest.mark.parametrize(("global_scale", "local_scale", "local_size", "square", "photograph"), TABLE)
def test_measured_ratios_are_those_of_the_papers_recipes(
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    local_size: int,
    square: float,
    photograph: float | None,
) -> None:
    for sizes, expected in ((SQUARE, square), (PHOTOGRAPH, photograph)):
        if expected is not None:
            ratio = pixel_scale_ratio(
                sizes, local_size=local_size, global_scale=global_scale, local_scale=local_scale, pairs=100_000
            )
            assert ratio == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("global_size", "square", "photograph"), [(224, 128, 132), (160, 91, 94), (128, 73, 75)])
def test_matched_sizes_of_large_views(global_size: int, square: int, photograph: int) -> None:
    assert matched_local_size(SQUARE, global_size=global_size) == square
    assert matched_local_size(PHOTOGRAPH, global_size=global_size) == photograph


@pytest.mark.parametrize(("global_size", "accepted"), [(64, (36, 37, 38)), (32, (18, 19))])
def test_matched_sizes_of_small_views(global_size: int, accepted: tuple[int, ...]) -> None:
    for side in (32, 64, 96, 256):
        assert matched_local_size(np.array([[side, side]]), global_size=global_size) in accepted


@pytest.mark.parametrize("grid", [1, 14, 16, 32])
def test_the_matched_size_is_on_the_grid_and_closest_to_one(grid: int) -> None:
    matched = matched_local_size(SQUARE, grid=grid)
    assert matched % grid == 0
    at, below, above = (pixel_scale_ratio(SQUARE, local_size=matched + step) for step in (0, -grid, grid))
    assert abs(np.sqrt(at) - 1) <= min(abs(np.sqrt(below) - 1), abs(np.sqrt(above) - 1))
    assert matched_local_size(SQUARE, global_size=32, grid=64) == 64


def test_the_samplers_rejections_count() -> None:
    closed_form = 0.175 * np.log(1 / 0.3) / 0.7 * (224 / 128) ** 2
    assert closed_form == pytest.approx(0.92, abs=0.005)
    assert pixel_scale_ratio(SQUARE) > closed_form + 0.05


def test_all_image_sizes_count_alike() -> None:
    both = np.concatenate([SQUARE, PHOTOGRAPH])
    mean = (pixel_scale_ratio(SQUARE) + pixel_scale_ratio(PHOTOGRAPH)) / 2
    assert pixel_scale_ratio(both) == pytest.approx(mean, abs=0.006)


def test_a_measurement_agrees_with_the_functions() -> None:
    measured = measure(ViewsConfig(local_size=96), PHOTOGRAPH)
    assert measured.ratio == pytest.approx(pixel_scale_ratio(PHOTOGRAPH, local_size=96))
    assert (measured.local_size, measured.matched_size) == (96, matched_local_size(PHOTOGRAPH))
    assert measured.local_crop_scale == pytest.approx(0.175, abs=0.002)
    area = 375 * 500
    assert measured.global_pixel_scale == pytest.approx(measured.global_crop_scale * area / 224**2)
    assert measured.local_pixel_scale == pytest.approx(measured.local_crop_scale * area / 96**2)


def test_a_matched_configuration_measures_one() -> None:
    measured = measure(ViewsConfig(), SQUARE)
    assert measured.local_size == measured.matched_size
    assert measured.ratio == pytest.approx(1, abs=0.01)
    assert measure(ViewsConfig(), SQUARE, grid=16).local_size == 128


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(N, 2\), heights and widths"):
        pixel_scale_ratio(np.array([256, 256]))
    with pytest.raises(ValueError, match="grid is 0"):
        matched_local_size(SQUARE, grid=0)
