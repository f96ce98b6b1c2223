"""What reaches the model has passed every check; what is refused is recorded with its reason, and the run goes on."""

import dataclasses
import json

import numpy as np
import pytest
from aggregation_data import MANIFEST, deltas, global_model, message, small_manifest

from lowssl_core.protocol.codec import CODECS, encode_flat
from lowssl_core.protocol.messages import Metrics
from server.aggregation import AGGREGATORS
from server.aggregation.comparison import ComparisonConfig, medians_of_others
from server.aggregation.quarantine import Quarantine
from server.aggregation.reply import Rejected, Screened
from server.aggregation.screening import Screening, ScreeningConfig

TRAINED = MANIFEST.trained_size
VERSION = 7


def screening(comparison=True, quarantine=None, **options):
    config = ScreeningConfig(**options)
    if not comparison:
        config = dataclasses.replace(config, comparison=None)
    screen = Screening(config, quarantine or Quarantine())
    screen.begin(global_model(), MANIFEST, VERSION)
    return screen


def device(index):
    return f"device-{index}"


def verdict_on(data, screen=None, sender=None):
    (verdict,) = (screen or screening(comparison=False)).receive(sender or device(0), data)
    return verdict


def run_round(screen, flats, **changes):
    """Verdicts by device, after the round is closed."""
    verdicts = []
    for index, flat in enumerate(flats):
        verdicts += screen.receive(device(index), message(flat, index, **changes))
    verdicts += screen.close()
    assert len(verdicts) == len(flats)
    return [next(one for one in verdicts if one.device == device(index)) for index in range(len(flats))]


def reasons(verdicts):
    return [verdict.reason if isinstance(verdict, Rejected) else "passed" for verdict in verdicts]


def with_parts(flat, **parts):
    flat = flat.copy()
    for name, values in parts.items():
        place = slice(0, TRAINED) if name == "delta" else getattr(MANIFEST, name)
        flat[place] = values
    return flat


def test_a_sound_update_passes_whole():
    flat = deltas(1)[0]
    metrics = Metrics(steps=4, seconds=1.5, new_images=16, replayed_images=48, loss=5.25, drift=0.5)
    verdict = verdict_on(message(flat, 0, metrics=metrics, weight=48))
    assert verdict == Screened(
        device=device(0), update_id="device-0-7", weight=48.0, metrics=metrics, flat=verdict.flat
    )
    np.testing.assert_array_equal(verdict.flat, flat)


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_passes(codec):
    payload = encode_flat(deltas(1)[0], MANIFEST, codec, share=0.1)
    assert isinstance(verdict_on(message(deltas(1)[0], 0, payload=payload)), Screened)


def raw(flat):
    """An fp32 payload without the sender's own check."""
    return encode_flat(np.zeros_like(flat), MANIFEST, "fp32")[:5] + flat.astype("<f4").tobytes()


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"manifest": small_manifest(unit_rows=["head.weight"])}, "manifest", "this run's is"),
        ({"base_version": VERSION + 1}, "from the future", "version 8"),
        ({"base_version": VERSION - 6}, "too old", "6 versions late"),
        ({"weight": 0}, "weight", "1e-06 is the least"),
        ({"weight": 5e-324}, "weight", "1e-06 is the least"),
        ({"weight": -320}, "weight", "-320"),
        ({"payload": b""}, "payload", "0 bytes"),
        ({"payload": raw(deltas(1)[0])[:-4]}, "payload", "bytes of fp32"),
        ({"payload": raw(deltas(1)[0]) + bytes(4)}, "payload", "bytes of fp32"),
        ({"payload": raw(deltas(1)[0])[:5] + deltas(1)[0].astype(np.float64).tobytes()}, "message", "at most"),
        ({"payload": raw(with_parts(deltas(1)[0], delta=np.nan))}, "payload", "not finite"),
        ({"payload": raw(with_parts(deltas(1)[0], means=-np.inf))}, "payload", "not finite"),
        ({"payload": raw(with_parts(deltas(1)[0], variances=-0.1))}, "variance", "-0.1"),
        ({"payload": raw(with_parts(deltas(1)[0], means=1e25))}, "statistics", "1e+09 is the most"),
        ({"payload": raw(with_parts(deltas(1)[0], variances=1e30))}, "statistics", "1e+09 is the most"),
        ({"payload": raw(with_parts(deltas(1)[0], buffers=-1e20))}, "statistics", "1e+09 is the most"),
        ({"payload": raw(1000 * deltas(1)[0])}, "norm", "the most for this model"),
        ({"payload": raw(with_parts(deltas(1)[0], delta=3e38))}, "norm", "the most for this model"),
    ],
)
@pytest.mark.parametrize("comparison", [True, False])
def test_an_update_that_is_unsound_in_itself_is_refused(changes, reason, detail, comparison):
    verdict = verdict_on(message(deltas(1)[0], 0, **changes), screening(comparison))
    assert isinstance(verdict, Rejected)
    assert verdict.reason == reason
    assert detail in verdict.detail
    assert "\n" not in verdict.detail
    assert verdict.update_id == (None if reason == "message" else "device-0-7")


