"""Drift without labels, against its formulas written out."""

import json

import numpy as np
import pytest

from client.drift import Drift, DriftConfig, PageHinkley


def oracle_page_hinkley(values: list[float], delta: float, threshold: float) -> list[bool]:
    """m_T over all values since the last alarm, each mean taken anew; an alarm where m_T is far above its minimum."""
    alarms: list[bool] = []
    first = 0
    for last in range(len(values)):
        stretch = values[first : last + 1]
        sums = [0.0]
        for t in range(1, len(stretch) + 1):
            sums.append(sums[-1] + stretch[t - 1] - np.mean(stretch[:t]) - delta)
        alarms.append(bool(sums[-1] - min(sums) > threshold))
        if alarms[-1]:
            first = last + 1
    return alarms


def test_page_hinkley_is_its_formula():
    rng = np.random.default_rng(0)
    values = [*rng.binomial(20, 0.05, 30) / 20, *rng.binomial(20, 0.4, 10) / 20, *rng.binomial(20, 0.1, 30) / 20]
    test = PageHinkley(0.02, 0.3)
    alarms = [test.update(float(value)) for value in values]
    assert alarms == oracle_page_hinkley([float(value) for value in values], 0.02, 0.3)
    assert any(alarms[30:40])
    assert not any(alarms[:30])


def test_page_hinkley_hears_a_rise_and_not_a_fall():
    for before, after, expected in ((0.05, 0.4, True), (0.4, 0.05, False)):
        test = PageHinkley(0.02, 0.3)
        assert any(test.update(value) for value in [before] * 20 + [after] * 5) is expected


def test_the_share_is_of_images_beyond_the_percentile_of_the_last_thousand():
    rng = np.random.default_rng(0)
    drift = Drift(DriftConfig(window=200, fewest=50))
    history: list[float] = []
    for round_number in range(12):
        distances = rng.gamma(2, 0.1 + 0.02 * round_number, 40).astype(np.float32)
        reading = drift.update(distances)
        known = sorted(history[-200:])
        history += distances.tolist()
        if len(known) < 50:
            assert (reading.share, reading.limit) == (None, None)
            continue
        # The 95th percentile: between the two values around place .95 (n - 1).
        place = 0.95 * (len(known) - 1)
        low = int(place)
        limit = known[low] + (place - low) * (known[min(low + 1, len(known) - 1)] - known[low])
        assert reading.limit == pytest.approx(limit, rel=1e-5)
        assert reading.share == pytest.approx(sum(d > limit for d in distances.tolist()) / 40, abs=1e-9)


def test_new_scenes_are_told_from_chance_and_the_alarm_ends_once_they_are_known():
    rng = np.random.default_rng(1)
    drift = Drift()
    readings = [drift.update(rng.normal(0.2, 0.05, 50).clip(0).astype(np.float32)) for _ in range(40)]
    assert not any(reading.alarm for reading in readings)
    assert 0.01 < np.mean([reading.share for reading in readings[5:]]) < 0.1
    moved = [drift.update(rng.normal(0.4, 0.05, 50).astype(np.float32)) for _ in range(40)]
    assert any(reading.alarm for reading in moved[:3])
    assert not any(reading.alarm for reading in moved[20:])  # what was new has become the measure


def test_its_state_goes_through_json():
    rng = np.random.default_rng(2)
    lots = [rng.gamma(2, 0.1 + 0.03 * (index > 8), 40).astype(np.float32) for index in range(16)]
    straight, stopped = Drift(), Drift()
    for index, lot in enumerate(lots):
        if index == 10:
            stopped = Drift(state=json.loads(json.dumps(stopped.state())))
        assert straight.update(lot) == stopped.update(lot)


def test_no_new_images_say_nothing():
    reading = Drift().update(np.zeros(0, dtype=np.float32))
    assert (reading.share, reading.alarm) == (None, False)


@pytest.mark.parametrize("values", [{"fewest": 0}, {"fewest": 2000}, {"percentile": 100.0}, {"threshold": -1.0}])
def test_values_out_of_range_are_named(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        DriftConfig(**values)
