"""What the reports between two lines of metrics come to."""

import pytest
import torch

from lowssl_core.schedules import Progress
from lowssl_core.stretch import Stretch
from lowssl_core.train import Report


def report(step: int, loss: float) -> Report:
    return Report(
        progress=Progress(step=step, total_steps=10, steps_per_epoch=5),
        loss=torch.tensor(loss),
        global_loss=torch.tensor(loss + 1),
        local_loss=torch.tensor(loss - 1),
        signals={"feature_std": torch.tensor(float(step))},
        learning_rate=0.1 * step,
        weight_decay=0.5,
        waited=0.25,
        seconds=1.0,
    )


def stretch_of(*losses: float) -> Stretch:
    stretch = Stretch()
    for step, loss in enumerate(losses, start=1):
        stretch.add(report(step, loss))
    return stretch


def test_a_stretch_gives_means_and_speeds_once() -> None:
    stretch = stretch_of(2.0, 4.0)
    row = stretch.take(batch_size=8)
    assert row == pytest.approx(
        {
            "loss": 3,
            "global_loss": 4,
            "local_loss": 2,
            "feature_std": 1.5,
            "learning_rate": 0.15,
            "weight_decay": 0.5,
            "images_per_second": 8,
            "seconds_per_step": 1,
            "waiting": 0.25,
        }
    )
    assert len(stretch) == 0


def test_the_first_loss_that_is_no_number_is_found() -> None:
    assert stretch_of(1.0, 2.0).is_finite()
    stretch = stretch_of(1.0, float("inf"), float("nan"))
    assert not stretch.is_finite()
    assert stretch.first_bad().progress.step == 2
