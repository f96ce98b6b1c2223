"""Sinkhorn-Knopp against the plain loop, in double precision or in decimals that cannot overflow."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from lowssl_core.methods.swav import sinkhorn

SHAPES = {"as many samples as prototypes": (6, 6), "more prototypes": (5, 17), "more samples": (19, 4)}


def oracle_sinkhorn(scores, epsilon, iterations, *, exp=math.exp):
    """Assignments (B, K): exponentials over their sum, then columns to 1/K and rows to 1/B in turn, times B."""
    num_samples, num_prototypes = len(scores), len(scores[0])
    q = [[exp(score / epsilon) for score in row] for row in scores]
    total = sum(sum(row) for row in q)
    q = [[entry / total for entry in row] for row in q]
    for _ in range(iterations):
        for k in range(num_prototypes):
            column_sum = sum(q[b][k] for b in range(num_samples))
            for b in range(num_samples):
                q[b][k] = q[b][k] / column_sum / num_prototypes
        for b in range(num_samples):
            row_sum = sum(q[b])
            for k in range(num_prototypes):
                q[b][k] = q[b][k] / row_sum / num_samples
    return [[entry * num_samples for entry in row] for row in q]


def oracle_in_decimals(scores, epsilon, iterations):
    """The same loop in 40 decimal digits, where exp(5000) is an ordinary number."""
    with localcontext() as context:
        context.prec = 40
        rows = [[Decimal(float(score)) for score in row] for row in scores]
        q = oracle_sinkhorn(rows, Decimal(str(epsilon)), iterations, exp=Decimal.exp)
        return [[float(entry) for entry in row] for row in q]


def cosines(num_samples, num_prototypes, seed=0, dim=8):
    """Scores as SwAV has them: cosines between samples and prototypes."""
    rng = np.random.default_rng(seed)
    samples, prototypes = rng.normal(size=(num_samples, dim)), rng.normal(size=(num_prototypes, dim))
    samples /= np.linalg.norm(samples, axis=1, keepdims=True)
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    return samples @ prototypes.T


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_assignments_are_those_of_the_plain_loop(shape, iterations):
    scores = cosines(*shape)
    got = sinkhorn(torch.tensor(scores, dtype=torch.float32), 0.05, iterations)
    assert got.shape == shape
    np.testing.assert_allclose(
        got.double().numpy(), oracle_sinkhorn(scores.tolist(), 0.05, iterations), rtol=2e-4, atol=1e-6
    )


@pytest.mark.parametrize("epsilon", [0.03, 0.05, 0.5])
def test_epsilon_divides_the_scores(epsilon):
    scores = cosines(9, 7, seed=1)
    got = sinkhorn(torch.tensor(scores, dtype=torch.float32), epsilon, 3)
    np.testing.assert_allclose(got.double().numpy(), oracle_sinkhorn(scores.tolist(), epsilon, 3), rtol=5e-4, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_each_sample_is_assigned_once(shape):
    got = sinkhorn(torch.tensor(cosines(*shape), dtype=torch.float32), 0.05, 3)
    assert (got >= 0).all()
    torch.testing.assert_close(got.sum(dim=1), torch.ones(shape[0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_many_iterations_use_every_prototype_alike(shape):
    num_samples, num_prototypes = shape
    got = sinkhorn(torch.tensor(cosines(*shape), dtype=torch.float32), 0.3, 300)
    torch.testing.assert_close(got.sum(dim=1), torch.ones(num_samples), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        got.sum(dim=0), torch.full((num_prototypes,), num_samples / num_prototypes), rtol=1e-3, atol=0
    )


def test_equal_scores_are_shared_equally():
    got = sinkhorn(torch.full((5, 8), 0.3), 0.05, 3)
    torch.testing.assert_close(got, torch.full((5, 8), 1 / 8))


def test_a_sample_and_its_own_prototype_find_each_other():
    got = sinkhorn(torch.eye(6)[[3, 1, 5, 0, 2, 4]], 0.05, 3)
    assert got.argmax(dim=1).tolist() == [3, 1, 5, 0, 2, 4]
    assert got.max(dim=1).values.min().item() > 0.99


def test_a_prototype_that_all_prefer_does_not_take_all():
    scores = 0.1 * cosines(32, 4, seed=2)
    scores[:, 0] += 0.5
    got = sinkhorn(torch.tensor(scores, dtype=torch.float32), 0.05, 50)
    assert got.sum(dim=0).max().item() < 1.1 * 32 / 4


def test_a_constant_added_to_all_scores_changes_nothing():
    scores = torch.tensor(cosines(7, 5, seed=3), dtype=torch.float32)
    torch.testing.assert_close(sinkhorn(scores + 4, 0.05, 3), sinkhorn(scores, 0.05, 3), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("factor", [10, 250])
def test_large_scores_neither_overflow_nor_vanish(factor):
    scores = np.round(factor * cosines(6, 9, seed=4), 3).astype(np.float32)
    got = sinkhorn(torch.tensor(scores), 0.05, 3)
    assert torch.isfinite(got).all()
    np.testing.assert_allclose(got.double().numpy(), oracle_in_decimals(scores, 0.05, 3), rtol=2e-2, atol=1e-4)


def test_the_last_normalisation_is_over_the_prototypes():
    # Far from convergence the two orders differ: rows sum to one exactly, columns do not.
    got = sinkhorn(torch.tensor(cosines(12, 5, seed=5), dtype=torch.float32), 0.05, 1)
    assert (got.sum(dim=1) - 1).abs().max().item() < 1e-5
    assert (got.sum(dim=0) - 12 / 5).abs().max().item() > 1e-2


def test_half_precision_scores_are_worked_in_single_precision():
    scores = torch.tensor(cosines(8, 6, seed=6)).to(torch.bfloat16)
    got = sinkhorn(scores, 0.05, 3)
    assert got.dtype == torch.float32
    expected = oracle_sinkhorn(scores.double().tolist(), 0.05, 3)
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=5e-4, atol=1e-6)


def test_assignments_carry_no_gradient():
    scores = torch.tensor(cosines(4, 3), dtype=torch.float32, requires_grad=True)
    assert not sinkhorn(scores, 0.05, 3).requires_grad
