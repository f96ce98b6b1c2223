"""The diagnosis: what it trains and says, and sweeps through its front door: stopped, resumed and misused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from lowssl_core.command_line import main
from lowssl_core.diagnosis.figure import diagnosis_figure
from lowssl_core.diagnosis.outcome import Level, Outcome, Trained
from lowssl_core.diagnosis.plan import DiagnosisOptions, default_alpha_of, plan
from lowssl_core.encoder import load_encoder
from lowssl_core.losses import default_alpha
from lowssl_core.recipe import load_recipe, recipe_names
from lowssl_core.schedules import Progress
from lowssl_core.views import Measurement, Views, pixel_scale_ratio

HEIGHT, WIDTH, BATCH = 32, 40, 4
PATIENCE = 120.0
RECIPE = """
epochs = {epochs}
alpha = {alpha}
[method]
name = "{method}"
hidden = 24
{knobs}
[backbone]
name = "resnet_tiny"
[views]
global_size = 24
num_locals = 3
[data]
batch_size = 4
[optim]
warmup_steps = 2
[monitor]
log_every_steps = 1
quality_every_epochs = 0
quality_images = 6
"""
KNOBS = {
    "dino": "bottleneck = 10\noutputs = 14",
    "swav": "outputs = 10\nprototypes = 14\nqueue_length = 8",
    "moco": "outputs = 10\nqueue_length = 14",
}


def recipe_file(folder: Path, method: str = "dino", alpha: float = 0.4, epochs: int = 1) -> str:
    path = folder / f"{method}-{alpha}-{epochs}.toml"
    path.write_text(RECIPE.format(method=method, knobs=KNOBS[method], alpha=alpha, epochs=epochs))
    return str(path)


def photographs(root: Path, count: int = 12) -> str:
    """Splits of two classes: tiles of two photographs, other tiles for the test split."""
    rng = np.random.default_rng(0)
    for name, picture in (("astronaut", skimage.data.astronaut()), ("coffee", skimage.data.coffee())):
        for split, images in (("train", count), ("test", 4)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                top, left = (int(rng.integers(side - WIDTH)) for side in picture.shape[:2])
                tile = picture[top : top + HEIGHT, left : left + WIDTH]
                Image.fromarray(tile).save(folder / f"{i:02d}.png")
    return str(root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("diagnosis")
    photographs(root / "images")
    return root


def options(root: Path, kind: str, recipe: str, **more: object) -> DiagnosisOptions:
    usual = {"overrides": (), "eval_data": None, "values": None, "seeds": 1, "device": "cpu"}
    return DiagnosisOptions(
        kind=kind,
        recipe=recipe,
        data=str(root / "images"),
        out=root,
        json=root / "j.json",
        **(usual | more),  # type: ignore[arg-type]
    )


def test_crop_scales_are_swept_with_pixel_scales_kept_equal(root: Path) -> None:
    sweep = plan(options(root, "crop-scale", recipe_file(root)))
    assert [swept.value for swept in sweep.swept] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert [swept.is_own for swept in sweep.swept] == [False, False, True, False, False, False]
    for swept in sweep.swept:
        views = swept.recipe.views
        assert views.global_scale == (swept.value, 1.0)
        assert views.local_scale == (0.05, swept.value)
        # Half a pixel of a local view is what rounding to whole sizes may leave of the match.
        assert (1 - 0.5 / views.local_size) ** 2 <= swept.measurement.ratio <= (1 + 0.5 / views.local_size) ** 2
        own_views = dataclasses.replace(
            views, global_scale=(0.3, 1.0), local_scale=(0.05, 0.3), local_size=sweep.own.views.local_size
        )
        assert dataclasses.replace(swept.recipe, views=own_views) == sweep.own


def test_local_sizes_are_swept_and_their_ratios_are_the_sampler_s(root: Path) -> None:
    sweep = plan(options(root, "pixel-scale", recipe_file(root)))
    sizes = [swept.recipe.views.local_size for swept in sweep.swept]
    ratios = [swept.measurement.ratio for swept in sweep.swept]
    assert sizes == sorted(set(sizes)) == [swept.value for swept in sweep.swept]
    assert ratios == sorted(ratios, reverse=True)
    assert min(ratios) < 0.6
    assert max(ratios) > 2.5
    assert sum(swept.is_own for swept in sweep.swept) == 1
    for size, ratio in zip(sizes, ratios, strict=True):
        assert ratio == pytest.approx(
            pixel_scale_ratio(np.array([[HEIGHT, WIDTH]]), global_size=24, local_size=size), rel=1e-9
        )


def test_sizes_of_a_transformer_are_swept_on_its_grid(root: Path) -> None:
    sweep = plan(options(root, "pixel-scale", "dino-vit-tiny-matched"))
    assert {96, 128, 176} <= {swept.value for swept in sweep.swept}
    assert all(swept.value % 16 == 0 and swept.value <= 224 for swept in sweep.swept)


@pytest.mark.parametrize("method", KNOBS)
def test_the_default_alpha_is_that_of_the_pairs_a_method_makes(root: Path, method: str) -> None:
    recipe = load_recipe(recipe_file(root, method))
    views = Views([torch.randn(BATCH, 3, 24, 24) for _ in range(2)], [torch.randn(BATCH, 3, 14, 14) for _ in range(3)])
    pairs = recipe.method.build(recipe.backbone, BATCH)(views, Progress(step=0, total_steps=4, steps_per_epoch=4))
    assert default_alpha_of(recipe) == default_alpha(len(pairs.global_pairs), len(pairs.local_pairs))


def test_alphas_hold_the_default_and_the_recipe_s_own(root: Path) -> None:
    sweep = plan(options(root, "alpha", recipe_file(root, alpha=0.35)))
    assert [swept.value for swept in sweep.swept] == [0, 0.2, 0.25, 0.35, 0.4, 0.6, 0.8, 1]
    assert [swept.value for swept in sweep.swept if swept.is_own] == [0.35]
    assert {swept.recipe.views for swept in sweep.swept} == {sweep.own.views}


@pytest.mark.parametrize("name", [name for name in recipe_names() if "baseline" in name])
def test_a_baseline_s_own_alpha_is_the_default_formulation(root: Path, name: str) -> None:
    sweep = plan(options(root, "alpha", name))
    own = [swept.value for swept in sweep.swept if swept.is_own]
    assert own == [default_alpha_of(sweep.own)] == [1 / (1 + sweep.own.views.num_locals)]


@pytest.mark.parametrize("kind", ["crop-scale", "pixel-scale", "alpha"])
def test_what_is_trained_is_what_is_planned(root: Path, kind: str) -> None:
    path = recipe_file(root)
    sweep = plan(options(root, kind, path, seeds=2, overrides=["seed=5"]))
    trainings = list(sweep.trainings())
    assert [seed for _, seed in trainings] == [5] * len(sweep.swept) + [6] * len(sweep.swept)
    for swept, seed in trainings:
        trained = load_recipe(path, ["seed=5", *swept.overrides(seed)])
        assert trained == dataclasses.replace(swept.recipe, seed=seed)
    assert len({sweep.folder(*training) for training in trainings}) == len(trainings)


def command(root: Path, kind: str, out: Path, *more: str, epochs: int = 1) -> list[str]:
    data = str(root / "images")
    return [
        "diagnose",
        kind,
        recipe_file(root, epochs=epochs),
        "--data",
        data,
        "--out",
        str(out),
        "--device",
        "cpu",
        *more,
    ]


@pytest.fixture(scope="module")
def straight(root: Path) -> Path:
    """The folder of a sweep of two sizes with two seeds that was never stopped."""
    out = root / "straight"
    assert main(command(root, "pixel-scale", out, "--values", "9", "14", "--seeds", "2", epochs=3)) == 0
    return out


def numbers(path: Path) -> dict[str, object]:
    """A sweep's JSON but for the time that it took."""
    document = json.loads(path.read_text())
    for level in document["levels"]:
        for trained in level["trained"].values():
            assert trained.pop("seconds") > 0
    del document["recipe"]
    return document


