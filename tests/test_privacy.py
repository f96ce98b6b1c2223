"""Noise is as large as promised, the accountant gives the known figures, and a run ends before its budget does."""

import math

import numpy as np
import pytest
from aggregation_data import MANIFEST, deltas, global_model, reply

from lowssl_core.errors import UserError
from server.aggregation.comparison import ComparisonConfig
from server.aggregation.privacy import (
    Accountant,
    BudgetSpent,
    PrivateMeanConfig,
    Rounds,
    check_private,
    epsilon,
    poisson_sample,
)
from server.aggregation.screening import ScreeningConfig

TRAINED = MANIFEST.trained_size


def run_round(config, tmp_path, flats):
    aggregator = config.build(tmp_path)
    aggregator.begin(global_model(), MANIFEST)
    for index, flat in enumerate(flats):
        aggregator.add(reply(flat, index, weight=10.0**index))
    return aggregator.finish()


def test_without_much_noise_it_is_the_sum_of_clipped_deltas_over_the_expected_number(tmp_path):
    flats = deltas(4)
    config = PrivateMeanConfig(clip=1.0, noise_multiplier=1e-9, expected_replies=8, momentum=0)
    flats[0][:TRAINED] *= 1000
    new = run_round(config, tmp_path, flats)
    expected = global_model()[:TRAINED].astype(np.float64)
    for flat in flats:  # weights that devices claim would make their influence larger: they play no part
        delta = flat[:TRAINED].astype(np.float64)
        expected += delta * min(1, 1 / np.linalg.norm(delta)) / 8
    np.testing.assert_allclose(new[:TRAINED], expected, atol=1e-6)


@pytest.mark.parametrize("count", [0, 3])
def test_noise_has_the_promised_deviation_also_when_nobody_came(count, tmp_path):
    config = PrivateMeanConfig(clip=2.0, noise_multiplier=1.5, expected_replies=10, momentum=0)
    flats = [np.where(np.arange(MANIFEST.size) < TRAINED, 0, flat).astype(np.float32) for flat in deltas(count)]
    noise = (run_round(config, tmp_path, flats) - global_model())[:TRAINED]
    assert noise.std() == pytest.approx(1.5 * 2 / 10, rel=0.1)
    assert abs(noise.mean()) < 5 * 0.3 / math.sqrt(TRAINED)
    assert not np.array_equal(noise, (run_round(config, tmp_path, flats) - global_model())[:TRAINED])


def test_batchnorm_statistics_stay_what_they_are(tmp_path):
    new = run_round(PrivateMeanConfig(), tmp_path, deltas(5))
    np.testing.assert_array_equal(new[TRAINED:], global_model()[TRAINED:])


@pytest.mark.parametrize(
    ("noise_multiplier", "sampling_rate", "expected"),
    [(1.0, 0.05, 4.0), (1.0, None, 96), (2.0, 0.05, 1.2), (2.0, None, 35)],
)
def test_the_known_figures_of_100_rounds_of_50_in_1000_devices(noise_multiplier, sampling_rate, expected):
    rounds = [Rounds(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, count=100)]
    assert epsilon(rounds, 1e-5) == pytest.approx(expected, rel=0.02)


def test_without_sampling_it_is_the_gaussian_mechanisms_bound():
    """Renyi's divergence of order a of N(0, z^2) and N(1, z^2) is a / (2 z^2); to epsilon by Canonne et al. 2020."""
    bounds = []
    for order in np.arange(1.01, 100, 0.01):
        divergence = 20 * order / (2 * 3.0**2)
        bounds.append(divergence + math.log1p(-1 / order) - math.log(1e-6 * order) / (order - 1))
    assert epsilon([Rounds(noise_multiplier=3.0, sampling_rate=None, count=20)], 1e-6) == pytest.approx(
        min(bounds), rel=0.01
    )


def test_epsilon_grows_with_rounds_and_falls_with_noise_and_rarer_sampling():
    def of(noise_multiplier, sampling_rate, count):
        rounds = [Rounds(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, count=count)]
        return epsilon(rounds, 1e-5)

    assert of(1.0, 0.05, 10) < of(1.0, 0.05, 20)
    assert of(2.0, 0.05, 10) < of(1.0, 0.05, 10)
    assert of(1.0, 0.01, 10) < of(1.0, 0.05, 10) < of(1.0, 1.0, 10) == pytest.approx(of(1.0, None, 10))


def sampled(count):
    return Rounds(noise_multiplier=1.0, sampling_rate=0.05, count=count)


def test_training_is_refused_past_the_budget_across_restarts():
    accountant = Accountant(delta=1e-5, max_epsilon=2.0)
    assert accountant.epsilon == 0
    # How many rounds the budget bears, found without the accountant.
    count = next(n for n in range(1, 100) if epsilon([sampled(n + 1)], 1e-5) > 2)
    assert count > 5
    for _ in range(count):
        spent = accountant.charge(1.0, 0.05)
        assert spent == accountant.epsilon <= 2
        state = accountant.to_json()
        accountant = Accountant(delta=1e-5, max_epsilon=2.0)
        accountant.restore(state)
    with pytest.raises(BudgetSpent, match="max_epsilon is 2"):
        accountant.charge(1.0, 0.05)
    assert accountant.rounds == [sampled(count)]
    accountant.charge(50.0, 0.05)  # what is cheap enough still goes
    assert accountant.rounds[-1].noise_multiplier == 50


def test_poisson_sampling_draws_each_device_for_itself():
    devices = [str(number) for number in range(40_000)]
    first, second = (set(poisson_sample(devices, 0.05)) for _ in range(2))
    for drawn in (first, second):
        assert len(drawn) == pytest.approx(2000, abs=6 * math.sqrt(2000))
    assert len(first & second) == pytest.approx(100, abs=60)
    assert len({len(poisson_sample(devices[:1000], 0.05)) for _ in range(20)}) > 1
    assert poisson_sample(devices, 1.0) == devices
    assert poisson_sample([], 0.5) == []


def test_screening_that_would_leak_is_refused():
    check_private(ScreeningConfig(comparison=None, max_staleness=0))
    with pytest.raises(UserError, match="compared"):
        check_private(ScreeningConfig(comparison=ComparisonConfig(), max_staleness=0))
    with pytest.raises(UserError, match="max_staleness is 0, not 5"):
        check_private(ScreeningConfig(comparison=None))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Rounds, {"noise_multiplier": 0.0, "sampling_rate": None}),
        (Rounds, {"noise_multiplier": 1.0, "sampling_rate": 1.5}),
        (Accountant, {"delta": 0.0, "max_epsilon": 1.0}),
        (Accountant, {"delta": 1e-5, "max_epsilon": math.inf}),
    ],
)
def test_figures_that_cannot_be_are_refused(kind, values):
    with pytest.raises(ValueError, match="is"):
        kind(**values)
