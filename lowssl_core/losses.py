"""The losses of pairs of views, and the one function that balances them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairLosses:
    """What a method makes of a batch's views: one mean loss for each pair of different views.

    Attributes:
        global_pairs: (P_gg,), the losses of pairs of two global views.
        local_pairs: (P_gl,), the losses of pairs of a global and a local view; empty without local views.
        signals: scalars, by name, that tell a healthy run from a collapsing one (see `lowssl_core.collapse`).
    """

    global_pairs: Tensor
    local_pairs: Tensor
    signals: Mapping[str, Tensor] = field(default_factory=dict)


def default_alpha(num_global_pairs: int, num_local_pairs: int) -> float:
    """The weight at which `rebalance` is the default formulation, each pair counting the same: P_gg / (P_gg + P_gl)."""
    return num_global_pairs / (num_global_pairs + num_local_pairs)


def rebalance(pairs: PairLosses, alpha: float) -> Tensor:
    """The paper's re-balanced loss: alpha * L_g / P_gg + (1 - alpha) * L_l / P_gl (Tan et al. 2023, section 4.3).

    L_g and L_l are the sums over the P_gg global-global and P_gl global-local pairs. Without local views the
    loss is the mean of the global pairs, whatever alpha.

    Returns:
        A scalar tensor.
    """
    global_loss = pairs.global_pairs.mean()
    if not len(pairs.local_pairs):
        return global_loss
    return alpha * global_loss + (1 - alpha) * pairs.local_pairs.mean()


def pair_cross_entropies(targets: Tensor, log_predictions: Tensor) -> Tensor:
    """Mean cross-entropy of every target view with every predicted view.

    Args:
        targets: (T, B, K) probabilities, one (B, K) table for each target view.
        log_predictions: (S, B, K) log-probabilities, one table for each predicted view.

    Returns:
        (T, S): entry (t, s) is - sum_k targets[t, b, k] * log_predictions[s, b, k], averaged over b.
    """
    # Rows of B * K numbers: all pairs are one matrix product.
    return -(targets.flatten(1) @ log_predictions.flatten(1).T) / targets.shape[1]


def collect_pairs(
    losses: Tensor,
    target_views: Sequence[int],
    predicted_views: Sequence[int],
    signals: Mapping[str, Tensor],
    num_globals: int = 2,
) -> PairLosses:
    """Sort a (T, S) table of pair losses into global and local pairs, leaving out each view's pair with itself.

    `target_views` and `predicted_views` name the view of each row and column; views from `num_globals` on are local.
    """
    global_pairs: list[Tensor] = []
    local_pairs: list[Tensor] = []
    for row, target in enumerate(target_views):
        for column, predicted in enumerate(predicted_views):
            if target != predicted:
                (global_pairs if predicted < num_globals else local_pairs).append(losses[row, column])
    return PairLosses(
        global_pairs=torch.stack(global_pairs),
        local_pairs=torch.stack(local_pairs) if local_pairs else losses.new_zeros(0),
        signals=signals,
    )