def test_a_sweep_s_json_has_every_training_and_its_means(straight: Path) -> None:
    document = json.loads((straight / "pixel-scale.json").read_text())
    assert [level["views"]["local_size"] for level in document["levels"]] == [14, 9]
    for level in document["levels"]:
        assert level["x"] == level["views"]["ratio"]
        assert set(level["trained"]) == {"0", "1"}
        for measure in ("knn", "retrieval", "rankme", "lidar"):
            each = [trained["measures"][measure] for trained in level["trained"].values()]
            assert level["mean"][measure] == pytest.approx(sum(each) / 2)
        for trained in level["trained"].values():
            encoder = load_encoder(straight / trained["run"] / "encoder.safetensors")
            assert encoder.info.recipe_hash == trained["recipe_hash"]
    assert set(document["yardsticks"]) == {"untrained", "raw pixels"}
    assert not list(straight.glob("runs/*/features"))
    with Image.open(straight / "pixel-scale.png") as figure:
        figure.verify()


def test_a_finished_sweep_is_told_again_without_training(
    root: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = numbers(straight / "pixel-scale.json")
    assert main(command(root, "pixel-scale", straight, "--values", "9", "14", "--seeds", "2", epochs=3)) == 0
    printed = capsys.readouterr().out
    assert "training 1" not in printed
    assert "14 px" in printed
    assert numbers(straight / "pixel-scale.json") == before


def test_a_sweep_killed_in_the_middle_of_a_training_ends_with_the_numbers_of_a_straight_one(
    root: Path, straight: Path, tmp_path: Path
) -> None:
    argv = command(root, "pixel-scale", tmp_path, "--values", "9", "14", "--seeds", "2", epochs=3)
    process = subprocess.Popen(
        [sys.executable, "-m", "lowssl_core.command_line", *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    began = time.monotonic()
    while not (second := second_training(tmp_path)) and process.poll() is None and time.monotonic() - began < PATIENCE:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    try:
        printed, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    assert "1 of 4 trainings are finished; the same command goes on from here" in printed
    assert second
    assert (second / "checkpoint.safetensors").exists()
    assert not (second / "encoder.safetensors").exists()
    # What there is of a stopped sweep is drawn.
    unfinished = json.loads((tmp_path / "pixel-scale.json").read_text())
    assert [len(level["trained"]) for level in unfinished["levels"]] == [0, 1]
    assert (tmp_path / "pixel-scale.png").stat().st_size > 0
    assert main(argv) == 0
    assert numbers(tmp_path / "pixel-scale.json") == numbers(straight / "pixel-scale.json")


def second_training(out: Path) -> Path | None:
    """The folder of a sweep's second training, once that has taken a few steps."""
    for path in out.glob("runs/*local14*seed0*/metrics.jsonl"):
        if path.read_text().count('"kind": "train"') >= 3:
            return path.parent
    return None


def test_sweeps_in_one_folder_share_the_recipe_s_own_training(root: Path, tmp_path: Path) -> None:
    matched = plan(options(root, "alpha", recipe_file(root))).own.views.local_size
    assert main(command(root, "alpha", tmp_path, "--values", "0.4", "1")) == 0
    assert main(command(root, "pixel-scale", tmp_path, "--values", str(matched))) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2
    alpha, pixels = (json.loads((tmp_path / f"{kind}.json").read_text()) for kind in ("alpha", "pixel-scale"))
    assert alpha["levels"][0] | {"value": matched, "x": alpha["levels"][0]["views"]["ratio"]} == pixels["levels"][0]
    assert alpha["marks"] == {"default loss": 0.25, "recipe": 0.4}


def test_a_bare_folder_is_judged_without_labels(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in (root / "images" / "train").rglob("*.png"):
        (folder / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    argv = ["diagnose", "crop-scale", recipe_file(root), "--data", str(folder), "--out", str(tmp_path / "out")]
    assert main([*argv, "--values", "0.3", "0.5", "--json", str(tmp_path / "all.json"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "judged on the same images, as no others are held out: label-free figures only" in printed
    levels = json.loads((tmp_path / "all.json").read_text())["levels"]
    assert [set(level["mean"]) for level in levels] == [{"retrieval", "rankme", "lidar"}] * 2


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("alpha", ["--values", "0.2", "1.5"], "--values 1.5: alpha is a number from 0 to 1"),
        ("alpha", ["--values", "nan"], "--values nan: alpha is a number from 0 to 1"),
        ("alpha", ["--values", "0.2", "0.2"], "--values 0.2 0.2: one is given twice"),
        ("crop-scale", ["--values", "0.01"], "--values 0.01: s0 is from the smallest local crop to the largest global"),
        ("pixel-scale", ["--values", "12.5"], "--values 12.5: local sizes in pixels are whole numbers from 1"),
        ("pixel-scale", ["--values", "0"], "--values 0: local sizes in pixels are whole numbers from 1"),
        ("alpha", ["--seeds", "0"], "--seeds 0: wanted a whole number from 1"),
        ("alpha", ["--set", "views.num_locals=0"], "views.num_locals is 0; a diagnosis is of local views"),
        ("alpha", ["--set", "speed=1"], "unknown key speed"),
        ("alpha", ["--eval-data", "nowhere"], "there is no data at 'nowhere'"),
        ("alpha", ["--json", "."], "--json . is a folder"),
        ("alpha", ["--set", "data.batch_size=1000"], "1000"),
        ("alpha", ["--device", "abacus"], "abacus"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, more: list[str], message: str
) -> None:
    assert main(command(root, kind, tmp_path, *more)) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_sizes_off_a_transformer_s_grid_are_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "diagnose",
        "pixel-scale",
        "dino-vit-tiny-matched",
        "--data",
        str(root / "images"),
        "--out",
        str(root / "x"),
    ]
    assert main([*argv, "--values", "100"]) == 2
    assert "--values 100: local sizes in pixels are multiples of 16, as vit_tiny needs them" in capsys.readouterr().err


MEASUREMENT = Measurement(
    global_crop_scale=0.65,
    local_crop_scale=0.17,
    global_pixel_scale=1.0,
    local_pixel_scale=1.0,
    ratio=1.0,
    local_size=18,
    matched_size=18,
)


def outcome(accuracies: dict[float, list[float]], own: float | None) -> Outcome:
    """Made-up k-NN accuracies of each seed, by alpha."""
    levels = [
        Level(
            value=value,
            x=value,
            name=f"{value:g}",
            measurement=MEASUREMENT,
            is_own=value == own,
            trained={
                seed: Trained(
                    measures={"knn": knn, "retrieval": 0.3, "rankme": 50.0, "lidar": 40.0},
                    recipe_hash="",
                    run="",
                    seconds=1.0,
                )
                for seed, knn in enumerate(each)
            },
        )
        for value, each in accuracies.items()
    ]
    return Outcome(
        kind="alpha", axis="alpha", title="made up", judged="nothing", levels=levels, marks={}, yardsticks={}
    )


@pytest.mark.parametrize(
    ("accuracies", "own", "said"),
    [
        (
            {0.2: [0.5, 0.52], 0.4: [0.6, 0.62]},
            0.2,
            "alpha 0.4, 0.610: 0.100 above the recipe's own value, alpha 0.2, more",
        ),
        (
            {0.2: [0.5, 0.6], 0.4: [0.6, 0.58]},
            0.2,
            "0.040 above the recipe's own value, alpha 0.2, no more than the 0.100",
        ),
        (
            {0.2: [0.5, 0.52], 0.4: [0.6, 0.62]},
            0.4,
            "the recipe's own value: 0.100 above the next, alpha 0.2, more than",
        ),
        ({0.2: [0.5], 0.4: [0.6]}, 0.2, "0.100 above the recipe's own value, alpha 0.2; one seed: no spread known"),
        ({0.2: [0.5], 0.4: [0.6]}, None, "0.100 above the next, alpha 0.2 (the recipe's own value is not swept)"),
        ({0.4: [0.6], 0.6: []}, 0.4, "k-NN: only one value is trained so far"),
    ],
)
def test_the_finding_names_the_best_value_and_weighs_it_against_the_seeds(
    accuracies: dict[float, list[float]], own: float | None, said: str
) -> None:
    assert said in outcome(accuracies, own).findings()[0]


def test_means_are_over_the_seeds_that_all_values_have() -> None:
    half_way = outcome({0.2: [0.5, 0.9], 0.4: [0.6], 0.6: []}, 0.4)
    assert half_way.seeds == [0]
    assert [half_way.mean(level, "knn") for level in half_way.shown] == [0.5, 0.6]


@pytest.mark.parametrize("accuracies", [{0.2: [0.5]}, {0.2: [0.0], 0.4: [0.0]}, {0.2: [0.5, 0.6], 0.4: [0.55]}])
def test_any_outcome_can_be_drawn(tmp_path: Path, accuracies: dict[float, list[float]]) -> None:
    yardsticks = {
        name: {"knn": 0.1, "retrieval": 0.9, "rankme": 1.0, "lidar": 0.0} for name in ("untrained", "raw pixels")
    }
    marks = {"default loss": 0.2, "recipe": 0.2}
    drawn = dataclasses.replace(outcome(accuracies, 0.2), yardsticks=yardsticks, marks=marks)
    diagnosis_figure(tmp_path / "figure.png", drawn)
    with Image.open(tmp_path / "figure.png") as figure:
        figure.verify()
