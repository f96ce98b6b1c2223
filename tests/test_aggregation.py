"""Aggregators against the papers' equations, written out slowly, and the promises that all of them keep."""

import tracemalloc

import numpy as np
import pytest
import torch
from aggregation_data import MANIFEST, deltas, global_model, reply, small_manifest
from torch import nn

from lowssl_core.protocol.manifest import Entry, Manifest
from server.aggregation import AGGREGATORS
from server.aggregation.batchnorm import StatisticsPool
from server.aggregation.means import FedAvgConfig, FedBuffConfig, LDAWAConfig, layers

TRAINED = MANIFEST.trained_size
# Privacy adds noise on purpose; test_privacy.py has its own.
EXACT = [name for name in AGGREGATORS if name != "private_mean"]


def run_round(aggregator, replies, model=None, manifest=MANIFEST):
    aggregator.begin(global_model() if model is None else model, manifest)
    for one in replies:
        aggregator.add(one)
    return aggregator.finish()


def weighted_replies(count=6, seed=0):
    rng = np.random.default_rng(seed)
    return [
        reply(flat, i, weight=float(rng.integers(10, 100)), staleness=int(rng.integers(3)), clip=rng.uniform(0.5, 1))
        for i, flat in enumerate(deltas(count, seed))
    ]


def test_fedavg_is_the_mean_by_images_and_late_replies_count_less(tmp_path):
    replies = weighted_replies()
    new = run_round(FedAvgConfig(momentum=0, rate=0.5).build(tmp_path), replies)
    total, sum_of_weights = np.zeros(TRAINED), 0.0
    for one in replies:
        weight = one.weight / np.sqrt(1 + one.staleness)
        total += weight * one.clip * one.flat[:TRAINED].astype(np.float64)
        sum_of_weights += weight
    np.testing.assert_allclose(
        new[:TRAINED], global_model()[:TRAINED] + 0.5 * total / sum_of_weights, rtol=1e-6, atol=1e-7
    )


def test_momentum_is_that_of_fedavgm_and_survives_a_restart(tmp_path):
    config, model, rounds = FedAvgConfig(momentum=0.9), global_model(), [deltas(3, seed) for seed in range(4)]
    velocity, expected = np.zeros(TRAINED), model[:TRAINED].astype(np.float64)
    aggregator = config.build(tmp_path)
    for flats in rounds:
        velocity = 0.9 * velocity + np.mean([flat[:TRAINED] for flat in flats], axis=0, dtype=np.float64)
        expected = expected + velocity
        model = run_round(aggregator, [reply(flat, i) for i, flat in enumerate(flats)], model)
        restarted = config.build(tmp_path)
        restarted.carried = aggregator.carried.copy()
        aggregator = restarted
    np.testing.assert_allclose(model[:TRAINED], expected, rtol=1e-5, atol=1e-6)


def test_fedbuff_discounts_late_deltas_and_divides_by_their_number(tmp_path):
    replies = weighted_replies(4)
    aggregator = FedBuffConfig(buffer=4, rate=0.7).build(tmp_path)
    new = run_round(aggregator, replies)
    assert aggregator.is_full
    total = sum(one.clip * one.flat[:TRAINED].astype(np.float64) / np.sqrt(1 + one.staleness) for one in replies)
    np.testing.assert_allclose(new[:TRAINED], global_model()[:TRAINED] + 0.7 / 4 * total, rtol=1e-6, atol=1e-7)


def test_l_dawa_weighs_each_layer_by_its_angle(tmp_path):
    replies = [reply(5 * flat if i == 0 else flat, i) for i, flat in enumerate(deltas(5))]
    new = run_round(LDAWAConfig().build(tmp_path), replies)
    model = global_model().astype(np.float64)
    for names in (("conv.weight",), ("norm.weight", "norm.bias"), ("head.weight",)):
        place = np.concatenate([np.arange(MANIFEST.size)[e.place] for e in MANIFEST.entries if e.name in names])
        ours = model[place]
        top, bottom = 0, 0
        for one in replies:
            own = ours + one.flat[place]
            cosine = ours @ own / (np.linalg.norm(ours) * np.linalg.norm(own))
            top, bottom = top + cosine * own, bottom + cosine
        np.testing.assert_allclose(new[place], top / bottom, rtol=1e-5, atol=1e-6)


