"""`lowssl-pretrain` through its front door: a good run's files, wrong input, bad images, numbers that are none."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import sklearn.datasets
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lowssl_core.run
from lowssl_core.checkpoint import backbone_state, load_checkpoint
from lowssl_core.encoder import load_encoder
from lowssl_core.journal import read_metrics
from lowssl_core.pretrain import main
from lowssl_core.recipe import recipe_names

STEPS, EPOCHS, BATCH = 6, 2, 4

RECIPE = """
epochs = 2
alpha = 0.4
[backbone]
name = "resnet_tiny"
[views]
global_size = 24
num_locals = 2
local_size = "matched"
[data]
batch_size = 4
[optim]
warmup_steps = 2
[monitor]
log_every_steps = 1
quality_every_epochs = 1
quality_images = 6
"""
METHODS = {
    "dino": 'name = "dino"\nhidden = 24\nbottleneck = 10\noutputs = 14',
    "swav": 'name = "swav"\nhidden = 24\noutputs = 10\nprototypes = 14\nqueue_length = 8\nqueue_start_epoch = 1',
    "moco": 'name = "moco"\nhidden = 24\noutputs = 10\nqueue_length = 14',
}


def photographs(folder: Path, count: int = STEPS * BATCH) -> str:
    """A folder of small JPEGs, cut from the photographs that scikit-image and scikit-learn ship."""
    folder.mkdir(parents=True)
    pictures = [skimage.data.astronaut(), skimage.data.coffee(), *sklearn.datasets.load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in range(count):
        picture = pictures[i % len(pictures)]
        top, left = (int(rng.integers(side - 40)) for side in picture.shape[:2])
        Image.fromarray(picture[top : top + 32, left : left + 40]).save(folder / f"{i:03d}.jpg", quality=90)
    return str(folder)


def recipe_file(folder: Path, method: str = "dino") -> str:
    path = folder / f"{method}.toml"
    path.write_text(f"{RECIPE}[method]\n{METHODS[method]}\n")
    return str(path)


def arguments(recipe: str, data: object, out: object, *more: str) -> list[str]:
    return [recipe, "--data", str(data), "--out", str(out), "--device", "cpu", "--workers", "0", *more]


def refusal(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line that a wrong input gives, and status 2."""
    capsys.readouterr()
    assert main(argv) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("lowssl-pretrain: ")
    return lines[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("images") / "unlabelled")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return recipe_file(tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def good_run(tmp_path_factory, recipe):
    """The folder of a run to its end, on images in class folders."""
    root = tmp_path_factory.mktemp("good")
    photographs(root / "images" / "even")
    for path in sorted((root / "images" / "even").iterdir())[1::2]:
        path.rename(root / "images" / path.name)
    (root / "images" / "odd").mkdir()
    for path in (root / "images").glob("*.jpg"):
        path.rename(root / "images" / "odd" / path.name)
    assert main(arguments(recipe, root / "images", root / "run")) == 0
    return root / "run"


@pytest.fixture
def copy_of_good_run(good_run, tmp_path):
    """A copy to be spoilt, beside the data it was trained on."""
    return Path(shutil.copytree(good_run, tmp_path / "run")), good_run.parent / "images"


# A good run


def test_a_run_records_its_start_each_step_its_quality_and_its_end(good_run):
    rows = [json.loads(line) for line in (good_run / "metrics.jsonl").read_text().splitlines()]
    assert Counter(row["kind"] for row in rows) == {"start": 1, "train": 12, "quality": 3, "end": 1}
    start, end = rows[0], rows[-1]
    assert (start["kind"], end["kind"]) == ("start", "end")
    assert start["data"]["images"] == 24
    assert start["views"]["ratio"] == pytest.approx(1, abs=0.15)  # pixels are whole: a matched size is rounded
    assert start["views"]["local_size"] == start["views"]["matched_size"]
    assert start["versions"]["torch"] == torch.__version__
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 13))
    assert [row["images"] for row in train] == list(range(4, 52, 4))
    assert [row["epoch"] for row in train] == pytest.approx(np.arange(1, 13) / 6)
    assert all(np.diff([row["seconds"] for row in train]) > 0)
    for row in train:
        assert row["loss"] == pytest.approx(0.4 * row["global_loss"] + 0.6 * row["local_loss"], rel=1e-5)
        assert row["images_per_second"] == pytest.approx(BATCH / row["seconds_per_step"])
        assert 0 <= row["waiting"] <= 1
        assert 0 <= row["target_entropy"] <= 1.0001
    assert end["step"] == 12


