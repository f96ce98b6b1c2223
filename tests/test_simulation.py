"""`lowssl simulate`: the devices' and the server's own code in one process, resumed to the same figures."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from lowssl_core.command_line import run_for_user
from lowssl_core.photos import open_photos
from server.commands.simulate import command
from server.federation.history import History

# `python -m` needs no entry point.
PROGRAM = """
import argparse, sys
from lowssl_core.command_line import run_for_user
from server.commands.simulate import command
parser = argparse.ArgumentParser(prog="lowssl simulate")
command.add_arguments(parser)
arguments = parser.parse_args()
sys.exit(run_for_user("lowssl simulate", lambda: command.run(arguments)))
"""
CLASSES, IMAGES = 3, 16
RECIPE = """
[method]
name = "moco"
hidden = 32
queue_length = 16
key_groups = 2
[backbone]
name = "mobilenetv2_tiny"
[views]
global_size = 24
num_locals = 1
local_size = 12
[data]
batch_size = 8
shrink_to = 32
[optim]
name = "adamw"
base_lr = 0.03
warmup_steps = 2
"""
LEARNER = ("federation.learner.budget.steps=2", "federation.learner.save_every_steps=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Photographs in class folders; the classes are colours, so that a network can tell them."""
    root, photos = tmp_path_factory.mktemp("data"), open_photos()
    (root / "recipe.toml").write_text(RECIPE)
    for split, count in (("train", IMAGES), ("test", 4)):
        for kind in range(CLASSES):
            folder = root / "images" / split / f"class-{kind}"
            folder.mkdir(parents=True)
            for index in range(count):
                image = cv2.resize(photos.read(kind + 5 * index + (split == "test")), (40, 36)).astype(np.float32)
                image[..., kind] = 0.5 * image[..., kind] + 120
                cv2.imwrite(str(folder / f"{index:02}.png"), image.clip(0, 255).astype(np.uint8))
    return root


def arguments_of(data: Path, out: Path, *options: str, sets: tuple[str, ...] = ()) -> list[str]:
    changes = [part for change in (*LEARNER, *sets) for part in ("--set", change)]
    where = ["--data", str(data / "images"), "--out", str(out), "--judged", "12", "--device", "cpu"]
    return [str(data / "recipe.toml"), *where, *options, *changes]


def simulate(data: Path, out: Path, *options: str, sets: tuple[str, ...] = ()) -> int:
    parser = argparse.ArgumentParser(prog="lowssl simulate")
    command.add_arguments(parser)
    arguments = parser.parse_args(arguments_of(data, out, *options, sets=sets))
    return run_for_user("lowssl simulate", lambda: command.run(arguments))


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def without_times(tree):
    """A tree of plain values without what no two runs have in common."""
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key not in ("seconds", "started")}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def test_one_device_with_everything_learns_as_it_does_alone(data, tmp_path):
    # Plain averaging of one device, its model taken over whole (tau 0) and unrounded, hands it back what it sent; what
    # is left is the rounding of (w - b) + b. Pooled, one device for one, is the same device alone to the bit.
    exact = ("federation.rounds.up=fp32", "federation.rounds.down=fp32")
    options = ("--devices", "1", "--rounds", "3", "--federation", "fedavg", "--baselines", "alone", "pooled")
    assert simulate(data, tmp_path, *options, sets=exact) == 0
    journals = results(tmp_path)["journals"]
    federated = History(tmp_path / "federated" / "server").last().flat
    flats = [_weights(data, tmp_path / name) for name in ("alone/devices/device-0", "pooled/devices/pool")]
    np.testing.assert_array_equal(*flats)
    moved = np.linalg.norm(flats[0] - History(tmp_path / "federated" / "server").load(0).flat)
    assert np.linalg.norm(federated - flats[0]) < 1e-3 * moved
    losses = [[row["devices"][name]["loss"] for row in journals[course][1:]] for course, name in _FIRST.items()]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[1] == losses[2]
    assert journals["alone"][-1]["own"]["device-0"] == journals["pooled"][-1]["shared"]
    # Blended instead, as FedEMA does, it keeps of itself only what it has sent anyway: the same again.
    assert simulate(data, tmp_path / "blended", *options[:-3], sets=(*exact, "federation.learner.tau=0.7")) == 0
    blended = History(tmp_path / "blended" / "federated" / "server").last().flat
    assert np.linalg.norm(blended - flats[0]) < 1e-3 * moved


_FIRST = {"federated": "device-0", "alone": "device-0", "pooled": "pool"}


def _weights(data: Path, folder: Path) -> np.ndarray:
    from client.simulated import Device
    from lowssl_core.recipe import load_recipe

    device = Device(folder, "again", load_recipe(str(data / "recipe.toml")).as_dict(), {})
    try:
        return device.weights()
    finally:
        device.close()


