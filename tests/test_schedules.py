"""Schedules against their formulas, written out for each step."""

import math

import pytest

from lowssl_core.schedules import Progress, cosine


def oracle_cosine(step, total, *, start, end, warmup, warmup_start):
    """Linear from `warmup_start` to `start` over `warmup` steps, then half a cosine period to `end`."""
    if step < warmup:
        return warmup_start + (start - warmup_start) * step / warmup
    share_done = (step - warmup) / (total - warmup)
    return end + (start - end) * (1 + math.cos(math.pi * share_done)) / 2


SCHEDULES = {
    "lr of DINO, CNN, batch 1024": (0.48 * 1024 / 256, 0.0048, 10, 0.0),
    "lr of DINO, ViT": (0.0005 * 1024 / 256, 1e-5, 10, 0.0),
    "lr of SwAV, whose warm-up does not start at 0": (0.3 * 1024 / 256, 0.0048, 10, 0.075),
    "weight decay of DINO, ViT, which rises": (0.04, 0.4, 0, 0.0),
    "teacher momentum, which rises": (0.996, 1.0, 0, 0.0),
    "a warm-up from above": (0.1, 0.01, 5, 0.5),
}


@pytest.mark.parametrize(("start", "end", "warmup", "warmup_start"), SCHEDULES.values(), ids=SCHEDULES.keys())
def test_cosine_is_its_formula_at_every_step(start, end, warmup, warmup_start):
    total = 97
    for step in range(total):
        expected = oracle_cosine(step, total, start=start, end=end, warmup=warmup, warmup_start=warmup_start)
        got = cosine(step, total, start, end, warmup_steps=warmup, warmup_start=warmup_start)
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_cosine_passes_through_its_named_values():
    assert cosine(0, 110, 0.9, 0.1, warmup_steps=10, warmup_start=0.3) == pytest.approx(0.3)
    assert cosine(5, 110, 0.9, 0.1, warmup_steps=10, warmup_start=0.3) == pytest.approx(0.6)
    assert cosine(10, 110, 0.9, 0.1, warmup_steps=10, warmup_start=0.3) == pytest.approx(0.9)
    assert cosine(60, 110, 0.9, 0.1, warmup_steps=10, warmup_start=0.3) == pytest.approx(0.5)
    assert cosine(110, 110, 0.9, 0.1, warmup_steps=10, warmup_start=0.3) == pytest.approx(0.1)


def test_cosine_without_warmup_starts_at_start():
    assert cosine(0, 50, 0.996, 1.0) == pytest.approx(0.996, rel=1e-15)
    assert cosine(49, 50, 0.996, 1.0) < 1.0


def test_cosine_warms_up_from_zero_unless_told_otherwise():
    assert cosine(0, 50, 2.0, 0.1, warmup_steps=4) == 0.0
    assert cosine(1, 50, 2.0, 0.1, warmup_steps=4) == pytest.approx(0.5)


def test_cosine_never_turns_back_after_its_warmup():
    values = [cosine(step, 80, 1.92, 0.0048, warmup_steps=8) for step in range(80)]
    assert values[:9] == sorted(values[:9])
    assert values[8:] == sorted(values[8:], reverse=True)
    assert max(values) == values[8] == pytest.approx(1.92)


def test_cosine_with_equal_ends_is_constant_after_its_warmup():
    for step in range(3, 20):
        assert cosine(step, 20, 0.7, 0.7, warmup_steps=3) == pytest.approx(0.7, rel=1e-15)


def test_an_epoch_lasts_steps_per_epoch_steps():
    epochs = [Progress(step=step, total_steps=12, steps_per_epoch=4).epoch for step in range(12)]
    assert epochs == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
