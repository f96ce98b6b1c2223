"""What is kept and what is carried over along a stream: average accuracy, forgetting, backward and forward transfer."""

import numpy as np
from numpy.typing import NDArray


def average_accuracy(accuracies: NDArray[np.float64]) -> float:
    """Mean over parts j of R[T, j]: how good the last model is on all that came.

    Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory for Continual Learning", section 2, ACC.

    Args:
        accuracies: R, (T, T): R[i, j] is the accuracy on part j after part i was learned.
    """
    return float(accuracies[-1].mean())


def backward_transfer(accuracies: NDArray[np.float64]) -> float | None:
    """Mean over parts j < T of R[T, j] - R[j, j]: what later parts did to earlier ones (the same paper, BWT).

    None with a single part.
    """
    if len(accuracies) < 2:
        return None
    return float((accuracies[-1] - np.diagonal(accuracies))[:-1].mean())


def forward_transfer(accuracies: NDArray[np.float64], start: NDArray[np.float64]) -> float | None:
    """Mean over parts j > 1 of R[j - 1, j] - b[j]: what earlier parts did for a part not seen yet (the same, FWT).

    None with a single part.

    Args:
        accuracies: R, (T, T), as in `average_accuracy`.
        start: b, (T,), the accuracy on each part before any was learned.
    """
    if len(accuracies) < 2:
        return None
    return float((np.diagonal(accuracies, offset=1) - start[1:]).mean())


def forgetting(accuracies: NDArray[np.float64]) -> float | None:
    """Mean over parts j < T of max over i < T of R[i, j] - R[T, j]: how much better the model has been.

    Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning", section 4.2, where i starts at j: before part j
    came, nothing of it could be forgotten. None with a single part.

    Args:
        accuracies: R, (T, T), as in `average_accuracy`.
    """
    last = len(accuracies) - 1
    if last < 1:
        return None
    return float(np.mean([accuracies[part:last, part].max() - accuracies[last, part] for part in range(last)]))
