"""Trimmed mean, median and multi-Krum against loops over the papers' equations, and the spool they work from."""

import dataclasses
import math
import os
import statistics
import subprocess
import sys

import numpy as np
import pytest
from aggregation_data import MANIFEST, deltas, global_model, reply

from lowssl_core.errors import UserError
from server.aggregation.means import FedAvgConfig
from server.aggregation.robust import (
    MedianConfig,
    MultiKrumConfig,
    TrimmedMeanConfig,
    median,
    multi_krum,
    squared_distances,
    trimmed_mean,
)

TRAINED = MANIFEST.trained_size


def run_round(config, folder, flats):
    aggregator = config.build(folder)
    aggregator.begin(global_model(), MANIFEST)
    for index, flat in enumerate(flats):
        aggregator.add(reply(flat, index))
    return aggregator.finish()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 10, 11])
def test_the_median_is_that_of_each_coordinate(count):
    rows = np.random.default_rng(count).standard_normal((count, 30)).astype(np.float32)
    rows[:, 0] = 1  # ties
    expected = [statistics.median(column) for column in rows.T.astype(float).tolist()]
    np.testing.assert_allclose(median(rows), expected, rtol=1e-7)


@pytest.mark.parametrize("trim", [0.01, 0.1, 0.2, 0.49])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 10, 11])
def test_the_trimmed_mean_leaves_out_as_many_at_each_end(count, trim):
    rows = np.random.default_rng(count).standard_normal((count, 30)).astype(np.float32)
    rows[:, 0] = 1
    cut = math.ceil(trim * count)
    while 2 * cut >= count:
        cut -= 1
    expected = [statistics.fmean(sorted(column)[cut : count - cut]) for column in rows.T.astype(float).tolist()]
    np.testing.assert_allclose(trimmed_mean(rows, trim), expected, rtol=1e-6, atol=1e-9)


def krum_by_the_paper(rows, faulty):
    """Blanchard et al. 2017: s(i) = sum over the n - f - 2 closest of |V_i - V_j|^2; the n - f best."""
    count = len(rows)
    scores = []
    for i in range(count):
        distances = sorted(math.dist(rows[i], rows[j]) ** 2 for j in range(count) if j != i)
        scores.append(sum(distances[: count - faulty - 2]))
    return sorted(sorted(range(count), key=lambda i: scores[i])[: count - faulty])


@pytest.mark.parametrize(
    ("count", "share", "faulty"), [(5, 0.2, 1), (9, 0.3, 3), (10, 0.25, 3), (4, 0.2, 0), (12, 0, 0)]
)
def test_multi_krum_chooses_as_the_paper_does(count, share, faulty):
    for seed in range(30):
        rows = np.random.default_rng([count, seed]).standard_normal((count, 40))
        rows[0] *= 4
        blocks = (rows[:, start : start + 7] for start in range(0, 40, 7))
        assert multi_krum(blocks, count, share) == krum_by_the_paper(rows.tolist(), faulty)


def test_two_replies_are_too_few_for_krum_and_both_count():
    assert multi_krum(iter([np.ones((2, 3))]), 2, 0.4) == [0, 1]


def test_distances_tell_replies_apart_that_float32_could_not():
    rng = np.random.default_rng(0)
    rows = (1000 + 1e-3 * rng.standard_normal((6, 5000))).astype(np.float64)
    expected = [[math.dist(a, b) ** 2 for b in rows.tolist()] for a in rows.tolist()]
    blocks = (rows[:, start : start + 1024] for start in range(0, 5000, 1024))
    np.testing.assert_allclose(squared_distances(blocks, 6), expected, rtol=0.01, atol=1e-5)
    products = rows.astype(np.float32) @ rows.astype(np.float32).T
    squares = np.diag(products)
    error = np.abs(squares[:, None] + squares - 2 * products - expected)
    assert error.max() > 0.9 * np.max(expected)