def test_quality_is_measured_before_along_and_after_a_run(good_run):
    quality = read_metrics(good_run, "quality")
    assert [row["step"] for row in quality] == [0, 6, 12]
    for row in quality:
        assert {"rankme", "retrieval", "knn"} <= row.keys()
    assert {"teacher_rankme", "teacher_retrieval", "teacher_knn"} <= quality[-1].keys()


def test_tensorboard_shows_what_the_metrics_say(good_run):
    events = EventAccumulator(str(good_run / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(row["step"], pytest.approx(row["loss"])) for row in read_metrics(good_run, "train")]
    assert [event.step for event in events.Scalars("quality/retrieval")] == [0, 6, 12]


def test_the_encoder_is_the_trained_backbone_and_says_where_it_comes_from(good_run, recipe):
    checkpoint = load_checkpoint(good_run / "checkpoint.safetensors")
    encoder = load_encoder(good_run / "encoder.safetensors")
    weights = encoder.backbone.state_dict()
    expected = backbone_state(checkpoint, "student")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    info = encoder.info
    assert (info.method, info.backbone, info.branch) == ("dino", "resnet_tiny", "student")
    assert (info.images_seen, info.size) == (48, 24)
    assert info.recipe_hash == checkpoint.recipe.hash() == read_metrics(good_run, "start")[0]["recipe"]


def test_the_checkpoint_is_of_the_last_step_and_tells_of_the_run(good_run):
    checkpoint = load_checkpoint(good_run / "checkpoint.safetensors")
    assert checkpoint.progress.is_done
    assert checkpoint.progress.step == 12
    assert checkpoint.facts["data"]["images"] == 24
    assert checkpoint.facts["views"]["ratio"] == read_metrics(good_run, "start")[0]["views"]["ratio"]
    assert all(value.isfinite().all() for value in checkpoint.tensors.values())


def test_a_run_tells_its_story_in_plain_lines_where_there_is_no_terminal(data, recipe, tmp_path, capsys):
    assert main(arguments(recipe, data, tmp_path / "run", "--set", "epochs=1")) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "dino on resnet_tiny" in captured.out
    assert "mean(PS_l / PS_g)" in captured.out
    assert "6 steps of 4 images, 1 epochs, on 1 x cpu" in captured.out
    assert "step 6/6  loss" in captured.out
    assert captured.out.splitlines()[-1].startswith(f"done: {tmp_path / 'run' / 'encoder.safetensors'}")
    assert "\x1b" not in captured.out
    # These images have no labels.
    assert not any("knn" in row for row in read_metrics(tmp_path / "run", "quality"))


def test_a_finished_run_resumed_is_left_as_it_is(copy_of_good_run, recipe, capsys):
    run, images = copy_of_good_run
    before = (run / "checkpoint.safetensors").read_bytes()
    assert main(arguments(recipe, images, run, "--resume")) == 0
    assert "complete already" in capsys.readouterr().out
    assert (run / "checkpoint.safetensors").read_bytes() == before
    assert len(read_metrics(run, "train")) == 12
    assert len(read_metrics(run, "end")) == 1


def test_resuming_where_there_is_nothing_starts_anew(data, recipe, tmp_path, capsys):
    assert main(arguments(recipe, data, tmp_path / "run", "--resume", "--set", "epochs=1")) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors").progress.step == 6


def test_quality_is_judged_on_images_held_out_where_there_are_some(data, recipe, tmp_path):
    held_out = photographs(tmp_path / "held_out", count=7)
    more = ("--eval-data", held_out, "--set", "epochs=1", "--set", "monitor.quality_images=7")
    assert main(arguments(recipe, data, tmp_path / "run", *more)) == 0
    for row in read_metrics(tmp_path / "run", "quality"):
        assert row["retrieval"] * 7 == pytest.approx(round(row["retrieval"] * 7))


# Wrong input


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("--data", "nowhere/at/all"), "nowhere/at/all"),
        (("--data", "{empty}"), "{empty}"),
        (("--data", "{recipe}"), "{recipe}"),
        (("--eval-data", "nowhere"), "nowhere"),
        (("--out", "{recipe}"), "--out {recipe}"),
        (("--out", "{recipe}/below"), "--out {recipe}/below"),
        (("--device", "abacus"), "--device abacus"),
        (("--device", "cuda:77"), "--device cuda:77"),
        (("--workers", "-1"), "--workers"),
        (("--set", "optim.lr=1"), "unknown key optim.lr"),
        (("--set", "optim.base_lr=-1"), "optim.base_lr is -1"),
        (("--set", "epochs"), "wanted key=value"),
        (("--set", "data.batch_size=25"), "batch"),
        (("--set", "backbone.name=resnt"), "'resnt'"),
        (("--set", "backbone.name=test_vit"), "views.global_size is 24"),
    ],
)
def test_a_wrong_input_is_one_line_and_status_2(change, expected, data, recipe, tmp_path, capsys):
    places = {"empty": tmp_path / "empty", "recipe": recipe}
    places["empty"].mkdir()
    change = [part.format(**places) for part in change]
    assert expected.format(**places) in refusal(capsys, arguments(recipe, data, tmp_path / "run", *change))
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_an_unknown_recipe_is_refused_with_the_names_there_are(data, tmp_path, capsys):
    line = refusal(capsys, arguments("dino-resnet50", data, tmp_path / "run"))
    assert all(name in line for name in recipe_names())


