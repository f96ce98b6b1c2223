"""The quick linear probe, beside scikit-learn's logistic regression on real features."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from lowssl_core.evaluation.linear import RATES, LinearResult, count_right, fit_linear

Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def digits() -> Data:
    """Images of digits (8 x 8 pixels, ten classes) as they come with scikit-learn: features, labels, of two parts."""
    features, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    features, labels = features[order].astype(np.float32), labels[order]
    return features[:1000], labels[:1000], features[1000:], labels[1000:]


def overlapping(seed: int = 0) -> Data:
    """Five clouds in six dimensions that no classifier can part, the train ones few beside the test ones."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(5, 6))
    labels = rng.integers(0, 5, 6000)
    features = (centers[labels] + rng.normal(size=(6000, 6))).astype(np.float32) * [1, 5, 0.1, 1, 30, 1] + 4
    features = features.astype(np.float32)
    return features[:2000], labels[:2000], features[2000:], labels[2000:]


def separable() -> Data:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 200)
    features = (10 * np.eye(3)[labels] + rng.uniform(-1, 1, (200, 3))).astype(np.float32)
    return features[:120], labels[:120], features[120:], labels[120:]


def quick(data: Data, **options: Any) -> LinearResult:
    return fit_linear(*data, **({"epochs": 10, "rates": (0.01, 0.1)} | options))


def sklearn_model(data: Data) -> tuple[StandardScaler, LogisticRegression]:
    scaler = StandardScaler().fit(data[0])
    model = LogisticRegression(C=np.inf, max_iter=10_000).fit(scaler.transform(data[0]), data[1])
    return scaler, model


def test_it_names_as_many_digits_right_as_scikit_learn_does() -> None:
    data = digits()
    scaler = StandardScaler().fit(data[0])
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(data[0]), data[1])
    expected = model.score(scaler.transform(data[2]), data[3])
    result = fit_linear(*data)
    assert expected > 0.93
    assert abs(result.top1 - expected) < 0.015
    assert result.top5 is not None
    assert result.top1 < result.top5 <= 1


def test_where_classes_overlap_it_finds_the_optimum_that_scikit_learn_finds() -> None:
    data = overlapping()
    scaler, model = sklearn_model(data)
    result = fit_linear(*data)
    assert abs(result.top1 - model.score(scaler.transform(data[2]), data[3])) < 0.005
    # Held-out images are drawn from the same clouds as the test ones: their loss at the chosen rate is about that.
    loss = log_loss(data[3], model.predict_proba(scaler.transform(data[2])))
    chosen = next(row for row in result.sweep if row.rate == result.rate)
    assert chosen.loss == pytest.approx(loss, abs=0.1)


def test_what_can_be_separated_is_separated() -> None:
    result = quick(separable())
    assert result.top1 == 1.0
    assert result.top5 is None


def test_the_scale_and_place_of_features_do_not_matter() -> None:
    train, train_labels, test, test_labels = overlapping()
    result = quick((train, train_labels, test, test_labels))
    assert quick((train * 1024, train_labels, test * 1024, test_labels)) == result
    moved = quick((train - 3, train_labels, test - 3, test_labels))
    assert moved.top1 == pytest.approx(result.top1, abs=1e-3)


def test_a_constant_feature_is_left_out_whatever_it_is_in_the_test_images() -> None:
    train, train_labels, test, test_labels = overlapping()
    result = quick((train, train_labels, test, test_labels))
    widened = np.concatenate([train, np.full((len(train), 1), 0.1, np.float32)], axis=1)
    tested = np.concatenate([test, np.full((len(test), 1), 7, np.float32)], axis=1)
    assert quick((widened, train_labels, tested, test_labels)).top1 == pytest.approx(result.top1, abs=1e-3)


