"""The command through its front door on composed photographs: figures, stopping, resuming, two processes, refusals."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowssl_core.command_line import main
from lowssl_core.detection.average_precision import NAMES
from lowssl_core.detection.fine_tuning import load_checkpoint

ITERATIONS = 8
SMALL = (
    f"iterations={ITERATIONS}",
    "batch_size=2",
    "network.short_side=64",
    "network.long_side=96",
    "network.channels=16",
    "network.hidden=32",
    "network.proposals=40",
    "network.regions=16",
    "network.detections=10",
    "optim.lr=0.02",
    "optim.warmup_iterations=2",
    "optim.steps=[5, 7]",
    "monitor.log_every=2",
    "monitor.checkpoint_every=3",
)
PATIENCE = 150.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coins on photographs, eight pictures to learn from and three to judge on."""
    folder = tmp_path_factory.mktemp("coins")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        cutouts = importlib.import_module("cutouts")
    coins, backgrounds = cutouts.cut_coins(), cutouts.background_pieces(without=())
    for split, count in (("train", 8), ("val", 3)):
        rng = np.random.default_rng(count)
        material = cutouts.Material(cutouts={"coin": coins}, backgrounds=backgrounds[split])
        pictures = [cutouts.compose(material, (56, 72), rng) for _ in range(count)]
        cutouts.write_split(folder, split, pictures, ["coin"])
    return folder


def arguments(data: Path, out: Path, *more: str, model: str = "default") -> list[str]:
    splits = [
        *("--train", str(data / "train.json"), "--train-images", str(data / "train")),
        *("--val", str(data / "val.json"), "--val-images", str(data / "val")),
    ]
    settings = [f"--set={each}" for each in SMALL]
    return [model, *splits, "--recipe", "tiny-1x", *settings, "--out", str(out), "--workers", "0", *more]


def run(argv: list[str]) -> int:
    return main(["evaluate", "detect", *argv])