def test_l_dawa_never_follows_a_layer_that_was_turned_around(tmp_path):
    model, flat = global_model(), deltas(1)[0]
    flat[:TRAINED] = -3 * model[:TRAINED]
    aggregator = LDAWAConfig().build(tmp_path)
    np.testing.assert_array_equal(run_round(aggregator, [reply(flat, 0)])[:TRAINED], model[:TRAINED])
    honest = deltas(2)
    new = run_round(aggregator, [reply(each, i) for i, each in enumerate([*honest, flat])])
    alone = run_round(aggregator, [reply(each, i) for i, each in enumerate(honest)])
    np.testing.assert_array_equal(new[:TRAINED], alone[:TRAINED])
    model[:TRAINED] = 0  # no angle: a plain mean
    new = run_round(aggregator, [reply(each, i) for i, each in enumerate(deltas(2))], model)
    np.testing.assert_allclose(new[:TRAINED], np.mean(deltas(2), axis=0)[:TRAINED], atol=1e-6)


def test_weight_and_bias_are_one_layer():
    assert [(place.start, place.stop) for place in layers(MANIFEST)] == [(0, 2000), (2000, 2100), (2100, 2500)]


def batchnorm_statistics(images):
    """What a BatchNorm layer of torch keeps after it has seen `images` (N, C, H, W) as one batch."""
    layer = nn.BatchNorm2d(images.shape[1], momentum=1.0)
    layer.train()(images)
    return layer.running_mean.numpy(), layer.running_var.numpy()


@pytest.mark.parametrize("name", ["fedavg", "fedbuff", "l_dawa"])
def test_pooled_batchnorm_statistics_are_the_centralised_ones(name, tmp_path):
    generator = torch.Generator().manual_seed(0)
    devices = [
        shift + scale * torch.randn(count, 5, 4, 4, generator=generator)
        for count, shift, scale in ((2, 0, 1), (7, 3, 0.1), (3, -100, 5), (20, 0.01, 1e-3))
    ]
    kinds = (
        ("norm.weight", "parameter"),
        ("norm.running_mean", "batchnorm_mean"),
        ("norm.running_var", "batchnorm_variance"),
    )
    manifest = Manifest(
        tuple(
            Entry(name=key, shape=(5,), dtype="float32", offset=5 * i, kind=kind) for i, (key, kind) in enumerate(kinds)
        )
    )
    replies = []
    for index, images in enumerate(devices):
        mean, variance = batchnorm_statistics(images)
        values = images[:, 0].numel()
        # torch keeps the unbiased variance; the pooling formula is one of plain ones.
        flat = np.concatenate([np.zeros(5), mean, variance * (values - 1) / values]).astype(np.float32)
        replies.append(reply(flat, index, weight=len(images)))
    new = run_round(AGGREGATORS[name]().build(tmp_path), replies, np.ones(15, dtype=np.float32), manifest)
    mean, variance = batchnorm_statistics(torch.cat(devices))
    values = sum(images[:, 0].numel() for images in devices)
    np.testing.assert_allclose(new[manifest.means], mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new[manifest.variances], variance * (values - 1) / values, rtol=1e-5)


def test_pooled_variances_do_not_fall_below_zero_by_cancellation():
    rng = np.random.default_rng(0)
    pool = StatisticsPool(MANIFEST)
    for _ in range(50):
        flat = global_model()
        flat[MANIFEST.means] = 1e8 + rng.random(50)
        flat[MANIFEST.variances] = 1e-12
        pool.add(flat, rng.uniform(1, 1000))
    pool.write(flat)
    assert (flat[MANIFEST.variances] > 0).all()


@pytest.mark.parametrize("name", EXACT)
def test_prototypes_keep_rows_of_length_one(name, tmp_path):
    manifest = small_manifest(unit_rows=["head.weight"])
    new = run_round(AGGREGATORS[name]().build(tmp_path), weighted_replies(), manifest=manifest)
    rows = new[manifest.entries[3].place].reshape(8, 50)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    assert abs(np.linalg.norm(new[:50]) - 1) > 0.1


@pytest.mark.parametrize("name", EXACT)
def test_without_replies_the_model_stays(name, tmp_path):
    np.testing.assert_array_equal(run_round(AGGREGATORS[name]().build(tmp_path), []), global_model())


