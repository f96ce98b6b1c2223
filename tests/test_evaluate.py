"""`lowssl evaluate` through its front door, on small real images: figures as an independent reader finds them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_data import CLASSES, write_checkpoint, write_data
from sklearn.neighbors import KNeighborsClassifier

from lowssl_core.command_line import main
from lowssl_core.encoder import load_encoder
from lowssl_core.errors import UserError
from lowssl_core.methods import SwAVConfig
from lowssl_core.quality import rankme, retrieval_copies, retrieval_recall
from lowssl_core.sources import open_source
from lowssl_core.sources.memory import load_images


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_data(tmp_path_factory.mktemp("data"), train=20, test=8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint.safetensors"))


def evaluated(folder: Path, *arguments: str) -> dict[str, Any]:
    """What a task writes as JSON."""
    path = folder / "results.json"
    assert main(["evaluate", *arguments, "--json", str(path)]) == 0
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def test_knn_is_what_scikit_learn_finds(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluated(tmp_path, "knn", "default", "--data", data, "--k", "5", "1", "--branch", "student")
    encoder = load_encoder("default")
    parts = []
    for split in ("train", "test"):
        images, labels, _ = load_images(open_source(data, split=split))
        parts.append((torch.nn.functional.normalize(encoder.embed(images)).numpy(), labels))
    (bank, bank_labels), (queries, query_labels) = parts
    for k in (1, 5):
        # Of unit vectors, squared distance = 2 - 2 cosine.
        classifier = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)).fit(bank, bank_labels)
        assert results["rows"][0]["values"][f"k = {k}"] == pytest.approx(classifier.score(queries, query_labels))
    assert list(results["rows"][0]["values"]) == ["k = 1", "k = 5"]
    assert results["rows"][0]["details"]["test_images"] == 8 * len(CLASSES)
    assert "student" in capsys.readouterr().out


def test_all_branches_and_yardsticks_are_judged_side_by_side(data: str, checkpoint: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    arguments = [checkpoint, "--data", data, "--yardsticks", "--cache", str(cache)]
    names = ["student", "teacher", "recalibrated", "untrained", "raw pixels"]
    for task in ("knn", "linear"):
        results = evaluated(tmp_path, task, *arguments)
        assert [row["subject"] for row in results["rows"]] == names
        assert all(0 <= value <= 1 for row in results["rows"] for value in row["values"].values())
    assert len(list(cache.iterdir())) == 2 * len(names)  # made once for both tasks: train and test of each


def test_a_good_encoder_beats_an_untrained_one_in_each_task(data: str, tmp_path: Path) -> None:
    for arguments, measure in (
        (("knn", "default", "--k", "5"), "k = 5"),
        (("linear", "default"), "top-1"),
        (("quality", "default", "--images", "40", "--views", "3"), "retrieval"),
    ):
        results = evaluated(tmp_path, *arguments, "--data", data, "--yardsticks", "--branch", "student")
        figures = {row["subject"]: row["values"][measure] for row in results["rows"]}
        assert figures["student"] > figures["untrained"], measure


def test_quality_needs_no_labels_and_is_what_the_metrics_say(data: str, tmp_path: Path) -> None:
    folder = Path(data) / "train" / "coffee"
    results = evaluated(
        tmp_path, "quality", "default", "--data", str(folder), "--views", "2", "--branch", "student", "--seed", "3"
    )
    images, _, _ = load_images(open_source(str(folder)))
    encoder = load_encoder("default")
    features = encoder.embed(images)
    values = results["rows"][0]["values"]
    assert values["rankme"] == pytest.approx(rankme(features), rel=1e-4)
    copies = encoder.embed(list(retrieval_copies(images, seed=0)))
    assert values["retrieval"] == pytest.approx(retrieval_recall(features, copies))
    assert set(values) >= {"lidar", "alignment", "uniformity", "feature_deviation"}
    assert results["settings"]["images"] == 20


def test_semi_starts_from_the_methods_head_where_there_is_one(data: str, tmp_path: Path) -> None:
    swav = SwAVConfig(hidden=8, outputs=6, prototypes=5)
    models = {
        "of the method": str(write_checkpoint(tmp_path / "swav.safetensors", swav)),
        "none: a plain linear layer": "untrained:resnet_tiny",
    }
    for head, model in models.items():
        out = tmp_path / "out"
        arguments = ["--data", data, "--percent", "10", "20", "--set", "epochs=1", "--out", str(out)]
        branch = ["--branch", "student"] if "untrained" not in model else []
        results = evaluated(tmp_path, "semi", model, *arguments, *branch)
        (row,) = results["rows"]
        assert row["details"]["head"] == head
        assert row["details"]["10 %"]["labels"] == 6
        assert set(row["values"]) == {"10 % top-1", "20 % top-1"}
        listed = (out / "labels-20-seed0.txt").read_text().split()
        assert len(listed) == 12
        # The same list, given as a file, is the same training.
        listing = ["--list", str(out / "labels-20-seed0.txt"), "--data", data, "--set", "epochs=1"]
        again = evaluated(tmp_path, "semi", model, *listing, *branch)
        assert list(again["rows"][0]["values"].values()) == [row["values"]["20 % top-1"]]


def test_the_papers_linear_protocol_stops_at_a_signal_and_goes_on(data: str, tmp_path: Path) -> None:
    def command(out: Path, *more: str) -> list[str]:
        arguments = ["evaluate", "linear", "default", "--branch", "student", "--data", data, "--protocol", "paper"]
        settings = ["--set", "epochs=24", "--set", "batch_size=20", "--out", str(out)]
        return [sys.executable, "-m", "lowssl_core.command_line", *arguments, *settings, *more]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    subprocess.run([*command(straight), "--json", str(tmp_path / "a.json")], env=environment, check=True)
    process = subprocess.Popen(command(stopped), env=environment, stderr=subprocess.PIPE, text=True)
    waited = time.monotonic()
    while not list(stopped.glob("*.safetensors")) and process.poll() is None:
        assert time.monotonic() - waited < 60
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143, said
    assert "stopped by SIGTERM" in said
    subprocess.run([*command(stopped), "--json", str(tmp_path / "b.json")], env=environment, check=True)
    one, other = (json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in "ab")
    assert one == other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["knn", "default", "--data", "{data}/train/cat"], "no test or validation split"),
        (
            ["knn", "default", "--data", "{data}::train", "--eval-data", "{data}/test/cat"],
            "--eval-data: .*needs labels",
        ),
        (["knn", "default", "--data", "{data}", "--eval-data", "{data}"], "are the same images"),
        (["knn", "default", "--data", "{data}", "--eval-data", "photos::test"], "different classes: none only in"),
        (["knn", "default", "--data", "{data}", "--k", "0"], "--k 0: wanted whole numbers from 1"),
        (["knn", "nothing.safetensors", "--data", "{data}"], "there is no model 'nothing.safetensors'"),
        (["knn", "default", "--data", "{data}", "--branch", "teacher"], "has no teacher: it has student"),
        (["linear", "default", "--data", "{data}", "--set", "epochs=3"], "--set goes with --protocol paper"),
        (["linear", "default", "--data", "{data}", "--protocol", "paper", "--set", "lr=1"], "unknown key lr"),
        (["semi", "default", "--data", "{data}", "--percent", "0"], "--percent 0: wanted numbers above 0"),
        (["semi", "default", "--data", "{data}", "--list", "{data}/nothing.txt"], "nothing.txt"),
        (["semi", "default", "--data", "{data}", "--workers", "-1"], "--workers -1"),
        (["quality", "default", "--data", "{data}", "--views", "1"], "--views 1: wanted a whole number from 2"),
        (["quality", "default", "--data", "/no/such/folder"], "there is no data at"),
        (["quality", "default", "--data", "{data}", "--json", "{data}"], "--json .* is a folder"),
        (["knn", "default", "--data", "{data}", "--device", "cuda:77"], "--device cuda:77: not usable here"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *(argument.format(data=data) for argument in arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lowssl evaluate: ")
    with pytest.raises(UserError, match=message):
        raise UserError(said)
    assert said.count("\n") == 1
