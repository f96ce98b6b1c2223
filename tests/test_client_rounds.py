"""How a round is made up: shares, steps and draws, each against a statement of what they are."""

from itertools import pairwise

import numpy as np
import pytest

from client.drift import DriftReading
from client.rounds import Budget, Round, RoundTask, compose, count_steps, draws, plan_round


def planned(new: int, memory: int, batch: int = 8, steps: int = 40, first_step: int = 100) -> Round:
    return plan_round(
        RoundTask(number=1),
        Budget(steps=steps),
        first_step=first_step,
        batch_size=batch,
        images=(new, memory),
        mu=None,
        reading=DriftReading(),
    )


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
def test_batches_are_as_full_as_images_allow_and_shared_out_as_asked(share):
    batch = 16
    for new in range(0, 24, 3):
        for memory in range(0, 40, 4):
            rows, replayed = compose(batch, share, new, memory)
            assert rows <= new
            assert replayed <= memory
            assert rows + replayed == min(batch, new + memory)
            if new >= batch and memory >= batch:
                assert rows == max(1, round(batch * share))
            if new:
                assert rows >= 1


def test_one_new_for_three_replayed():
    assert compose(64, 0.25, 500, 5000) == (16, 48)


def test_steps_are_passes_over_the_new_images_or_a_number():
    assert count_steps(Budget(epochs=2), 100, 300, 4, 12) == 50
    assert count_steps(Budget(epochs=0.5), 100, 300, 3, 12) == 17
    assert count_steps(Budget(steps=7), 100, 300, 4, 12) == 7
    assert count_steps(Budget(epochs=2, new_images=50), 0, 300, 0, 10) == 10  # replay alone
    for new, memory in ((0, 0), (1, 0), (0, 1)):
        rows = compose(16, 0.25, new, memory)
        assert count_steps(Budget(steps=7), new, memory, *rows) == 0


@pytest.mark.parametrize(("new", "memory"), [(20, 50), (5, 100), (30, 0), (0, 30), (3, 4)])
def test_no_image_comes_twice_in_a_batch_nor_again_before_all_came(new, memory):
    plan = planned(new, memory)
    batches = [draw.indices for draw in draws(plan, seed=3, start=0)]
    assert len(batches) == plan.steps
    for indices in batches:
        assert len(set(indices.tolist())) == len(indices) == plan.rows
        assert (indices[: plan.new_rows] < new).all()
        assert (indices[plan.new_rows :] >= new).all()
        assert (indices < new + memory).all()
    for rows, images, column in (
        (plan.new_rows, new, slice(plan.new_rows)),
        (plan.replayed_rows, memory, slice(plan.new_rows, None)),
    ):
        if rows:
            passes = images // rows
            for start in range(0, plan.steps - passes, passes):
                seen = np.concatenate([indices[column] for indices in batches[start : start + passes]])
                assert len(set(seen.tolist())) == len(seen)


def test_a_draw_is_a_function_of_seed_round_and_step():
    plan = planned(20, 50)
    straight = list(draws(plan, seed=3, start=0))
    for start in (1, 7, 39, 40):
        for draw, expected in zip(draws(plan, seed=3, start=start), straight[start:], strict=True):
            assert draw.epoch == expected.epoch
            np.testing.assert_array_equal(draw.indices, expected.indices)
    epochs = [draw.epoch for draw in straight]
    assert all(later == earlier + 1 for earlier, later in pairwise(epochs))
    for other in (draws(planned(20, 50, first_step=140), seed=3, start=0), draws(plan, seed=4, start=0)):
        assert any(not np.array_equal(a.indices, b.indices) for a, b in zip(other, straight, strict=True))


def test_a_round_goes_through_a_dictionary():
    from dataclasses import asdict

    plan = planned(20, 50)
    assert Round.from_dict(asdict(plan)) == plan


@pytest.mark.parametrize("values", [{"new_share": 0.0}, {"epochs": 0.0}, {"steps": 0}, {"new_images": 0}])
def test_values_out_of_range_are_named(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Budget(**values)
