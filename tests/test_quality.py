"""Label-free figures of features and retrieval, against their definitions in plain loops."""

import colorsys
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lowssl_core.methods.method import feature_signals
from lowssl_core.preprocess import Preprocess
from lowssl_core.quality import label_free_quality, raw_pixels, retrieval_copies, retrieval_copy, retrieval_recall
from lowssl_core.spectra import alignment, alpha_req, feature_deviation, lidar, rankme, uniformity


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """Blocks of random colours, each picture of its own size."""
    rng = np.random.default_rng(seed)
    shapes = [(8 * int(rng.integers(3, 7)), 8 * int(rng.integers(3, 7))) for _ in range(count)]
    return [
        np.kron(rng.integers(0, 256, (height // 8, width // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        for height, width in shapes
    ]


def orthogonal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Orthonormal columns, each of which sums to 0."""
    generator = torch.manual_seed(seed)
    matrix = torch.randn(rows, columns + 1, generator=generator, dtype=torch.float64)
    matrix[:, 0] = 1  # what follows is orthogonal to it
    return torch.linalg.qr(matrix)[0][:, 1:]


def of_spectrum(values: list[float] | Tensor, rows: int = 60, width: int | None = None) -> Tensor:
    """Features (rows, width), float64, centred, whose singular values are exactly known."""
    scales = torch.as_tensor(values, dtype=torch.float64)
    turn = torch.randn(width or len(scales), len(scales), generator=torch.manual_seed(1), dtype=torch.float64)
    return orthogonal(rows, len(scales)) * scales @ torch.linalg.qr(turn)[0].T


def entropy_rank(values: list[float]) -> float:
    return math.exp(-sum(v / sum(values) * math.log(v / sum(values)) for v in values if v > 0))


def noisy_views(num_images: int = 40, num_views: int = 5, width: int = 6, seed: int = 0) -> Tensor:
    """Features (N, Q, D) whose images' means and whose noise each have their own shape."""
    generator = torch.manual_seed(seed)
    means = torch.randn(num_images, 1, width, generator=generator) * torch.linspace(0.2, 3, width)
    return means + torch.randn(num_images, num_views, width, generator=generator) * torch.linspace(1, 0.1, width) + 2


def test_rankme_of_orthogonal_rows_is_their_number() -> None:
    assert rankme(torch.eye(7, 12) * 3) == pytest.approx(7)


def test_rankme_of_one_direction_is_one() -> None:
    assert rankme(torch.arange(1.0, 9).unsqueeze(1) * torch.randn(1, 5)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("values", [[2.0] * 9, [5.0, 3, 1, 0.1], [1.0, 1e-6, 1e-12]])
def test_rankme_of_known_singular_values_is_that_of_the_formula(values: list[float]) -> None:
    assert rankme(of_spectrum(values, width=20)) == pytest.approx(entropy_rank(values), rel=1e-9)


def test_rankme_of_more_rows_than_a_block_keeps_small_singular_values() -> None:
    values = [10.0 ** (-exponent / 2) for exponent in range(20)]  # down to 3e-10, below the root of float64's rounding
    assert rankme(of_spectrum(values, rows=9001)) == pytest.approx(entropy_rank(values), rel=1e-10)


def test_rankme_equals_its_formula() -> None:
    features = torch.randn(20, 6, generator=torch.manual_seed(0))
    eigenvalues = np.linalg.eigvalsh((features.T @ features).double().numpy())
    assert rankme(features) == pytest.approx(entropy_rank([math.sqrt(value) for value in eigenvalues]), rel=1e-5)


def test_rankme_of_nothing_is_zero_and_of_constant_features_one() -> None:
    assert rankme(torch.zeros(4, 3)) == 0
    assert rankme(torch.ones(4, 3) * 0.1) == pytest.approx(1, abs=1e-6)


def slow_lidar(views: np.ndarray, delta: float) -> float:
    """Thilak et al. 2023, equations 1 to 4, in double loops."""
    num_images, num_views, width = views.shape
    between, within = np.zeros((width, width)), delta * np.eye(width)
    mean = views.mean((0, 1))
    for image in views:
        own = image.mean(0)
        between += np.outer(own - mean, own - mean) / (num_images - 1)
        for sample in image:
            within += np.outer(sample - own, sample - own) / (num_images * (num_views - 1))
    eigenvalues = np.linalg.eigvals(np.linalg.inv(within) @ between)  # those of W^-1/2 B W^-1/2
    return entropy_rank(eigenvalues.real.tolist())


@pytest.mark.parametrize(("num_images", "width", "delta"), [(40, 6, 1e-4), (40, 6, 1.0), (5, 12, 1e-4)])
def test_lidar_equals_its_definition_in_double_loops(num_images: int, width: int, delta: float) -> None:
    views = noisy_views(num_images, width=width)
    expected = slow_lidar(views.double().numpy(), delta)
    assert 1 < expected < min(width, num_images)
    assert lidar(views, delta=delta) == pytest.approx(expected, rel=1e-9)


def test_lidar_of_means_and_noise_made_by_hand_is_the_rank_of_their_ratio() -> None:
    """Axis i has means of variance m_i and views of variance w_i: eigenvalues m_i / (w_i + delta)."""
    means = orthogonal(30, 4) * 29**0.5 * torch.tensor([3.0, 1, 0.5, 2]).double().sqrt()
    patterns = torch.tensor([[1.0, 1, 1, 0], [1, -1, -1, 0], [-1, 1, -1, 0], [-1, -1, 1, 0]]).double()
    # Four views of 1 and -1 have the unbiased variance 4/3.
    views = means.unsqueeze(1) + patterns * torch.tensor([6.0, 1, 1, 0]).double().sqrt() * 0.75**0.5
    ratios = [3 / (6 + 0.01), 1 / (1 + 0.01), 0.5 / (1 + 0.01), 2 / 0.01]
    assert lidar(views, delta=0.01) == pytest.approx(entropy_rank(ratios), rel=1e-9)


def test_lidar_does_not_count_directions_that_views_of_an_image_do_not_share() -> None:
    """RankMe counts the noise in 16 directions; LiDAR sees the three in which images differ."""
    signal = torch.zeros(400, 1, 16)
    signal[..., :3] = 5 * torch.randn(400, 1, 3, generator=torch.manual_seed(3))
    views = signal + torch.randn(400, 50, 16, generator=torch.manual_seed(4))
    assert lidar(views) == pytest.approx(3, abs=0.2)
    assert rankme(views[:, 0]) > 9


def test_lidar_needs_two_images_and_two_views() -> None:
    for shape in ((40, 1, 6), (1, 5, 6), (40, 6)):
        with pytest.raises(ValueError, match="two or more"):
            lidar(torch.ones(*shape))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("count", [12, 150])
def test_alpha_of_a_power_law_is_its_exponent(alpha: float, count: int) -> None:
    """A covariance with eigenvalues rank^-alpha; those of the first three ranks and beyond 100 do not count."""
    eigenvalues = torch.arange(1, count + 1, dtype=torch.float64) ** -alpha
    eigenvalues[:3] *= 50
    eigenvalues[100:] *= 1e-3
    features = of_spectrum(eigenvalues.sqrt(), rows=200) + 7  # a mean is no part of the covariance
    assert alpha_req(features) == pytest.approx(alpha, abs=1e-8)


def test_alpha_weighs_ranks_by_their_inverse() -> None:
    eigenvalues = np.exp(-0.05 * np.arange(1, 31))
    ranks = np.arange(4, 31)
    # numpy's weights multiply residuals, so that their squares count.
    slope = np.polyfit(np.log(ranks), np.log(eigenvalues[3:]), 1, w=ranks**-0.5)[0]
    assert alpha_req(of_spectrum(torch.from_numpy(eigenvalues).sqrt())) == pytest.approx(-slope, rel=1e-9)


def test_alpha_needs_two_eigenvalues_from_the_fourth() -> None:
    assert alpha_req(of_spectrum([8.0, 4, 2, 1])) is None
    assert alpha_req(of_spectrum([8.0, 4, 2, 1, 0.5])) is not None
    assert alpha_req(of_spectrum([8.0, 4, 2, 1, 0.5], width=30).float() + 1) == pytest.approx(
        2 * math.log(2) / math.log(5 / 4), rel=1e-3
    )


def test_alignment_equals_a_double_loop_over_pairs_of_views() -> None:
    views = noisy_views(7, 4).tolist()
    distances = []
    for image in views:
        units = [[x / math.hypot(*view) for x in view] for view in image]
        for a in range(4):
            distances += [math.dist(units[a], units[b]) ** 2 for b in range(a)]
    assert alignment(noisy_views(7, 4)) == pytest.approx(sum(distances) / len(distances), rel=1e-6)


def test_alignment_of_equal_views_is_zero_and_of_opposite_ones_four() -> None:
    row = torch.randn(9, 1, 5, generator=torch.manual_seed(5))
    assert alignment(torch.cat([row, 3 * row], dim=1)) == pytest.approx(0, abs=1e-12)
    assert alignment(torch.cat([row, -row], dim=1)) == pytest.approx(4)


@pytest.mark.parametrize("rows", [2, 40])
def test_uniformity_equals_a_double_loop_over_pairs(rows: int) -> None:
    features = noisy_views(rows)[:, 0]
    units = [[x / math.hypot(*row) for x in row] for row in features.tolist()]
    values = [math.exp(-2 * math.dist(units[a], units[b]) ** 2) for a in range(rows) for b in range(a)]
    assert uniformity(features) == pytest.approx(math.log(sum(values) / len(values)), rel=1e-6)


def test_uniformity_of_more_rows_than_a_block_is_that_of_all_pairs() -> None:
    """Copies of two opposite points: exp(-8) for a pair of different ones, 1 for one of equal ones."""
    features = torch.tensor([[1.0, 0], [-2, 0]]).repeat(2500, 1)
    different = 2500 * 2500
    every = 5000 * 4999 / 2
    expected = math.log((different * math.exp(-8) + every - different) / every)
    assert uniformity(features) == pytest.approx(expected, rel=1e-9)


def test_deviation_of_features_spread_evenly_is_one_and_that_which_methods_report() -> None:
    features = torch.randn(4000, 32, generator=torch.manual_seed(6))
    assert float(feature_deviation(features)) == pytest.approx(1, abs=0.01)
    units = features.double() / features.double().norm(dim=1, keepdim=True)
    expected = np.mean([np.std(column) for column in units.T.numpy()]) * 32**0.5
    assert float(feature_deviation(features)) == pytest.approx(expected, rel=1e-5)
    reported = feature_signals(torch.stack([features, torch.zeros_like(features)]))
    assert float(reported["feature_std"]) == float(feature_deviation(features))


def test_figures_do_not_depend_on_rotation_nor_most_on_scale() -> None:
    views = noisy_views(60, 3, 8, seed=7).double()
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.manual_seed(8), dtype=torch.float64))[0]
    plain = label_free_quality(views.mean(1), views)
    assert len(plain) == 7
    turned = label_free_quality(views.mean(1) @ turn, views @ turn)
    del turned["feature_deviation"]  # a mean over axes, and axes are what a rotation changes
    assert turned == pytest.approx({name: plain[name] for name in turned}, rel=1e-6)
    larger = label_free_quality(1000 * views.mean(1), 1000 * views)
    assert larger.pop("lidar") == pytest.approx(slow_lidar(views.numpy(), 1e-10), rel=1e-6)
    assert larger == pytest.approx({name: plain[name] for name in larger}, rel=1e-6)


def test_all_figures_at_once_are_those_one_by_one_from_files_too(tmp_path: Path) -> None:
    views = noisy_views(50, 3, 20, seed=9)
    features = views.mean(1) + 2 * torch.randn(50, 20, generator=torch.manual_seed(12))
    figures = label_free_quality(features, views)
    assert 0 < retrieval_recall(features, views[:, 0]) != retrieval_recall(features, views[:, 1])
    assert figures == {
        "retrieval": retrieval_recall(features, views[:, 0]),
        "rankme": rankme(features),
        "lidar": lidar(views),
        "alpha_req": alpha_req(features),
        "alignment": alignment(views),
        "uniformity": uniformity(features),
        "feature_deviation": float(feature_deviation(features)),
    }
    np.save(tmp_path / "views.npy", views.numpy())
    assert label_free_quality(features.numpy(), np.load(tmp_path / "views.npy", mmap_mode="r")) == figures


@pytest.mark.parametrize("value", [0.1, 0.0])
def test_constant_features_have_figures_that_say_so(value: float) -> None:
    rank = float(value > 0)
    figures = label_free_quality(torch.full((30, 7), value), torch.full((30, 3, 7), value))
    assert figures == pytest.approx(
        {
            "retrieval": 1 / 30,
            "rankme": rank,
            "lidar": 0,
            "alignment": 0,
            "uniformity": 0,
            "feature_deviation": 0,
        },
        abs=1e-6,
    )


def test_features_that_differ_by_rounding_alone_have_neither_lidar_nor_alpha() -> None:
    generator = torch.manual_seed(13)
    row = torch.rand(40, generator=generator) + 1
    up = torch.rand(60, 3, 40, generator=generator) < 0.5
    views = torch.where(up, torch.nextafter(row, torch.tensor(math.inf)), row)
    figures = label_free_quality(views[:, 0], views)
    assert figures["lidar"] == 0
    assert "alpha_req" not in figures


def test_features_collapsed_to_one_direction_have_rank_one() -> None:
    direction = torch.randn(1, 1, 9, generator=torch.manual_seed(10))
    views = noisy_views(30, 3, 1, seed=11) * direction
    figures = label_free_quality(views.mean(1), views)
    assert figures["rankme"] == pytest.approx(1, abs=1e-5)
    assert figures["lidar"] == pytest.approx(1, abs=1e-5)
    assert "alpha_req" not in figures
    assert all(math.isfinite(value) for value in figures.values())


def test_features_with_nan_are_refused() -> None:
    views = noisy_views(30, 3, 7)
    views[11, 2, 3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity, first in row 11"):
        label_free_quality(views[:, 0], views)
    with pytest.raises(ValueError, match="NaN or infinity, first in row 4"):
        rankme(torch.ones(9, 3).index_fill(0, torch.tensor([4]), math.inf))


def test_features_and_views_of_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(N, D\) and \(N, Q, D\)"):
        label_free_quality(torch.ones(29, 7), torch.ones(30, 3, 7))


def test_retrieval_equals_plain_loops() -> None:
    torch.manual_seed(2)
    features = torch.randn(40, 5)
    copies = features + 0.8 * torch.randn(40, 5)
    found = 0
    for index, copy in enumerate(copies):
        cosines = [float(copy @ row / copy.norm() / row.norm()) for row in features]
        found += cosines.index(max(cosines)) == index
    assert 0 < found < 40
    assert retrieval_recall(features, copies) == pytest.approx(found / 40)


def test_collapsed_features_retrieve_one_of_all() -> None:
    assert retrieval_recall(torch.ones(10, 4), torch.ones(10, 4)) == pytest.approx(0.1)


def test_retrieval_wants_a_copy_of_each_image() -> None:
    with pytest.raises(ValueError, match="not one each"):
        retrieval_recall(torch.ones(3, 2), torch.ones(4, 2))


def test_copies_depend_on_seed_index_and_image_alone() -> None:
    images = pictures(6)
    whole, again, other = (list(retrieval_copies(images, seed)) for seed in (3, 3, 4))
    for copy, same in zip(whole, again, strict=True):
        np.testing.assert_array_equal(copy, same)
    replaced = list(retrieval_copies([*pictures(5, seed=9), images[5]], 3))
    np.testing.assert_array_equal(replaced[5], whole[5])
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(whole, other, strict=True))


def test_a_copy_is_made_when_it_is_asked_for() -> None:
    asked: list[int] = []

    def images() -> Iterator[np.ndarray]:
        for index, image in enumerate(pictures(3)):
            asked.append(index)
            yield image

    copies = retrieval_copies(images(), 0)
    assert asked == []
    np.testing.assert_array_equal(next(copies), retrieval_copy(pictures(3)[0], 0, 0))
    assert asked == [0]


def test_copies_are_boxes_of_the_stated_area_and_aspect() -> None:
    image = np.zeros((120, 100, 3), np.uint8)
    for copy in retrieval_copies([image] * 200, 0):
        height, width, _ = copy.shape
        assert 0.28 < height * width / image[..., 0].size <= 1
        assert 0.72 < width / height < 1.39


def test_half_of_the_copies_are_mirrored() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 64, 3)).copy()
    falling = sum(bool(copy[0, 0, 0] > copy[0, -1, 0]) for copy in retrieval_copies([ramp] * 400, 0))
    assert 160 < falling < 240


