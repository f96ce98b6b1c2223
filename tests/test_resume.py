"""Real processes, stopped in the middle of an epoch in every way, and what comes of them when they are resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_pretrain import arguments, photographs, recipe_file

from lowssl_core.checkpoint import Checkpoint, load_checkpoint
from lowssl_core.journal import read_metrics
from lowssl_core.methods import METHODS
from lowssl_core.pretrain import main

# Epochs are long, so that a signal sent in the middle of one also arrives there.
STEPS, EPOCHS, BATCH = 16, 3, 4
SETTINGS = ("--set", f"epochs={EPOCHS}", "--set", "monitor.quality_every_epochs=0")
# What asks the first process to stop, and the status it ends with; loading elsewhere must not matter to a resumed run.
ASKED = {"dino": (signal.SIGTERM, 143), "swav": (signal.SIGINT, 130), "moco": (signal.SIGTERM, 143)}
WORKERS = {"dino": 0, "swav": 0, "moco": 1}
PATIENCE = 120.0


@dataclass
class Story:
    """A run that was asked to stop, resumed, killed and resumed, beside one that went straight through."""

    asked: subprocess.CompletedProcess[str]
    stopped_at: Checkpoint
    killed: subprocess.CompletedProcess[str]
    killed_after: int
    kept_at: Checkpoint
    end: Checkpoint
    straight_end: Checkpoint
    folder: Path
    straight_folder: Path


def start(argv: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lowssl_core.pretrain", *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def last_step(folder: Path) -> int:
    """The last step that a running process has written of."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return max((row["step"] for row in rows if row["kind"] == "train"), default=0)


def stop_in(process: subprocess.Popen[str], folder: Path, step: int, number: int) -> subprocess.CompletedProcess[str]:
    """Send a signal as soon as the process has taken `step` steps, and wait for its end."""
    began = time.monotonic()
    while last_step(folder) < step and process.poll() is None and time.monotonic() - began < PATIENCE:
        time.sleep(0.005)
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def interrupted_run(argv: list[str], folder: Path, number: int) -> dict[str, object]:
    """A run asked to stop in its second epoch, resumed, and killed in its third."""
    path = folder / "checkpoint.safetensors"
    asked = stop_in(start(argv), folder, STEPS + 3, number)
    stopped_at = load_checkpoint(path)
    killed = stop_in(start([*argv, "--resume"]), folder, 2 * STEPS + 3, signal.SIGKILL)
    return {
        "asked": asked,
        "stopped_at": stopped_at,
        "killed": killed,
        "killed_after": last_step(folder),
        "kept_at": load_checkpoint(path),
    }


@pytest.fixture(scope="module", params=METHODS)
def story(request, tmp_path_factory) -> Story:
    method = request.param
    root = tmp_path_factory.mktemp(method)
    recipe, data = recipe_file(root, method), photographs(root / "images", STEPS * BATCH)
    folder, straight_folder = root / "stopped", root / "straight"
    argv = arguments(recipe, data, folder, *SETTINGS, "--workers", str(WORKERS[method]))
    with ThreadPoolExecutor(1) as beside:
        interrupted = beside.submit(interrupted_run, argv, folder, ASKED[method][0])
        assert main(arguments(recipe, data, straight_folder, *SETTINGS)) == 0
    parts = interrupted.result()
    assert main([*argv, "--resume"]) == 0
    end, straight_end = (load_checkpoint(each / "checkpoint.safetensors") for each in (folder, straight_folder))
    return Story(**parts, end=end, straight_end=straight_end, folder=folder, straight_folder=straight_folder)


def test_a_process_asked_to_stop_saves_the_step_it_is_at_and_says_so(story):
    number, status = ASKED[story.end.recipe.method.name]
    assert story.asked.returncode == status
    step = story.stopped_at.progress.step
    assert STEPS + 3 <= step < 2 * STEPS  # in the middle of an epoch
    assert f"stopped by {signal.Signals(number).name} at step {step}" in story.asked.stdout
    assert "--resume" in story.asked.stdout
    assert story.asked.stderr == ""


def test_a_killed_process_leaves_the_checkpoint_of_its_last_epoch(story):
    assert story.killed.returncode == -signal.SIGKILL
    assert f"resumed at step {story.stopped_at.progress.step}" in story.killed.stdout
    assert 2 * STEPS + 3 <= story.killed_after < 3 * STEPS
    assert story.kept_at.progress.step == 2 * STEPS


def test_a_run_stopped_and_killed_ends_with_the_bits_of_a_straight_one(story):
    starts = [row["step"] for row in read_metrics(story.folder, "start")]
    assert starts == [0, story.stopped_at.progress.step, 2 * STEPS]
    end, straight = story.end, story.straight_end
    assert end.progress == straight.progress
    assert end.progress.step == EPOCHS * STEPS
    assert end.recipe == straight.recipe
    assert end.tensors.keys() == straight.tensors.keys()
    different = [name for name, value in end.tensors.items() if not torch.equal(value, straight.tensors[name])]
    assert different == []


def test_its_metrics_are_those_of_a_straight_run(story):
    def told(folder):
        rows = read_metrics(folder, "train")
        return [{key: row[key] for key in ("step", "loss", "global_loss", "local_loss", "feature_std")} for row in rows]

    assert [row["step"] for row in told(story.folder)] == list(range(1, EPOCHS * STEPS + 1))
    assert told(story.folder) == told(story.straight_folder)
    assert len(read_metrics(story.folder, "end")) == 1
    quality = [read_metrics(folder, "quality")[-1] for folder in (story.folder, story.straight_folder)]
    for key in ("rankme", "retrieval"):
        assert quality[0][key] == quality[1][key]
