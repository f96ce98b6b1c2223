import contextlib
import dataclasses
import io
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lowssl_core import demo
from lowssl_core.checkpoint import load_checkpoint, save_checkpoint
from lowssl_core.command_line import main
from lowssl_core.encoder import load_encoder
from lowssl_core.journal import read_metrics
from lowssl_core.recipe import load_recipe
from lowssl_core.run import Run
from lowssl_core.sources import ArraySource

SHORT = (
    "epochs=2",
    "views.global_size=16",
    "views.num_locals=2",
    "data.batch_size=16",
    "monitor.quality_every_epochs=1",
)
ARGUMENTS = [part for override in SHORT for part in ("--set", override)]


def few_tiles(seed: int, count: int) -> ArraySource:
    rng = np.random.default_rng(seed)
    tiles = np.kron(rng.integers(0, 256, (count, 4, 4, 3)), np.ones((1, 6, 6, 1))).astype(np.uint8)
    return ArraySource(
        tiles,
        [str(index) for index in range(count)],
        description="a few tiles",
        labels=[index % 3 for index in range(count)],
        classes=["a", "b", "c"],
    )


@pytest.fixture(autouse=True)
def few_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on 48 and 20 made-up tiles, without its federation: minutes become seconds."""
    shorten(monkeypatch)


def shorten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("lowssl_core.photos.open_photos", open_few)
    patch.setattr("lowssl_core.demo.why_not", lambda: "left out: a test of its own runs it")


def open_few(*, split: str | None = None) -> ArraySource:
    return few_tiles(1, 20) if split == "test" else few_tiles(0, 48)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a demo that was run, and what it printed."""
    out, printed = tmp_path_factory.mktemp("demo") / "made", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        shorten(patch)
        assert main(["demo", "--out", str(out), *ARGUMENTS]) == 0
    return out, printed.getvalue()


def test_the_demo_makes_all_that_its_last_lines_name(made: tuple[Path, str]) -> None:
    out, printed = made
    *lines, last = printed.splitlines()
    named = {line.split()[0] for line in lines[-6:]}
    assert named == {
        str(out / name)
        for name in (
            "views.png",
            "curves.png",
            "neighbors.png",
            "run/encoder.safetensors",
            "run/checkpoint.safetensors",
            "results.json",
        )
    }
    assert last == f"Serve it: lowssl-server --data-dir {out / 'server'}"
    for path in named:
        assert Path(path).stat().st_size > 0
    for name in ("views.png", "curves.png", "neighbors.png"):
        with Image.open(out / name) as figure:
            figure.verify()


def test_the_table_and_the_results_agree(made: tuple[Path, str]) -> None:
    out, printed = made
    results = json.loads((out / "results.json").read_text())
    assert set(results["quality"]) >= {"random network", "raw pixels", "this run"}
    assert results["training"]["images"] == 2 * 48
    for name, quality in results["quality"].items():
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert line.split()[-2:] == [f"{quality['retrieval']:.3f}", f"{quality['knn']:.3f}"]


def test_what_the_server_answered_is_what_the_encoder_says(made: tuple[Path, str]) -> None:
    out, printed = made
    tiles = open_few(split="test")
    images = [tiles.read(index) for index in range(len(tiles))]
    features = torch.nn.functional.normalize(load_encoder(out / "run" / "encoder.safetensors").embed(images), dim=1)
    cosines = (features @ features.T).fill_diagonal_(-1)
    labels = torch.tensor([tiles.label(index) for index in range(len(tiles))])
    right = int((labels[cosines.argmax(1)] == labels).sum())
    assert f"{100 * right / len(tiles):.0f} of 100 tiles have their nearest neighbor in the same photograph" in printed
    assert "20 tiles went through /embed of a server that has the encoder as v1" in printed


def test_the_table_shows_the_ends_of_the_curves(made: tuple[Path, str]) -> None:
    out, _ = made
    curve = read_metrics(out / "run", "quality")
    quality = json.loads((out / "results.json").read_text())["quality"]
    for measure in ("retrieval", "knn"):
        assert curve[0][measure] == pytest.approx(quality["random network"][measure])
        assert curve[-1][measure] == pytest.approx(quality["this run"][measure])