@pytest.mark.parametrize("name", EXACT)
def test_equal_replies_move_the_model_by_their_delta(name, tmp_path):
    flat = deltas(1)[0]
    new = run_round(AGGREGATORS[name]().build(tmp_path), [reply(flat, i, weight=5) for i in range(7)])
    if name != "l_dawa":  # which adds to it nothing but rounding too
        np.testing.assert_allclose(new[:TRAINED], global_model()[:TRAINED] + flat[:TRAINED], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(new[TRAINED:], flat[TRAINED:], rtol=1e-6)
    assert new.dtype == np.float32


@pytest.mark.parametrize("name", EXACT)
def test_the_order_of_replies_changes_rounding_alone(name, tmp_path):
    replies = weighted_replies(9)
    forward = run_round(AGGREGATORS[name]().build(tmp_path / "a"), replies)
    backward = run_round(AGGREGATORS[name]().build(tmp_path / "b"), replies[::-1])
    np.testing.assert_allclose(forward, backward, rtol=3e-7, atol=1e-9)
    if name in ("trimmed_mean", "median", "multi_krum"):
        np.testing.assert_array_equal(forward, backward)


@pytest.mark.parametrize("name", EXACT)
def test_the_global_model_and_replies_are_left_alone_and_a_second_round_forgets_the_first(name, tmp_path):
    model, replies = global_model(), weighted_replies(5)
    before = [one.flat.copy() for one in replies]
    aggregator = AGGREGATORS[name]().build(tmp_path)
    first = run_round(aggregator, replies, model)
    np.testing.assert_array_equal(model, global_model())
    for one, flat in zip(replies, before, strict=True):
        np.testing.assert_array_equal(one.flat, flat)
    aggregator.carried = None
    np.testing.assert_array_equal(run_round(aggregator, replies, model), first)
    aggregator.carried = None
    other = [reply(flat, i) for i, flat in enumerate(deltas(4, seed=5))]
    fresh = run_round(AGGREGATORS[name]().build(tmp_path / "fresh"), other, first)
    np.testing.assert_array_equal(run_round(aggregator, other, first), fresh)


@pytest.mark.parametrize("name", EXACT)
def test_a_reply_that_comes_twice_counts_once(name, tmp_path):
    replies = weighted_replies(4)
    once = run_round(AGGREGATORS[name]().build(tmp_path / "once"), replies)
    np.testing.assert_array_equal(
        run_round(AGGREGATORS[name]().build(tmp_path / "twice"), [*replies, *replies[:2]]), once
    )


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize(
    "bad", [np.zeros(MANIFEST.size), np.zeros(1, np.float32), np.zeros((MANIFEST.size, 1), np.float32)]
)
def test_arrays_of_another_shape_or_type_are_never_broadcast(name, bad, tmp_path):
    aggregator = AGGREGATORS[name]().build(tmp_path)
    aggregator.begin(global_model(), MANIFEST)
    with pytest.raises(ValueError, match="manifest"):
        aggregator.add(reply(bad, 0))
    with pytest.raises(ValueError, match="manifest"):
        aggregator.begin(bad, MANIFEST)


def test_memory_is_a_few_models_however_many_devices_answer(tmp_path):
    """Peak memory of numpy's arrays, in models, with 8 and with 40 replies of one model."""
    entries = (
        ("w", 400_000, "parameter"),
        ("n.running_mean", 5000, "batchnorm_mean"),
        ("n.running_var", 5000, "batchnorm_variance"),
    )
    rows, offset = [], 0
    for name, size, kind in entries:
        rows.append(Entry(name=name, shape=(size,), dtype="float32", offset=offset, kind=kind))
        offset += size
    manifest = Manifest(tuple(rows))
    model, flat = np.ones((2, manifest.size), dtype=np.float32)
    for name, config in AGGREGATORS.items():
        peaks = []
        for count in (8, 40):
            aggregator = config().build(tmp_path / name)
            tracemalloc.start()
            run_round(aggregator, (reply(flat, i) for i in range(count)), model, manifest)
            peaks.append(tracemalloc.get_traced_memory()[1] / model.nbytes)
            tracemalloc.stop()
        assert peaks[1] < 5.5, (name, peaks)
        assert peaks[1] < peaks[0] + 0.5, (name, peaks)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fedavg", {"momentum": 1.0}),
        ("fedavg", {"rate": 0.0}),
        ("fedbuff", {"buffer": 0}),
        ("fedbuff", {"rate": float("nan")}),
        ("fedbuff", {"rate": float("inf")}),
        ("trimmed_mean", {"trim": 0.5}),
        ("multi_krum", {"faulty": 0.5}),
        ("private_mean", {"noise_multiplier": 0.0}),
        ("private_mean", {"clip": float("inf")}),
    ],
)
def test_settings_that_cannot_be_are_refused(name, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        AGGREGATORS[name](**change)
