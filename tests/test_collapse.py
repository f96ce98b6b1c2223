"""Each sign of collapse is called by its name, with a knob to turn, and a healthy run has none."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_pretrain import arguments, photographs, recipe_file

from lowssl_core.collapse import find_collapse
from lowssl_core.journal import read_metrics
from lowssl_core.methods import METHODS
from lowssl_core.methods.method import feature_signals, target_signals
from lowssl_core.pretrain import main

CHANCE = math.log(64)
HEALTHY = {"feature_std": 0.8, "target_entropy": 0.5, "prototypes_used": 0.6}


def names(loss: float, **signals: float) -> list[str]:
    return [symptom.name for symptom in find_collapse(loss, CHANCE, HEALTHY | signals)]


def names_of(signals: dict[str, torch.Tensor]) -> list[str]:
    """The symptoms of what a method would report, its loss far from chance."""
    return [symptom.name for symptom in find_collapse(1.0, CHANCE, {k: float(v) for k, v in signals.items()})]


# Constructed signals


def test_a_healthy_stretch_has_no_symptom():
    assert names(2.0) == []
    assert find_collapse(2.0, CHANCE, {}) == []
    assert names(2.0, feature_std=0.03, target_entropy=0.99, prototypes_used=0.06) == []
    assert names(2.0, target_entropy=0.006) == []


@pytest.mark.parametrize(
    ("loss", "signals", "name", "knob"),
    [
        (2.0, {"feature_std": 0.0}, "constant features", "optim.base_lr"),
        (2.0, {"target_entropy": 1.0}, "uniform targets", "method.teacher_temperature"),
        (2.0, {"target_entropy": 0.0}, "one-hot targets", "method.teacher_temperature"),
        (2.0, {"prototypes_used": 0.01}, "few prototypes", "method.center_momentum"),
        (CHANCE, {}, "loss at chance", "optim.base_lr"),
    ],
)
def test_each_symptom_alone_is_named_with_its_cause_and_a_knob(loss, signals, name, knob):
    (symptom,) = find_collapse(loss, CHANCE, HEALTHY | signals)
    assert symptom.name == name
    assert "Usual cause" in symptom.message
    assert knob in symptom.message
    assert "\n" not in symptom.message


def test_a_loss_beside_chance_is_not_at_it():
    assert names(CHANCE * 1.01) == []
    assert names(CHANCE * 0.99) == []
    assert names(CHANCE * 1.001) == ["loss at chance"]


def test_several_symptoms_are_all_named():
    assert set(names(CHANCE, feature_std=0.0, target_entropy=1.0)) == {
        "constant features",
        "uniform targets",
        "loss at chance",
    }


# What methods report of constructed tensors


def test_the_same_features_for_all_images_are_constant():
    row = torch.randn(1, 1, 32)
    assert names_of(feature_signals(row.expand(2, 8, 32))) == ["constant features"]
    assert names_of(feature_signals(row + 1e-3 * torch.randn(2, 8, 32))) == ["constant features"]
    assert names_of(feature_signals(torch.randn(2, 8, 32))) == []


def test_targets_without_and_with_all_information_are_named():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 24, 64, generator=generator)
    assert names_of(target_signals((0.01 * scores).softmax(dim=-1))) == ["uniform targets"]
    assert names_of(target_signals((1000 * scores).softmax(dim=-1))) == ["one-hot targets"]
    assert names_of(target_signals((4 * scores).softmax(dim=-1))) == []


def test_one_output_that_wins_everywhere_is_named():
    scores = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(0))
    scores[..., 5] += 6
    assert names_of(target_signals(scores.softmax(dim=-1))) == ["few prototypes"]


# Real runs


def warnings_of(tmp_path: Path, method: str, data: str, *settings: str) -> dict[str, int]:
    """The warnings of a short run: their names and the steps they came at."""
    more = [part for setting in settings for part in ("--set", setting)]
    more += ["--set", "monitor.quality_every_epochs=0"]
    assert main(arguments(recipe_file(tmp_path, method), data, tmp_path / "run", *more)) == 0
    rows = read_metrics(tmp_path / "run", "warning")
    assert len({row["name"] for row in rows}) == len(rows)  # each is told once
    return {row["name"]: row["step"] for row in rows}


@pytest.mark.parametrize("method", METHODS)
def test_a_healthy_run_warns_of_nothing(method, tmp_path):
    assert warnings_of(tmp_path, method, photographs(tmp_path / "images")) == {}


def test_a_run_with_uniform_targets_is_warned_of_them(tmp_path, capsys):
    data = photographs(tmp_path / "images")
    soft = ("method.teacher_temperature_start=50", "method.teacher_temperature=50", "method.student_temperature=50")
    warnings = warnings_of(tmp_path, "dino", data, *soft)
    # It must last for three stretches before it is called collapse.
    assert warnings == {"uniform targets": 3, "loss at chance": 3}
    shown = capsys.readouterr().out
    assert "WARNING at step 3: uniform targets" in shown
    assert "method.teacher_temperature" in shown


def test_a_run_with_targets_too_sharp_is_warned_of_them(tmp_path):
    data = photographs(tmp_path / "images")
    sharp = ("method.teacher_temperature_start=1e-5", "method.teacher_temperature=1e-5")
    assert warnings_of(tmp_path, "dino", data, *sharp).keys() == {"one-hot targets"}


def test_a_run_on_one_picture_again_and_again_is_warned_of_what_it_learns(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(32):
        Image.fromarray(np.full((32, 32, 3), 128, dtype=np.uint8)).save(tmp_path / "images" / f"{i}.jpg")
    plain = ("jitter_probability=0", "gray_probability=0", "solarize_probability=[0.0, 0.0, 0.0]")
    settings = [f"views.photometric.{setting}" for setting in plain]
    settings += ["data.batch_size=32", "epochs=4", "method.outputs=64"]
    warnings = warnings_of(tmp_path, "dino", str(tmp_path / "images"), *settings)
    assert {"constant features", "few prototypes"} <= warnings.keys()