@pytest.mark.parametrize("data", [b"", b"LSSL", b"\x00" * 100])
def test_what_is_no_update_is_refused_in_its_senders_name(data):
    verdict = verdict_on(data, sender="camera")
    assert (verdict.device, verdict.update_id, verdict.reason) == ("camera", None, "message")


def test_a_device_cannot_speak_for_another():
    verdict = verdict_on(message(deltas(1)[0], 1))
    assert (verdict.device, verdict.reason, verdict.detail) == (device(0), "sender", "it says it is from device-1")


def test_an_update_counts_once_and_one_id_is_one_update():
    screen = screening(comparison=False)
    first, second = deltas(2)
    assert isinstance(verdict_on(message(first, 0), screen), Screened)
    again = verdict_on(message(first, 0), screen)
    assert (again.reason, again.is_fault) == ("repeated", False)
    assert verdict_on(message(second, 0, update_id="other"), screen).reason == "answered twice"
    late = verdict_on(message(first, 0, version=VERSION - 1, update_id="device-0-7"), screen)
    assert (late.reason, late.is_fault) == ("replayed", True)


def test_an_update_of_an_earlier_round_counts_less_and_is_not_counted_again():
    screen = screening(comparison=False)
    flat = deltas(1)[0]
    assert isinstance(verdict_on(message(flat, 0), screen), Screened)
    screen.begin(global_model(), MANIFEST, VERSION + 3)
    assert verdict_on(message(flat, 0), screen).reason == "repeated"
    late = verdict_on(message(flat, 1), screen, device(1))
    assert late.staleness == 3
    assert late.discount == 0.5
    assert late.remarks == ("3 versions late",)
    screen.begin(global_model(), MANIFEST, VERSION + 6)
    assert verdict_on(message(flat, 0), screen).reason == "too old"
    assert screen.as_dict()["seen"] == []  # what is too old anyway need not be remembered


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (lambda flat: with_parts(flat, delta=-flat[:TRAINED]), "direction"),
        (lambda flat: with_parts(flat, delta=40 * flat[:TRAINED]), "norm"),
        (lambda flat: with_parts(flat, delta=1000 * flat[:TRAINED]), "norm"),
        (lambda flat: with_parts(flat, means=flat[MANIFEST.means] + 100), "statistics"),
        (lambda flat: with_parts(flat, variances=flat[MANIFEST.variances] * 1000), "statistics"),
        (lambda flat: with_parts(flat, variances=0), "statistics"),
    ],
)
def test_one_attacker_is_refused_wherever_it_comes_and_nobody_else(attack, reason, place):
    flats = deltas(8)
    flats[place] = attack(flats[place])
    verdicts = run_round(screening(max_growth=1000), flats)
    assert reasons(verdicts) == [reason if index == place else "passed" for index in range(8)]


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_medians_of_others_leave_out_one_row_each(count):
    rows = np.random.default_rng(count).integers(0, 4, (count, 200)).astype(np.float32)  # with ties
    for index, others in enumerate(medians_of_others(rows)):
        np.testing.assert_array_equal(others, np.median(np.delete(rows, index, axis=0), axis=0))


@pytest.mark.parametrize("likeness", [0.1, 0.3, 0.8])
def test_honest_devices_pass_however_different(likeness):
    for seed in range(5):
        assert set(reasons(run_round(screening(), deltas(12, seed, likeness=likeness)))) == {"passed"}


def test_two_of_the_first_five_can_be_faulty():
    flats = deltas(10, likeness=0.5)
    flats[1] = with_parts(flats[1], delta=-flats[1][:TRAINED])
    flats[3] = with_parts(flats[3], delta=100 * flats[3][:TRAINED])
    expected = ["passed", "direction", "passed", "norm", *["passed"] * 6]
    assert reasons(run_round(screening(max_growth=1000), flats)) == expected