def test_a_queue_shorter_than_a_batch_is_refused(data, tmp_path, capsys):
    argv = arguments(recipe_file(tmp_path, "moco"), data, tmp_path / "run", "--set", "method.queue_length=3")
    assert "method.queue_length is 3" in refusal(capsys, argv)


@pytest.mark.parametrize("argv", [[], ["dino-resnet18-matched"], ["a", "--data", "b", "--out", "c", "--views", "gpu"]])
def test_a_wrong_command_line_shows_how_it_is_used(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: lowssl-pretrain" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_written_over(good_run, data, recipe, capsys):
    before = (good_run / "checkpoint.safetensors").read_bytes()
    line = refusal(capsys, arguments(recipe, data, good_run))
    assert "--resume" in line
    assert str(good_run) in line
    assert (good_run / "checkpoint.safetensors").read_bytes() == before


def test_a_run_is_not_resumed_with_another_recipe(copy_of_good_run, recipe, capsys):
    run, images = copy_of_good_run
    line = refusal(capsys, arguments(recipe, images, run, "--resume", "--set", "optim.base_lr=0.1"))
    assert "optim.base_lr: 0.48, 0.1" in line


def test_a_run_is_not_resumed_with_other_data(copy_of_good_run, recipe, tmp_path, capsys):
    run, _ = copy_of_good_run
    fewer = photographs(tmp_path / "fewer", count=20)
    line = refusal(capsys, arguments(recipe, fewer, run, "--resume"))
    assert "has 20 images" in line
    assert "had 24" in line


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_not_resumed(damage, copy_of_good_run, recipe, capsys):
    run, images = copy_of_good_run
    path = run / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 4
    path.write_bytes({"cut": content[: len(content) // 2], "flipped": content, "empty": b""}[damage])
    line = refusal(capsys, arguments(recipe, images, run, "--resume"))
    assert str(path) in line
    assert "damaged" in line


# Bad images


def test_a_few_bad_images_are_set_aside_and_named(recipe, tmp_path, capsys):
    images = photographs(tmp_path / "images")
    (tmp_path / "images" / "005.jpg").write_bytes(b"no image")
    more = ("--set", "data.max_bad_fraction=0.05", "--set", "epochs=1")
    assert main(arguments(recipe, images, tmp_path / "run", *more)) == 0
    (row,) = read_metrics(tmp_path / "run", "set_aside")
    assert [Path(name).name for name in row["images"]] == ["005.jpg"]
    assert "1 unusable image" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "run", "train")) == 6


def test_more_than_one_percent_of_bad_images_stop_a_run_with_their_list(recipe, tmp_path, capsys):
    images = photographs(tmp_path / "images")
    (tmp_path / "images" / "005.jpg").write_bytes(b"no image")
    line = refusal(capsys, arguments(recipe, images, tmp_path / "run"))
    assert "1 of 24 images" in line
    assert "005.jpg" in line


# Numbers that are none, and signals


def spoil(monkeypatch, step, *, part="online.backbone", signal_number=None):
    """Make NaN of a part's weights after `step`, whose own loss is still a number, and send a signal then."""
    train = lowssl_core.run.train

    def spoilt(method, *args, **options):
        for report in train(method, *args, **options):
            if report.progress.step == step:
                if part:
                    next(method.get_submodule(part).parameters()).data.fill_(torch.nan)
                if signal_number:
                    os.kill(os.getpid(), signal_number)
            yield report

    monkeypatch.setattr(lowssl_core.run, "train", spoilt)


def test_a_learning_rate_far_too_high_stops_the_run_and_leaves_a_report(data, recipe, tmp_path, capsys):
    run = tmp_path / "run"
    more = ("--set", "optim.name=sgd", "--set", "optim.base_lr=1e38", "--set", "optim.warmup_steps=0")
    assert main(arguments(recipe, data, run, *more)) == 1
    report = json.loads((run / "nonfinite.json").read_text())
    assert not np.isfinite(float(report["loss"]))
    assert report["step"] == 2
    assert report["learning_rate"] > 1e35
    (warning,) = read_metrics(run, "warning")
    assert warning["name"] == "not a number"
    assert "optim.base_lr" in warning["message"]
    assert "no checkpoint was written" in warning["message"]
    assert str(run / "nonfinite.json") in capsys.readouterr().out
    assert not (run / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    ("method", "part", "step", "signal_number"),
    [
        ("dino", "online.backbone", 8, None),  # the next step's loss tells
        ("dino", "online.backbone", 12, None),  # at the end of an epoch nothing but the weights tells
        ("dino", "teacher.head", 12, None),
        ("swav", "prototypes", 12, None),
        ("moco", "online.head", 8, signal.SIGTERM),  # as the run is told to save and stop
    ],
)
def test_weights_that_are_no_numbers_never_replace_a_good_checkpoint(
    method, part, step, signal_number, data, tmp_path, monkeypatch
):
    spoil(monkeypatch, step, part=part, signal_number=signal_number)
    run = tmp_path / "run"
    assert main(arguments(recipe_file(tmp_path, method), data, run)) == 1
    checkpoint = load_checkpoint(run / "checkpoint.safetensors")
    assert checkpoint.progress.step == 6
    assert all(value.isfinite().all() for value in checkpoint.tensors.values())
    assert (run / "nonfinite.json").exists()
    (warning,) = read_metrics(run, "warning")
    assert str(run / "checkpoint.safetensors") in warning["message"]


@pytest.mark.parametrize(("signal_number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(
    signal_number, status, data, recipe, tmp_path, monkeypatch, capsys
):
    handler = signal.getsignal(signal_number)
    spoil(monkeypatch, 8, part=None, signal_number=signal_number)
    assert main(arguments(recipe, data, tmp_path / "run")) == status
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors").progress.step == 8
    assert signal.getsignal(signal_number) is handler
    assert f"stopped by {signal.Signals(signal_number).name} at step 8" in capsys.readouterr().out
    assert not read_metrics(tmp_path / "run", "end")
