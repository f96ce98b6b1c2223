"""The quick linear probe: logistic regression on features that were made once, over a sweep of learning rates."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lowssl_core.schedules import cosine

Features = Tensor | NDArray[np.float32]

# For standardised features: half a decade apart, from too slow for any number of steps to too fast for any width.
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
MOMENTUM = 0.9
# Every tenth training image, class by class, is what the learning rate is chosen on.
HELD_OUT = 10
# An epoch has at least so many steps, or few images would mean few steps.
LEAST_STEPS = 8
# Below this share of its mean a feature's deviation is rounding: the feature is constant.
CONSTANT = 1e-6
CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How one learning rate did on the held-out training images: share of right answers and mean cross-entropy."""

    rate: float
    top1: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """What the probe says of features.

    Attributes:
        top1: share of test images whose class comes first.
        top5: share whose class is among the first five; None for up to five classes.
        rate: the learning rate that was chosen.
        sweep: every learning rate on the held-out training images.
    """

    top1: float
    top5: float | None
    rate: float
    sweep: tuple[Rate, ...]

    @property
    def at_edge(self) -> bool:
        """Whether the chosen rate is the smallest or largest tried, so that one beyond might be better."""
        rates = [row.rate for row in self.sweep]
        return len(rates) > 1 and self.rate in (min(rates), max(rates))


def fit_linear(
    train: Features,
    train_labels: ArrayLike,
    test: Features,
    test_labels: ArrayLike,
    *,
    rates: Sequence[float] = RATES,
    epochs: int = 100,
    batch_size: int = 1024,
    seed: int = 0,
    on_epoch: Callable[[], None] | None = None,
    device: torch.device | str = "cpu",
) -> LinearResult:
    """Train a linear classifier on frozen features and test it.

    Features are standardised by the mean and deviation of those trained on (BatchNorm without affine, which MAE puts
    there, as fixed numbers), so their scale does not matter. Weights start at 0; SGD with momentum .9, no weight decay,
    the learning rate on a cosine to 0. All rates of the sweep are trained side by side, on nine in ten of the training
    images, and the one that is best on the tenth (by top-1, then by cross-entropy) trains anew on all of them. Test
    images and their labels come in only at the end.

    Args:
        train: (N, D) float32; a tensor, or an array, mapped from a file or not, of which batches of rows are read.
        train_labels: (N,) classes from 0.
        test: (M, D).
        test_labels: (M,).
        rates: learning rates to try.
        epochs: how often each image is seen.
        batch_size: at most; at least eight batches make an epoch.
        seed: of the held-out images and of the order; the weights start at 0.
        on_epoch: called after each epoch, 2 * epochs times in all: the sweep's and the final ones.
        device: where it is computed.

    Raises:
        ValueError: sizes that do not go together, a single class or image, or features that are not finite.
    """
    train_classes, test_classes = np.asarray(train_labels, np.int64), np.asarray(test_labels, np.int64)
    _check(train, train_classes, test, test_classes)
    if not rates or min(rates) <= 0 or epochs < 1 or batch_size < 1:
        raise ValueError(f"rates {tuple(rates)}, epochs {epochs}, batch_size {batch_size}: all must be above 0")
    num_classes = int(train_classes.max()) + 1
    fit = partial(
        _fit, train, train_classes, num_classes, epochs=epochs, batch_size=batch_size, seed=seed, on_epoch=on_epoch
    )
    kept, held_out = _split(train_classes, seed)
    classifiers = fit(kept, rates, device=torch.device(device))
    sweep = [
        Rate(rate=rate, top1=top1, loss=loss)
        for rate, (top1, _, loss) in zip(rates, classifiers.scores(train, train_classes, held_out), strict=True)
    ]
    best = max(sweep, key=lambda row: (row.top1, -row.loss))
    final = fit(np.arange(len(train_classes)), [best.rate], device=torch.device(device))
    top1, top5, _ = final.scores(test, test_classes, np.arange(len(test_classes)))[0]
    return LinearResult(top1=top1, top5=top5 if num_classes > 5 else None, rate=best.rate, sweep=tuple(sweep))


def count_right(scores: Tensor, labels: Tensor, first: int) -> Tensor:
    """How many rows of scores (..., B, C) have their label (B,) among the `first` highest: (...)."""
    best = scores.topk(min(first, scores.shape[-1]), dim=-1).indices
    return (best == labels[:, None]).any(dim=-1).sum(dim=-1)