def test_an_interrupted_demo_goes_on_to_the_same_weights(
    made: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["demo", "--out", str(tmp_path), *ARGUMENTS]
    with monkeypatch.context() as patch:
        press_control_c_after_the_first_epoch(patch)
        assert main(argv) == 130
    assert capsys.readouterr().out.endswith("interrupted: the same command goes on from here\n")
    assert main(argv) == 0
    assert "resumed at step 4" in capsys.readouterr().out
    straight, resumed = (load_encoder(out / "run" / "encoder.safetensors") for out in (made[0], tmp_path))
    assert straight.info.weights_hash == resumed.info.weights_hash


def press_control_c_after_the_first_epoch(patch: pytest.MonkeyPatch) -> None:
    measure_quality = Run._measure_quality

    def measure_and_press(run: Run) -> None:
        measure_quality(run)
        if run.progress.epoch == 1:
            signal.raise_signal(signal.SIGINT)

    patch.setattr(Run, "_measure_quality", measure_and_press)


def test_without_flower_the_demo_ends_well_and_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("lowssl_core.photos.open_photos", open_few)
    monkeypatch.setattr("lowssl_core.demo_federation.find_spec", lambda name: None)
    assert main(["demo", "--out", str(tmp_path), *ARGUMENTS]) == 0
    printed = capsys.readouterr().out
    line = "left out: a federation takes Flower, which is not installed: pip install 'lowssl[server,client]'"
    assert f"5. Federated\n\n{line}\n" in printed
    assert json.loads((tmp_path / "results.json").read_text())["federation"] is None


@pytest.mark.parametrize(("status", "said"), [(143, "interrupted: the same command does this step anew\n"), (2, "")])
def test_a_demo_that_stopped_at_its_federation_goes_on_without_training_again(
    made: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    said: str,
) -> None:
    shutil.copytree(made[0], tmp_path / "demo")
    (tmp_path / "demo" / "results.json").unlink()
    weights = (tmp_path / "demo" / "run" / "checkpoint.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("lowssl_core.demo.why_not", str)
        patch.setattr("lowssl_core.demo.federate", lambda *paths: status)
        assert main(["demo", "--out", str(tmp_path / "demo"), *ARGUMENTS]) == status
    assert capsys.readouterr().out.endswith(f"5. Federated\n\n{said}")
    assert main(["demo", "--out", str(tmp_path / "demo"), *ARGUMENTS]) == 0
    assert (tmp_path / "demo" / "run" / "checkpoint.safetensors").read_bytes() == weights
    assert (tmp_path / "demo" / "results.json").exists()


@pytest.mark.parametrize("earlier", ["finished", "of another recipe", "damaged", "none"])
def test_only_an_interrupted_demo_of_the_recipe_is_kept(made: tuple[Path, str], tmp_path: Path, earlier: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if earlier == "finished":
        (tmp_path / "results.json").write_text("{}")
    (run / "notes.txt").write_text("mine")
    recipe = load_recipe(demo.RECIPE, SHORT)
    checkpoint = load_checkpoint(made[0] / "run" / "checkpoint.safetensors")
    halfway = dataclasses.replace(checkpoint, progress=dataclasses.replace(checkpoint.progress, step=3))
    saved = {"finished": checkpoint, "of another recipe": halfway, "damaged": halfway}
    if earlier in saved:
        save_checkpoint(run / "checkpoint.safetensors", saved[earlier])
    if earlier == "damaged":
        (run / "checkpoint.safetensors").write_bytes(b"half a file")
    if earlier == "of another recipe":
        recipe = dataclasses.replace(recipe, seed=1)
    assert demo.make_room(tmp_path, recipe)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("step", [3, 6])
def test_an_interrupted_demo_is_kept(made: tuple[Path, str], tmp_path: Path, step: int) -> None:
    checkpoint = load_checkpoint(made[0] / "run" / "checkpoint.safetensors")
    halfway = dataclasses.replace(checkpoint, progress=dataclasses.replace(checkpoint.progress, step=step))
    save_checkpoint(tmp_path / "run" / "checkpoint.safetensors", halfway)
    assert not demo.make_room(tmp_path, load_recipe(demo.RECIPE, SHORT))
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--set", "epochs=none"], "epochs"),
        (["--set", "speed=1"], "unknown key speed"),
        (["--out", "FILE"], "FILE"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("a file")
    assert main(["demo", *argv]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_judging_ranks_a_perfect_embedding_above_a_blind_one() -> None:
    train, test = few_tiles(0, 30), few_tiles(1, 12)

    def blind(images: object) -> torch.Tensor:
        return torch.ones(len(list(images)), 2)  # type: ignore[call-overload]

    def mean_color(images: object) -> torch.Tensor:
        return torch.tensor(np.stack([image.mean((0, 1)) - 127 for image in images])).float()  # type: ignore[attr-defined]

    qualities = demo.judge({"blind": blind, "color": mean_color}, train, test)
    assert qualities["blind"].retrieval == pytest.approx(1 / 12)
    assert qualities["color"].retrieval > 1 / 12
