import random
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp, kstest, uniform
from torchvision.transforms import ColorJitter

from lowssl_core.views import PhotometricConfig, ViewParameters, ViewsConfig, sample_parameters

SWAV = PhotometricConfig(
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    blur_probability=(0.5, 0.5, 0.5),
    solarize_probability=(0.0, 0.0, 0.0),
)


def draw(config: ViewsConfig, count: int) -> list[list[ViewParameters]]:
    rng = np.random.default_rng(0)
    return [sample_parameters(config, 96, 300, 400, rng) for _ in range(count)]


def test_a_draw_is_a_function_of_the_generator_alone() -> None:
    config = ViewsConfig()
    first, second = (sample_parameters(config, 96, 300, 400, np.random.default_rng(7)) for _ in range(2))
    assert first == second
    assert sample_parameters(config, 96, 300, 400, np.random.default_rng(8)) != first


def test_every_draw_takes_the_same_count_of_numbers() -> None:
    states = []
    for photometric in (PhotometricConfig(), SWAV, PhotometricConfig(jitter_probability=0)):
        rng = np.random.default_rng(0)
        sample_parameters(ViewsConfig(photometric=photometric), 96, 10, 900, rng)
        states.append(rng.bit_generator.state["state"])
    assert states[0] == states[1] == states[2]


def test_globals_come_first_and_locals_are_small() -> None:
    for views in draw(ViewsConfig(num_locals=3), 20):
        assert [view.size for view in views] == [224, 224, 96, 96, 96]
        shares = [view.box[2] * view.box[3] / (300 * 400) for view in views]
        assert min(shares[:2]) > 0.29
        assert max(shares[2:]) < 0.31
    assert len(sample_parameters(ViewsConfig(num_locals=0), 96, 300, 400, np.random.default_rng(0))) == 2


@pytest.mark.parametrize("photometric", [PhotometricConfig(), SWAV], ids=["DINO", "SwAV"])
def test_operations_happen_with_their_probabilities(photometric: PhotometricConfig) -> None:
    views = draw(ViewsConfig(photometric=photometric), 2000)
    for place in range(8):
        column = [one[place] for one in views]
        kind = min(place, 2)
        expected = {
            "flip": 0.5,
            "jitter": 0.8,
            "gray": 0.2,
            "blur_radius": photometric.blur_probability[kind],
            "solarize": photometric.solarize_probability[kind],
        }
        for name, probability in expected.items():
            share = np.mean([bool(getattr(view, name)) for view in column])
            assert share == pytest.approx(probability, abs=4 * np.sqrt(probability * (1 - probability) / 2000))


@pytest.mark.parametrize("photometric", [PhotometricConfig(), SWAV], ids=["DINO", "SwAV"])
def test_jitter_factors_and_their_order_are_distributed_as_torchvisions(photometric: PhotometricConfig) -> None:
    strengths = (photometric.brightness, photometric.contrast, photometric.saturation, photometric.hue)
    names = ("brightness", "contrast", "saturation", "hue")
    torch.manual_seed(0)
    jitter = ColorJitter(*strengths)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    theirs = [ColorJitter.get_params(*ranges) for _ in range(3000)]
    ours = [view.jitter for views in draw(ViewsConfig(photometric=photometric), 1000) for view in views if view.jitter]
    for index, name in enumerate(names):
        factors = [dict(one)[name] for one in ours]
        assert ks_2samp(factors, [one[index + 1] for one in theirs]).pvalue > 0.001
    orders = [tuple(name for name, _ in one) for one in ours]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24
    assert chisquare(counts).pvalue > 0.001


def test_blur_radii_are_uniform() -> None:
    radii = [view.blur_radius for views in draw(ViewsConfig(), 500) for view in views if view.blur_radius]
    assert kstest(radii, uniform(0.1, 1.9).cdf).pvalue > 0.001
    random.seed(0)
    assert ks_2samp(radii, [random.uniform(0.1, 2.0) for _ in range(2000)]).pvalue > 0.001


def test_an_adjustment_of_strength_zero_is_left_out() -> None:
    photometric = PhotometricConfig(hue=0.0, contrast=0.0, jitter_probability=1.0)
    for views in draw(ViewsConfig(photometric=photometric), 5):
        assert all(sorted(dict(view.jitter)) == ["brightness", "saturation"] for view in views)


def test_a_view_follows_its_image_to_another_size() -> None:
    view = ViewParameters(box=(100, 200, 400, 800), size=96)
    assert view.rescaled((1000, 2000), (250, 500)).box == (25, 50, 100, 200)
    assert ViewParameters(box=(0, 0, 1001, 999), size=96).rescaled((1001, 999), (501, 500)).box == (0, 0, 501, 500)


@pytest.mark.parametrize(
    "wrong",
    [
        {"brightness": -0.1},
        {"hue": 0.6},
        {"gray_probability": 1.2},
        {"blur_probability": (0.5, 0.5, -1.0)},
        {"solarize_probability": (0.5, 0.5)},
        {"blur_radius": (0.0, 2.0)},
        {"blur_radius": (3.0, 2.0)},
    ],
    ids=str,
)
def test_impossible_photometrics_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PhotometricConfig(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_size": 0},
        {"num_locals": -1},
        {"local_size": 0},
        {"local_size": "auto"},
        {"global_scale": (0.0, 1.0)},
        {"local_scale": (0.3, 0.05)},
    ],
    ids=str,
)
def test_impossible_views_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ViewsConfig(**wrong)