def test_long_deltas_and_heavy_weights_are_cut_to_multiples_of_the_median():
    flats = deltas(7)
    flats[2] = with_parts(flats[2], delta=8 * flats[2][:TRAINED])
    screen, verdicts = screening(max_weight=5000), []
    for index, flat in enumerate(flats):
        weight = {4: 1e9, 5: 3000.0}.get(index, 64.0)
        verdicts += screen.receive(device(index), message(flat, index, weight=weight))
    norms = [float(np.linalg.norm(flat[:TRAINED].astype(np.float64))) for flat in flats]
    assert verdicts[2].clip * norms[2] == pytest.approx(3 * np.median(norms[:5]), rel=1e-6)
    assert "clipped" in verdicts[2].remarks[0]
    assert [one.clip for one in verdicts if one.device != device(2)] == [1] * 6
    assert [one.weight for one in verdicts] == [64, 64, 64, 64, 640, 640, 64]
    # A long delta does not raise the bar for the next rounds.
    assert max(screen.as_dict()["norms"]) == pytest.approx(3 * np.median(norms[:5]), rel=1e-6)
    assert verdicts[4].remarks == ("weight 1e+09 counted as 5e+03", "weight 5e+03 counted as 640")


def test_replies_are_held_until_they_can_be_judged_and_all_come_out_when_the_round_closes():
    screen = screening()
    flats = deltas(6)
    given = [len(screen.receive(device(i), message(flat, i))) for i, flat in enumerate(flats)]
    assert given == [0, 0, 0, 0, 5, 1]
    assert screen.close() == []
    screen.begin(global_model(), MANIFEST, VERSION + 1)
    assert screen.receive(device(0), message(flats[0], 0, version=VERSION + 1)) == []
    (verdict,) = screen.close()
    assert isinstance(verdict, Screened)


def test_a_small_federation_is_judged_by_the_norms_of_earlier_rounds():
    screen = screening(max_growth=1000)
    assert reasons(run_round(screen, deltas(3))) == ["passed"] * 3
    screen.begin(global_model(), MANIFEST, VERSION + 1)
    flats = deltas(2, seed=1)
    flats[1] = with_parts(flats[1], delta=1000 * flats[1][:TRAINED])
    assert reasons(run_round(screen, flats, version=VERSION + 1)) == ["passed", "norm"]


def test_a_device_that_learned_nothing_passes():
    flats = [*deltas(4), with_parts(deltas(1)[0], delta=0), with_parts(deltas(1)[0], delta=0)]
    assert reasons(run_round(screening(), flats)) == ["passed"] * 6


def test_faults_lead_to_quarantine_and_a_person_releases():
    screen = screening(comparison=False)
    flat = with_parts(deltas(1)[0], delta=3e38)
    for version in range(VERSION, VERSION + 3):
        screen.begin(global_model(), MANIFEST, version)
        assert verdict_on(message(flat, 0, version=version), screen).reason == "norm"
    screen.begin(global_model(), MANIFEST, VERSION + 3)
    verdict = verdict_on(message(deltas(1)[0], 0, version=VERSION + 3), screen)
    assert (verdict.reason, verdict.detail) == ("quarantined", "since norm; a person can release it")
    assert isinstance(verdict_on(message(deltas(1)[0], 1, version=VERSION + 3), screen, device(1)), Screened)
    assert screen.quarantine.release(device(0))
    assert isinstance(verdict_on(message(deltas(1)[0], 0, version=VERSION + 3), screen), Screened)


def test_one_faulty_update_that_comes_again_with_each_try_of_a_round_is_one_fault():
    quarantine = Quarantine()
    assert [quarantine.record("a", 1, "norm") for _ in range(5)] == [False] * 5
    assert [quarantine.record("a", version, "norm") for version in (2, 3)] == [False, True]


def test_a_device_that_takes_anothers_name_for_its_update_harms_nobody():
    screen = screening(comparison=False)
    stolen = message(deltas(1)[0], 1, update_id="device-0-7")
    assert isinstance(verdict_on(stolen, screen, device(1)), Screened)
    assert isinstance(verdict_on(message(deltas(1)[0], 0), screen), Screened)
    again = screening(comparison=False)
    again.restore(json.loads(json.dumps(screen.as_dict())))
    assert again.as_dict() == screen.as_dict()