class _Classifiers:
    """R linear classifiers of the same standardised features, their (D, R * C) weights side by side."""

    def __init__(self, mean: Tensor, deviation: Tensor, num_rates: int, num_classes: int) -> None:
        self._mean, self._deviation = mean, deviation
        self._shape = (num_rates, num_classes)
        self.weight = mean.new_zeros(len(mean), num_rates * num_classes)
        self.bias = mean.new_zeros(num_rates * num_classes)

    def standardise(self, rows: Tensor) -> Tensor:
        """(B, D) to the same with mean 0 and deviation 1; a constant feature gives 0 where it was fitted."""
        return (rows - self._mean) / self._deviation

    def logits(self, rows: Tensor) -> Tensor:
        """Standardised (B, D) to (R, B, C)."""
        return torch.addmm(self.bias, rows, self.weight).view(len(rows), *self._shape).transpose(0, 1)

    def scores(
        self, features: Features, labels: NDArray[np.int64], indices: NDArray[np.int64]
    ) -> list[tuple[float, float, float]]:
        """Top-1, top-5 and mean cross-entropy of each classifier on rows of `features`."""
        totals = torch.zeros(3, self._shape[0], dtype=torch.float64, device=self.weight.device)
        for chosen in _chunks(indices):
            targets = torch.from_numpy(labels[chosen]).to(self.weight.device)
            logits = self.logits(self.standardise(_rows(features, chosen, self.weight.device)))
            totals[0] += count_right(logits, targets, 1)
            totals[1] += count_right(logits, targets, 5)
            # A class that training has not seen has no logit: certain to be wrong, and no part of the loss.
            seen = targets < self._shape[1]
            own = logits[:, seen].gather(2, targets[seen].expand(self._shape[0], -1)[..., None])[..., 0]
            totals[2] += (logits[:, seen].logsumexp(2) - own).sum(1)
        return [(right, near, loss) for right, near, loss in (totals / len(indices)).T.tolist()]


def _fit(
    features: Features,
    labels: NDArray[np.int64],
    num_classes: int,
    indices: NDArray[np.int64],
    rates: Sequence[float],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    on_epoch: Callable[[], None] | None,
    device: torch.device,
) -> _Classifiers:
    """Classifiers trained on rows `indices` of `features`, one for each rate."""
    mean, deviation = _statistics(features, indices)
    classifiers = _Classifiers(mean.to(device), deviation.to(device), len(rates), num_classes)
    parameters = (classifiers.weight, classifiers.bias)
    momenta = [torch.zeros_like(parameter) for parameter in parameters]
    columns = torch.tensor(rates, device=device).repeat_interleave(num_classes)  # each column's learning rate
    batches = max(-(-len(indices) // batch_size), min(LEAST_STEPS, len(indices)))
    order = np.random.Generator(np.random.PCG64(seed))
    for epoch in range(epochs):
        for number, chosen in enumerate(np.array_split(order.permutation(indices), batches)):
            rows = classifiers.standardise(_rows(features, chosen, device))
            errors = classifiers.logits(rows).softmax(2)  # (R, B, C)
            errors[:, torch.arange(len(chosen), device=device), torch.from_numpy(labels[chosen]).to(device)] -= 1
            errors = errors.transpose(0, 1).reshape(len(chosen), -1) / len(chosen)
            factor = cosine(epoch * batches + number, epochs * batches, 1.0, 0.0)
            for parameter, momentum, gradient in zip(
                parameters, momenta, (rows.T @ errors, errors.sum(0)), strict=True
            ):
                momentum.mul_(MOMENTUM).add_(gradient)
                parameter.addcmul_(momentum, columns, value=-factor)
        if on_epoch:
            on_epoch()
    return classifiers


def _split(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to train on and to hold out, every tenth in a random order class by class, so that classes keep share."""
    # Another stream than the order's: the same seed, spawned.
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(1,))))
    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    is_held_out = np.arange(len(labels)) % HELD_OUT == min(HELD_OUT, len(labels)) - 1
    return np.sort(by_class[~is_held_out]), np.sort(by_class[is_held_out])


def _statistics(features: Features, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Mean and deviation (D,) of rows, in two passes in float64; the deviation of a constant feature is taken as 1."""
    mean = sum(rows.sum(0) for rows in _double_chunks(features, indices)) / len(indices)
    assert isinstance(mean, Tensor)
    variance = sum((rows - mean).square().sum(0) for rows in _double_chunks(features, indices)) / len(indices)
    assert isinstance(variance, Tensor)
    if not variance.isfinite().all():
        raise ValueError("the features are not all finite numbers")
    deviation = variance.sqrt()
    deviation = torch.where(deviation > CONSTANT * mean.abs(), deviation, 1.0)
    return mean.float(), deviation.float()


def _double_chunks(features: Features, indices: NDArray[np.int64]) -> Iterator[Tensor]:
    for chosen in _chunks(indices):
        yield _rows(features, chosen, torch.device("cpu")).double()


def _chunks(indices: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(indices), CHUNK):
        yield indices[start : start + CHUNK]


def _rows(features: Features, indices: NDArray[np.int64], device: torch.device) -> Tensor:
    """Rows (B, D) of features as float32 on `device`: all that is ever read at a time."""
    if isinstance(features, Tensor):
        return features[torch.from_numpy(indices).to(features.device)].to(device, torch.float32)
    return torch.from_numpy(np.asarray(features[indices], np.float32)).to(device)


def _check(train: Features, train_labels: NDArray[np.int64], test: Features, test_labels: NDArray[np.int64]) -> None:
    for name, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if features.ndim != 2 or labels.shape != (features.shape[0],) or len(labels) == 0 or labels.min() < 0:
            raise ValueError(
                f"{name}: features {tuple(features.shape)} and labels {labels.shape}: expected (N, D) and (N,), from 0"
            )
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train features are {train.shape[1]} wide, test features {test.shape[1]}")
    if len(np.unique(train_labels)) < 2:
        raise ValueError("the training images are all of one class: there is nothing to tell apart")
