import colorsys
import math

import numpy as np
import pytest
import torch

from lowssl_core.preprocess import Preprocess
from lowssl_core.quality import knn_accuracy, rankme, raw_pixels, retrieval_copies, retrieval_recall


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """Blocks of random colours, each picture of its own size."""
    rng = np.random.default_rng(seed)
    shapes = [(8 * int(rng.integers(3, 7)), 8 * int(rng.integers(3, 7))) for _ in range(count)]
    return [
        np.kron(rng.integers(0, 256, (height // 8, width // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        for height, width in shapes
    ]


def test_rankme_of_orthogonal_rows_is_their_number() -> None:
    assert rankme(torch.eye(7, 12) * 3) == pytest.approx(7)


def test_rankme_of_one_direction_is_one() -> None:
    assert rankme(torch.arange(1.0, 9).unsqueeze(1) * torch.randn(1, 5)) == pytest.approx(1, abs=1e-4)


def test_rankme_equals_its_formula() -> None:
    features = torch.randn(20, 6, generator=torch.manual_seed(0))
    eigenvalues = np.linalg.eigvalsh((features.T @ features).double().numpy())
    values = [math.sqrt(value) for value in eigenvalues]
    shares = [value / sum(values) for value in values]
    assert rankme(features) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-5)


def test_rankme_of_nothing_is_zero() -> None:
    assert rankme(torch.zeros(4, 3)) == 0


def slow_knn(bank: list, bank_labels: list, queries: list, query_labels: list, k: int, temperature: float) -> float:
    """Wu et al. 2018, section 3.4, in plain loops."""

    def cosine(a: list, b: list) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    right = 0
    for query, label in zip(queries, query_labels, strict=True):
        neighbours = sorted(
            ((cosine(query, row), its) for row, its in zip(bank, bank_labels, strict=True)), reverse=True
        )
        votes: dict[int, float] = {}
        for similarity, its in neighbours[:k]:
            votes[its] = votes.get(its, 0) + math.exp(similarity / temperature)
        right += max(votes, key=votes.__getitem__) == label
    return right / len(queries)


@pytest.mark.parametrize(("k", "temperature"), [(5, 0.07), (20, 0.07), (100, 1.0)])
def test_knn_equals_plain_loops_whatever_the_chunk(k: int, temperature: float) -> None:
    torch.manual_seed(1)
    bank, queries = torch.randn(60, 8), torch.randn(33, 8)
    bank_labels, query_labels = torch.randint(0, 3, (60,)), torch.randint(0, 3, (33,))
    expected = slow_knn(bank.tolist(), bank_labels.tolist(), queries.tolist(), query_labels.tolist(), k, temperature)
    assert 0 < expected < 1
    for chunk in (4, 1024):
        got = knn_accuracy(bank, bank_labels, queries, query_labels, k=k, temperature=temperature, chunk=chunk)
        assert got == pytest.approx(expected)


def test_knn_of_a_class_that_the_bank_lacks_is_wrong() -> None:
    assert knn_accuracy(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 5])) == 0.5


def test_retrieval_equals_plain_loops_whatever_the_chunk() -> None:
    torch.manual_seed(2)
    features = torch.randn(40, 5)
    copies = features + 0.8 * torch.randn(40, 5)
    found = 0
    for index, copy in enumerate(copies):
        cosines = [float(copy @ row / copy.norm() / row.norm()) for row in features]
        found += cosines.index(max(cosines)) == index
    assert 0 < found < 40
    assert retrieval_recall(features, copies) == pytest.approx(found / 40)
    assert retrieval_recall(features, copies, chunk=7) == pytest.approx(found / 40)


def test_collapsed_features_retrieve_one_of_all() -> None:
    assert retrieval_recall(torch.ones(10, 4), torch.ones(10, 4)) == pytest.approx(0.1)


def test_retrieval_wants_a_copy_of_each_image() -> None:
    with pytest.raises(ValueError, match="not one each"):
        retrieval_recall(torch.ones(3, 2), torch.ones(4, 2))


def test_copies_depend_on_seed_index_and_image_alone() -> None:
    images = pictures(6)
    whole, again, other = retrieval_copies(images, 3), retrieval_copies(images, 3), retrieval_copies(images, 4)
    for copy, same in zip(whole, again, strict=True):
        np.testing.assert_array_equal(copy, same)
    replaced = retrieval_copies([*pictures(5, seed=9), images[5]], 3)
    np.testing.assert_array_equal(replaced[5], whole[5])
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(whole, other, strict=True))


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