def test_copies_change_every_property_of_a_colour() -> None:
    image = np.full((32, 32, 3), (150, 90, 60), np.uint8)
    hue, saturation, value = colorsys.rgb_to_hsv(150 / 255, 90 / 255, 60 / 255)
    colours = [colorsys.rgb_to_hsv(*(copy[0, 0] / 255)) for copy in retrieval_copies([image] * 300, 0)]
    hues = np.array([(colour[0] - hue + 0.5) % 1 - 0.5 for colour in colours])
    assert np.abs(hues).max() < 0.12
    assert hues.min() < -0.07
    assert hues.max() > 0.07
    assert np.std([colour[1] / saturation for colour in colours]) > 0.1
    assert np.std([colour[2] / value for colour in colours]) > 0.1


def test_raw_pixels_are_small_images_less_their_mean() -> None:
    images = pictures(3)
    features = raw_pixels(images, size=8)
    for row, image in zip(features, images, strict=True):
        pixels = Preprocess(size=8)(image).astype(np.float64).reshape(-1)
        np.testing.assert_allclose(row.numpy(), pixels - pixels.mean(), atol=1e-4)


def test_raw_pixels_do_not_see_brightness() -> None:
    image = pictures(1)[0] // 3 + 50  # far enough from 0 and 255 for the overshoot of a bicubic edge
    dark, bright = raw_pixels([image, image + 60])
    torch.testing.assert_close(dark, bright, atol=1.0, rtol=0)