def test_late_and_repeated_updates_are_no_faults():
    screen = screening(comparison=False)
    for _ in range(5):
        screen.receive(device(0), message(deltas(1)[0], 0))
        screen.receive(device(0), message(deltas(1)[0], 0, version=0))
    assert device(0) not in screen.quarantine


def test_old_faults_are_forgotten():
    quarantine = Quarantine(limit=2, window=10)
    assert not quarantine.record("a", 1, "norm")
    assert not quarantine.record("a", 11, "norm")
    assert quarantine.record("a", 20, "norm")
    assert "a" in quarantine
    assert not quarantine.release("b")


def test_what_outlives_a_round_goes_through_json():
    screen = screening(max_growth=1000)
    flats = deltas(6)
    flats[5] = with_parts(flats[5], delta=-flats[5][:TRAINED])
    run_round(screen, flats)
    again = screening(max_growth=1000)
    again.restore(json.loads(json.dumps(screen.as_dict())))
    assert again.as_dict() == screen.as_dict()
    assert again.quarantine.faults == {device(5): [VERSION]}
    again.begin(global_model(), MANIFEST, VERSION)
    assert again.receive(device(0), message(flats[0], 0))[0].reason == "repeated"
    boosted = with_parts(flats[0], delta=1000 * flats[0][:TRAINED])
    assert again.receive(device(7), message(boosted, 7)) == []
    assert reasons(again.close()) == ["norm"]


def test_replies_held_when_a_round_was_given_up_can_come_again():
    screen = screening()
    flat = deltas(1)[0]
    screen.receive(device(0), message(flat, 0))
    assert screen.as_dict()["seen"] == []
    screen.begin(global_model(), MANIFEST, VERSION)
    screen.receive(device(0), message(flat, 0))
    assert reasons(screen.close()) == ["passed"]


def attacked_round():
    """What arrives in a round of twelve honest devices and every kind of faulty one: (sender, bytes)."""
    flats = deltas(12, likeness=0.5)
    arrivals = [(device(index), message(flat, index)) for index, flat in enumerate(flats)]
    flat = flats[0]
    faulty = [
        {"payload": raw(with_parts(flat, delta=np.nan))},
        {"payload": raw(with_parts(flat, delta=np.inf))},
        {"payload": raw(flat)[:-40]},
        {"payload": raw(1000 * flat)},
        {"payload": raw(with_parts(flat, delta=-flat[:TRAINED]))},
        {"payload": raw(with_parts(flat, variances=-flat[MANIFEST.variances]))},
        {"weight": -5.0},
        {"version": 1},
        {"version": 9},
        {"manifest": small_manifest(unit_rows=["head.weight"])},
    ]
    for number, changes in enumerate(faulty, start=100):
        arrivals.insert(2 * (number - 100), (device(number), message(flat, number, **changes)))
    arrivals.append((device(110), b"\xff" * 1000))
    return arrivals


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_round_full_of_faults_ends_in_the_model_that_the_honest_devices_make(name, tmp_path):
    screen = screening()
    attacked, clean = AGGREGATORS[name]().build(tmp_path / "attacked"), AGGREGATORS[name]().build(tmp_path / "clean")
    for aggregator in (attacked, clean):
        aggregator.begin(global_model(), MANIFEST)
    rejected, passed = [], []
    verdicts = [verdict for sender, data in attacked_round() for verdict in screen.receive(sender, data)]
    for verdict in [*verdicts, *screen.close()]:
        (passed if isinstance(verdict, Screened) else rejected).append(verdict)
        if isinstance(verdict, Screened):
            attacked.add(verdict)
    assert sorted(one.device for one in passed) == sorted(device(index) for index in range(12))
    assert sorted(one.device for one in rejected) == [device(number) for number in range(100, 111)]
    assert all(one.detail for one in rejected)
    for one in sorted(passed, key=lambda one: one.device):
        clean.add(one)
    new = attacked.finish()
    assert np.isfinite(new).all()
    if name != "private_mean":
        np.testing.assert_allclose(new, clean.finish(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (ScreeningConfig, {"max_staleness": -1}),
        (ScreeningConfig, {"max_weight": 0.0}),
        (ScreeningConfig, {"max_growth": float("nan")}),
        (ComparisonConfig, {"replies": 3}),
        (ComparisonConfig, {"clip_multiple": 0.5}),
        (ComparisonConfig, {"clip_multiple": float("inf")}),
        (ComparisonConfig, {"min_cosine": 1.0}),
    ],
)
def test_settings_that_cannot_be_are_refused(kind, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        kind(**change)