def test_test_labels_and_images_have_no_say_in_the_choice() -> None:
    train, train_labels, test, test_labels = digits()
    result = quick((train, train_labels, test, test_labels), rates=RATES)
    permuted = np.random.default_rng(2).permutation(test_labels)
    other = quick((train, train_labels, test[::-1], permuted), rates=RATES)
    assert (other.rate, other.sweep) == (result.rate, result.sweep)
    assert other.top1 < 0.3 < result.top1


def test_the_rate_chosen_is_the_best_on_held_out_images() -> None:
    result = quick(overlapping(), rates=(1e-7, 0.03, 1000.0))
    assert result.rate == max(result.sweep, key=lambda row: row.top1).rate == 0.03
    assert not result.at_edge
    assert quick(overlapping(), rates=(0.03, 1000.0)).at_edge


def test_of_rates_equally_often_right_the_surest_is_chosen() -> None:
    result = quick(separable(), rates=(1e-5, 0.1))
    assert [row.top1 for row in result.sweep] == [1.0, 1.0]
    assert result.rate == 0.1


def test_rates_side_by_side_learn_what_each_learns_alone() -> None:
    together = quick(digits(), rates=(0.003, 0.1)).sweep
    for row in together:
        (alone,) = quick(digits(), rates=(row.rate,)).sweep
        assert alone.loss == pytest.approx(row.loss, rel=1e-3)
        assert alone.top1 == pytest.approx(row.top1, abs=0.011)  # one of a hundred images at most


def test_the_seed_decides_everything() -> None:
    assert quick(digits()) == quick(digits())
    assert quick(digits()).sweep != quick(digits(), seed=1).sweep


def test_a_mapped_file_a_tensor_and_an_array_give_the_same(tmp_path: Path) -> None:
    train, train_labels, test, test_labels = digits()
    train.tofile(tmp_path / "features")
    mapped = np.memmap(tmp_path / "features", np.float32, "r", shape=train.shape)
    result = quick((train, train_labels, test, test_labels))
    assert quick((mapped, train_labels, test, test_labels)) == result
    tensors = (torch.from_numpy(part) for part in (train, train_labels, test, test_labels))
    assert fit_linear(*tensors, epochs=10, rates=(0.01, 0.1)) == result


def test_a_test_class_that_training_never_saw_counts_as_wrong() -> None:
    train, train_labels, test, test_labels = separable()
    mixed = np.where(np.arange(len(test)) % 2, test_labels, 3)
    assert quick((train, train_labels, test, mixed)).top1 == 0.5


def test_two_images_are_enough() -> None:
    features = np.array([[0.0], [1.0]], np.float32)
    assert quick((features, np.array([0, 1]), features, np.array([0, 1])), epochs=20).top1 == 1.0


def test_epochs_are_told_of_as_they_end() -> None:
    calls: list[int] = []
    quick(separable(), epochs=3, on_epoch=lambda: calls.append(1))
    assert len(calls) == 6


def test_counting_equals_sorting_by_hand() -> None:
    scores = torch.randn(3, 40, 7, generator=torch.manual_seed(0))
    labels = torch.randint(7, (40,))
    for first in (1, 5, 9):
        expected = [
            sum(int(label) in row.argsort(descending=True)[:first] for row, label in zip(rows, labels, strict=True))
            for rows in scores
        ]
        assert count_right(scores, labels, first).tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, c, d: (a, b[:-1], c, d), "labels"),
        (lambda a, b, c, d: (a, b, c[:, 1:], d), "wide"),
        (lambda a, b, c, d: (a[:0], b[:0], c, d), "train"),
        (lambda a, b, c, d: (a, b * 0, c, d), "one class"),
        (lambda a, b, c, d: (a, b - 1, c, d), "from 0"),
        (lambda a, b, c, d: (np.where(a > 5, np.nan, a), b, c, d), "finite"),
    ],
)
def test_what_does_not_go_together_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(change(*separable()))


@pytest.mark.parametrize("options", [{"rates": ()}, {"rates": (0.0,)}, {"epochs": 0}, {"batch_size": 0}])
def test_numbers_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        quick(separable(), **options)