def start(argv: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lowssl_core.command_line", "evaluate", "detect", *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Status, output and errors."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, out, err


def figures(path: Path) -> list[dict[str, float]]:
    return [row["values"] for row in json.loads(path.read_text())["rows"]]


@dataclass
class Straight:
    """A run that went straight through."""

    folder: Path
    json: Path
    out: str
    err: str

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(load_checkpoint(self.folder / "checkpoint.safetensors").tensors)


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    folder = tmp_path_factory.mktemp("straight")
    file = folder / "figures.json"
    status, out, err = end(start(arguments(data, folder / "run", "--json", str(file))))
    assert status == 0, err
    return Straight(folder / "run", file, out, err)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_table_and_the_json_hold_box_and_mask_ap(straight: Straight) -> None:
    content = json.loads(straight.json.read_text())
    assert [row["subject"] for row in content["rows"]] == ["box", "mask"]
    for row in content["rows"]:
        assert set(row["values"]) <= set(NAMES)
        assert {"AP", "AP50", "AP75"} <= set(row["values"])
        assert all(0 <= value <= 1 for value in row["values"].values())
    curve = content["rows"][0]["details"]["curve"]
    assert [row["iteration"] for row in curve] == [2, 4, 6, 8]
    assert [row["learning_rate"] for row in curve] == pytest.approx([0.01001, 0.02, 0.002, 0.0002], rel=1e-3)
    assert all(0 < row["loss_mask"] < row["loss"] < 20 for row in curve)
    assert content["settings"]["recipe"]["iterations"] == ITERATIONS
    assert content["settings"]["backbone"] == "resnet_tiny"
    lines = straight.out.splitlines()
    assert lines[0].split() == ["AP", "AP50", "AP75", *(name for name in NAMES[3:] if name in lines[0])]
    assert [line.split()[0] for line in lines[1:3]] == ["box", "mask"]
    assert "Mask R-CNN with FPN on resnet_tiny" in straight.err
    assert "8 images" in straight.err


def test_the_curve_and_ap_on_the_way_are_recorded(data: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "figures.json"
    more = ("--json", str(file), "--set", "iterations=4", "--set", "monitor.evaluate_every=2")
    assert run(arguments(data, tmp_path / "run", *more, model="untrained:resnet_tiny")) == 0
    printed = capsys.readouterr().err
    assert printed.count("box AP") == 1  # at iteration 2; the end is the table
    assert "from untrained resnet_tiny\n" in printed
    curve = json.loads(file.read_text())["rows"][0]["details"]["curve"]
    assert [row["iteration"] for row in curve if "box AP" in row] == [2]


def test_a_run_stopped_and_killed_ends_with_the_bits_of_a_straight_one(
    data: Path, straight: Straight, tmp_path: Path
) -> None:
    folder, file = tmp_path / "run", tmp_path / "figures.json"
    argv = arguments(data, folder, "--json", str(file), "--set", "monitor.checkpoint_every=1")
    path = folder / "checkpoint.safetensors"
    steps = []
    for number, more in ((signal.SIGTERM, []), (signal.SIGKILL, ["--resume"])):
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = start([*argv, *more])
        began = time.monotonic()
        while process.poll() is None and time.monotonic() - began < PATIENCE:
            if path.exists() and path.stat().st_mtime_ns != before:
                break
            time.sleep(0.002)
        process.send_signal(number)
        status, out, err = end(process)
        assert out == ""
        assert status == (143 if number == signal.SIGTERM else -signal.SIGKILL), err
        if number == signal.SIGTERM:
            assert "go on with --resume" in err
            assert err.endswith("stopped by SIGTERM\n")
        else:
            assert f"resumed at iteration {steps[-1]}" in err
        steps.append(load_checkpoint(path).progress.step)
    assert 0 < steps[0] < steps[1] < ITERATIONS
    assert run([*argv, "--resume"]) == 0
    assert same(straight.tensors(), dict(load_checkpoint(path).tensors))
    assert figures(file) == figures(straight.json)


def test_a_finished_run_is_judged_again_and_never_overwritten(data: Path, straight: Straight, tmp_path: Path) -> None:
    before, again = straight.tensors(), tmp_path / "again.json"
    assert run(arguments(data, straight.folder, "--resume", "--json", str(again))) == 0
    assert figures(again) == figures(straight.json)
    assert same(before, straight.tensors())


def test_two_processes_give_one_table_of_what_they_saved(data: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "run", tmp_path / "figures.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
    argv = arguments(data, folder, "--json", str(file))
    processes = [start(argv, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    (first, table, told), (second, nothing, silence) = (end(process) for process in processes)
    assert (first, second) == (0, 0), told + silence
    assert table.count("box") == 1
    said = [line for line in (nothing + silence).splitlines() if "[Gloo]" not in line]  # torch 2.8's gloo greets
    assert said == []
    assert "BatchNorm is synchronised on GPUs only" in told
    assert "on 2 x cpu" in told
    assert json.loads(file.read_text())["settings"]["processes"] == 2
    # What both judged together is what one process finds in the weights and statistics that were saved.
    alone = tmp_path / "alone.json"
    assert run(arguments(data, folder, "--resume", "--json", str(alone))) == 0
    assert figures(alone) == figures(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--train", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["--val-images", "nowhere"], "nowhere: no such folder of images"),
        (["--recipe", "coco-3x"], "recipe 'coco-3x' is neither a TOML file nor one of coco-1x, tiny-1x"),
        (["--set", "optim.rate=1"], "unknown key optim.rate"),
        (["--set", "batch_size=9"], "train.json: 8 images"),
        (["--workers", "-1"], "--workers -1: wanted a number of processes, 0 or more"),
        (["--device", "tpu9"], "--device tpu9: not usable here"),
        (["--json", "."], "--json . is a folder; give the file to write"),
        (["--branch", "teacher", "--set", "iterations=0"], "iterations is 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    data: Path, tmp_path: Path, capsys: Any, changes: list[str], message: str
) -> None:
    assert run(arguments(data, tmp_path / "run", *changes)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith("lowssl evaluate: ")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("untrained:resnet", "backbone 'resnet' is neither one of"),
        ("untrained:vit_tiny", "detection needs a backbone with maps of strides 4, 8, 16 and 32"),
        ("nowhere.safetensors", "there is no model 'nowhere.safetensors'"),
    ],
)
def test_a_model_that_cannot_detect_is_refused(
    data: Path, tmp_path: Path, capsys: Any, model: str, message: str
) -> None:
    assert run(arguments(data, tmp_path / "run", model=model)) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "holds a run already; add --resume to go on with it"),
        (["--resume", "--set", "optim.lr=0.3"], "with another recipe (there, here): optim.lr: 0.02, 0.3"),
        (["--resume", "untrained"], "was made with another MODEL"),
        (["--resume", "--train"], "was made with another --train"),
    ],
)
def test_a_run_is_only_resumed_as_what_it_was(
    data: Path, straight: Straight, tmp_path: Path, capsys: Any, changes: list[str], message: str
) -> None:
    model = "untrained:resnet_tiny" if "untrained" in changes else "default"
    more = [each for each in changes if each not in ("untrained", "--train")]
    if "--train" in changes:
        more += ["--train", str(data / "val.json"), "--train-images", str(data / "val")]
    assert run(arguments(data, straight.folder, *more, model=model)) == 2
    assert message in capsys.readouterr().err


def test_losses_that_are_no_numbers_stop_the_run(data: Path, tmp_path: Path, capsys: Any) -> None:
    assert run(arguments(data, tmp_path / "run", "--set", "optim.lr=1e30")) == 2
    assert "the loss is not a number any more at iteration" in capsys.readouterr().err


def test_an_image_to_judge_on_that_cannot_be_read_is_named(data: Path, tmp_path: Path, capsys: Any) -> None:
    images = tmp_path / "val"
    images.mkdir()
    for file in (data / "val").iterdir():
        (images / file.name).write_bytes(file.read_bytes()[:200] if file.name == "000002.png" else file.read_bytes())
    more = ("--val-images", str(images), "--set", "iterations=1")
    assert run(arguments(data, tmp_path / "run", *more)) == 2
    assert "--val-images: 000002.png: " in capsys.readouterr().err
