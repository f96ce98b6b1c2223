"""The paper's loss against loops over its pairs."""

import numpy as np
import pytest
import torch

from lowssl_core.losses import PairLosses, default_alpha, rebalance

NUM_LOCALS = [0, 6, 10]


def oracle_default(global_losses, local_losses):
    """L = (L_g + L_l) / (P_gg + P_gl)."""
    total = 0.0
    for loss in [*global_losses, *local_losses]:
        total += loss
    return total / (len(global_losses) + len(local_losses))


def oracle_rebalanced(global_losses, local_losses, alpha):
    """L = alpha L_g / P_gg + (1 - alpha) L_l / P_gl."""
    global_sum, local_sum = 0.0, 0.0
    for loss in global_losses:
        global_sum += loss
    for loss in local_losses:
        local_sum += loss
    return alpha * global_sum / len(global_losses) + (1 - alpha) * local_sum / len(local_losses)


def pairs_of(num_global, num_local, seed=0):
    """Random pair losses as (PairLosses that want gradients, list of floats, list of floats)."""
    rng = np.random.default_rng(seed)
    global_losses, local_losses = rng.uniform(1, 8, num_global), rng.uniform(1, 8, num_local)
    pairs = PairLosses(
        global_pairs=torch.tensor(global_losses, requires_grad=True),
        local_pairs=torch.tensor(local_losses, requires_grad=True),
        signals={},
    )
    return pairs, global_losses.tolist(), local_losses.tolist()


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.4, 1.0])
@pytest.mark.parametrize(("num_global", "num_local"), [(2, 12), (2, 20), (1, 6), (1, 10)])
def test_rebalanced_loss_is_its_formula(num_global, num_local, alpha):
    pairs, global_losses, local_losses = pairs_of(num_global, num_local)
    got = rebalance(pairs, alpha)
    assert got.shape == ()
    assert got.item() == pytest.approx(oracle_rebalanced(global_losses, local_losses, alpha), rel=1e-12)


@pytest.mark.parametrize("num_locals", NUM_LOCALS)
@pytest.mark.parametrize("pairs_per_view", [1, 2], ids=["MoCo", "DINO and SwAV"])
def test_default_formulation_is_a_value_of_alpha(pairs_per_view, num_locals):
    num_global, num_local = pairs_per_view, pairs_per_view * num_locals
    alpha = default_alpha(num_global, num_local)
    assert alpha == pytest.approx(1 / (1 + num_locals), rel=1e-15)
    pairs, global_losses, local_losses = pairs_of(num_global, num_local)
    assert rebalance(pairs, alpha).item() == pytest.approx(oracle_default(global_losses, local_losses), rel=1e-12)


def test_default_alpha_is_the_share_of_the_global_pairs():
    for num_global in range(1, 5):
        for num_local in range(30):
            assert default_alpha(num_global, num_local) == pytest.approx(num_global / (num_global + num_local))


@pytest.mark.parametrize("alpha", [1 / 7, 0.4])
def test_rebalanced_loss_is_linear_in_both_kinds_of_pairs(alpha):
    first, _, _ = pairs_of(2, 12, seed=1)
    second, _, _ = pairs_of(2, 12, seed=2)
    mixed = PairLosses(
        global_pairs=3 * first.global_pairs + 5 * second.global_pairs,
        local_pairs=3 * first.local_pairs + 5 * second.local_pairs,
        signals={},
    )
    expected = 3 * rebalance(first, alpha).item() + 5 * rebalance(second, alpha).item()
    assert rebalance(mixed, alpha).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [1 / 7, 0.4])
def test_gradient_is_shared_as_alpha_says(alpha):
    pairs, _, _ = pairs_of(2, 12)
    rebalance(pairs, alpha).backward()
    assert pairs.global_pairs.grad.tolist() == pytest.approx([alpha / 2] * 2, rel=1e-12)
    assert pairs.local_pairs.grad.tolist() == pytest.approx([(1 - alpha) / 12] * 12, rel=1e-12)
    assert pairs.global_pairs.grad.sum().item() == pytest.approx(alpha, rel=1e-12)


def test_default_gradient_treats_every_pair_alike():
    pairs, _, _ = pairs_of(2, 12)
    rebalance(pairs, default_alpha(2, 12)).backward()
    gradients = [*pairs.global_pairs.grad.tolist(), *pairs.local_pairs.grad.tolist()]
    assert gradients == pytest.approx([1 / 14] * 14, rel=1e-12)


def test_two_crop_loss_and_gradient_are_finite_without_local_views():
    pairs, global_losses, _ = pairs_of(2, 0)
    loss = rebalance(pairs, default_alpha(2, 0))
    loss.backward()
    assert loss.item() == pytest.approx(sum(global_losses) / 2, rel=1e-12)
    assert pairs.global_pairs.grad.tolist() == pytest.approx([0.5, 0.5], rel=1e-12)