@pytest.mark.parametrize("config", [TrimmedMeanConfig(trim=0.3), MedianConfig(), MultiKrumConfig(faulty=0.3)])
def test_three_colluding_devices_of_ten_do_not_move_the_model_far(config, tmp_path):
    flats = deltas(10, likeness=0.8)
    honest = np.mean(flats[3:], axis=0)[:TRAINED]
    for index, flat in enumerate(flats[:3]):
        flat[:TRAINED] *= (-50, 1000, -1)[index]
        flat[MANIFEST.means] += 1e6
        flat[MANIFEST.variances] *= 1e6
    new = run_round(config, tmp_path, flats)
    moved = new[:TRAINED] - global_model()[:TRAINED]
    assert np.linalg.norm(moved - honest) < 0.6 * np.linalg.norm(honest)
    assert np.abs(new[MANIFEST.means] - global_model()[MANIFEST.means]).max() < 1
    assert (new[MANIFEST.variances] > 0).all()
    assert (new[MANIFEST.variances] < 10 * global_model()[MANIFEST.variances]).all()
    plain = run_round(FedAvgConfig(momentum=0), tmp_path, flats)
    assert np.linalg.norm(plain[:TRAINED] - global_model()[:TRAINED] - honest) > 50 * np.linalg.norm(honest)


def test_with_nothing_to_cut_off_statistics_are_the_pooled_ones(tmp_path):
    flats = deltas(6)
    krum = run_round(MultiKrumConfig(faulty=0), tmp_path / "krum", flats)
    pooled = run_round(FedAvgConfig(momentum=0), tmp_path, flats)
    np.testing.assert_allclose(krum, pooled, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("config", [TrimmedMeanConfig(), MedianConfig(), MultiKrumConfig()])
def test_clipped_and_late_replies_are_shortened(config, tmp_path):
    flat = deltas(1)[0]
    aggregator = config.build(tmp_path)
    aggregator.begin(global_model(), MANIFEST)
    for index in range(5):
        aggregator.add(reply(flat, index, clip=0.5, staleness=3))
    moved = aggregator.finish()[:TRAINED] - global_model()[:TRAINED]
    np.testing.assert_allclose(moved, 0.25 * flat[:TRAINED], atol=1e-6)


@pytest.mark.parametrize("config", [TrimmedMeanConfig(), MedianConfig(), MultiKrumConfig()])
def test_a_round_done_again_has_only_the_replies_of_the_new_try(config, tmp_path):
    """What one try accepted the next one may refuse, so nothing of it counts, whoever wrote the files."""
    flats = deltas(8)
    alone = run_round(config, tmp_path / "alone", flats[:4])
    again = config.build(tmp_path / "again")
    for tried in (config.build(tmp_path / "again"), again):  # cut off by a kill, and void
        tried.begin(global_model(), MANIFEST)
        for index in range(4, 8):
            tried.add(reply(flats[index], index))
    again.begin(global_model(), MANIFEST)
    assert not list((tmp_path / "again").iterdir())
    for index in range(4):
        again.add(reply(flats[index], index))
    np.testing.assert_array_equal(again.finish(), alone)


def test_two_devices_whose_updates_have_one_name_both_count(tmp_path):
    flats = deltas(3)
    alike = [dataclasses.replace(reply(flat, index), update_id="same") for index, flat in enumerate(flats)]
    for config in (MedianConfig(), FedAvgConfig()):
        aggregator = config.build(tmp_path)
        aggregator.begin(global_model(), MANIFEST)
        for one in alike:
            aggregator.add(one)
        np.testing.assert_array_equal(aggregator.finish(), run_round(config, tmp_path, flats))


WRITER = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from aggregation_data import MANIFEST, deltas, reply
from server.aggregation.spool import Spool
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
spool = Spool(Path(sys.argv[1]))
for index, flat in enumerate(deltas(20)):
    if index == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    spool.put(reply(flat, index))
"""


def test_a_disk_that_is_full_is_said_and_earlier_replies_stay(tmp_path):
    """A limit on the size of files stands for the disk's: the write fails just so."""
    command = [sys.executable, "-c", WRITER, str(tmp_path), os.path.dirname(__file__)]
    error = subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()[-1]
    assert "a reply of 0.0 MB cannot be kept" in error
    assert "earlier replies (3) are untouched" in error
    found = sorted(path.read_bytes() for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert found == sorted(flat.astype("<f4").tobytes() for flat in deltas(20)[:3])


def test_a_reply_that_is_lost_meanwhile_is_said(tmp_path):
    aggregator = MedianConfig().build(tmp_path)
    aggregator.begin(global_model(), MANIFEST)
    for index, flat in enumerate(deltas(3)):
        aggregator.add(reply(flat, index))
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(UserError, match="No such file"):
        aggregator.finish()