def test_a_simulation_stopped_again_and_again_comes_to_the_same_figures(data, tmp_path):
    options = ("--devices", "3", "--rounds", "4", "--stream", "2", "--partition", "classes:1", "--baselines", "alone")
    assert simulate(data, tmp_path / "straight", *options) == 0
    command_line = [sys.executable, "-c", PROGRAM, *arguments_of(data, tmp_path / "stopped", *options)]
    journal = tmp_path / "stopped" / "federated" / "journal.json"
    for kind, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        before = journal.read_text() if journal.exists() else ""
        # With another number of threads sums come out otherwise.
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command_line, text=True, env=environment, **pipes) as process:
            while process.poll() is None and (journal.read_text() if journal.exists() else "") == before:
                time.sleep(0.02)
            process.send_signal(kind)
            _, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors
        assert process.returncode == status
    assert simulate(data, tmp_path / "stopped", *options) == 0
    straight, stopped = results(tmp_path / "straight"), results(tmp_path / "stopped")
    assert without_times(stopped) == without_times(straight)
    # Gone on with once more there is nothing left to do.
    assert simulate(data, tmp_path / "stopped", *options) == 0
    assert results(tmp_path / "stopped") == stopped


def test_what_is_reported_adds_up(data, tmp_path, capsys):
    options = ("--devices", "2", "--rounds", "2", "--stream", "2", "--images", "8", "--federation", "l-dawa")
    assert simulate(data, tmp_path, *options) == 0
    report = results(tmp_path)
    history = History(tmp_path / "federated" / "server")
    figures, rows = report["figures"]["federated"], report["journals"]["federated"]
    records = history.records()[1:]
    assert figures["bytes_up"] == sum(record.bytes_up for record in records)
    assert figures["bytes_down"] == sum(record.bytes_down for record in records)
    # int8 up is about a half of fp16 down.
    assert 0.45 < figures["bytes_up"] / figures["bytes_down"] < 0.65
    assert figures["steps"] == 2 * 2 * 2
    # 4 images come in each round: the first batches are of these, the next of these and the 4 remembered; 3 views.
    assert figures["views"] == 2 * 2 * 3 * (4 + 8)
    shares = np.full(CLASSES, 1 / CLASSES)
    assert figures["shared"]["accuracy"] == pytest.approx(np.array(rows[-1]["shared"]) @ shares)
    streams = np.array(list(report["devices"].values()))  # (devices, parts, classes)
    judged = np.array([row["shared"] for row in rows[1:]])
    on_parts = np.einsum("ic,djc->dij", judged, streams)
    assert figures["shared"]["average_accuracy"] == pytest.approx(on_parts[:, -1].mean())
    assert figures["shared"]["backward_transfer"] == pytest.approx((on_parts[:, 1, 0] - on_parts[:, 0, 0]).mean())
    own = [np.array(rows[-1]["own"][name]) @ shares for name in report["devices"]]
    assert figures["own"]["accuracy"] == pytest.approx(np.mean(own))
    out = capsys.readouterr().out
    assert f"{100 * figures['shared']['accuracy']:.1f}" in out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--devices", "0"), "--devices 0: wanted a whole number from 1"),
        (("--partition", "dirichlet:x"), "--partition dirichlet:x: wanted iid"),
        (("--stream", "5", "--rounds", "4"), "--stream 5: a part takes a round at least, and --rounds is 4"),
        (("--devices", "49"), "49 devices: the data has 48 images"),
        (("--stream", "9", "--devices", "8"), "--stream 9: a device has 6 images, fewer than parts"),
        (("--federation", "none.toml"), "federation: 'none.toml' is neither a TOML file nor one of"),
        (("--set", "federation.learner.speed=3"), "federation: learner: unknown key speed; it has budget"),
        (("--set", "federation.learner.budget.new_share=3"), "federation: learner: budget.new_share is 3"),
        (("--eval-data", "nowhere"), "there is no data at 'nowhere'"),
        (("--set", "optim.speed=3"), "recipe: unknown key optim.speed"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(data, tmp_path, capsys, options, said):
    assert simulate(data, tmp_path, *options) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert said in errors[0]
    assert not list(tmp_path.iterdir())  # the folder is free for what was meant


def test_a_file_is_no_folder_of_a_simulation(data, tmp_path, capsys):
    path = tmp_path / "notes.txt"
    path.write_text("of a person")
    assert simulate(data, path, "--devices", "2") == 2
    assert capsys.readouterr().err == f"lowssl simulate: --out {path} is a file; it is the folder of everything\n"
    assert path.read_text() == "of a person"


def test_a_folder_of_another_simulation_is_refused(data, tmp_path, capsys):
    assert simulate(data, tmp_path, "--devices", "2", "--rounds", "1", "--images", "8") == 0
    capsys.readouterr()
    assert simulate(data, tmp_path, "--devices", "2", "--rounds", "2", "--images", "8") == 2
    assert "holds another simulation (rounds is 1 there, 2 here)" in capsys.readouterr().err
