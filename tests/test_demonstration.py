import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lowssl_core import demo_federation
from lowssl_core.command_line import main as lowssl
from lowssl_core.encoder import load_encoder
from lowssl_core.neighbors import knn_accuracy
from lowssl_core.pretrain import main as pretrain
from server.demonstration.dirt import through_dirt
from server.demonstration.outcome import Figures
from server.demonstration.scenes import CAMERAS, Scenes, make_scenes
from server.demonstration.settings import Settings
from server.federation.history import History
from server.federation.plan import Plan
from server.simulation.courses import COURSES, World
from server.simulation.federations import FederationSettings
from server.simulation.judge import NEIGHBORS
from server.simulation.link import Watch

SHORT = ("epochs=1", "views.global_size=16", "views.num_locals=2", "data.batch_size=16", "data.shrink_to=18")
ROUNDS, STEPS, IMAGES = 2, 3, 24
PATIENCE = 600.0


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return make_scenes(IMAGES, seed=0)


@pytest.fixture(scope="module")
def run(scenes: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, trained for a moment on what a camera sees."""
    root = tmp_path_factory.mktemp("run")
    (root / "images").mkdir()
    scenes.deliver("camera-1", 0, root / "images")
    settings = [part for each in SHORT for part in ("--set", each)]
    words = ["tiny-dino-matched", "--data", str(root / "images"), "--out", str(root / "run"), "--workers", "0"]
    assert pretrain([*words, *settings]) == 0
    return root / "run"


@pytest.fixture
def server(run: Path, tmp_path: Path) -> Path:
    """The folder of a server that serves the run's encoder."""
    folder = tmp_path / "server"
    words = ["--data-dir", str(folder)]
    assert lowssl(["registry", "import", str(run / "encoder.safetensors"), *words]) == 0
    assert lowssl(["registry", "promote", "v1", *words]) == 0
    return folder


def test_real_devices_federate_and_are_compared_with_devices_alone(
    run: Path,
    server: Path,
    scenes: Scenes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (("ROUNDS", ROUNDS), ("STEPS", STEPS), ("IMAGES", IMAGES)):
        monkeypatch.setattr(demo_federation, name, value)
    out, picture = tmp_path / "federation", tmp_path / "federation.png"
    assert demo_federation.why_not() == ""
    status = demo_federation.federate(run / "checkpoint.safetensors", server, out, picture)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert programs_of(tmp_path) == []

    results = demo_federation.read_results(out)
    history = History(server / "federation")
    first, last = history.load(0), history.load(ROUNDS)
    assert first is not None
    assert last is not None
    assert not np.array_equal(first.flat, last.flat)
    assert [len(record.accepted) for record in history.records()] == [0, 3, 3]
    assert [len(results["shared"]), len(results["pooled"])] == [ROUNDS, ROUNDS]
    assert {name: len(values) for name, values in results["alone"].items()} == {c.name: ROUNDS for c in CAMERAS}
    assert results["start"] == pytest.approx(accuracy_of_encoder(run, scenes), abs=0.02)  # its file holds fp32, too
    assert [row["round"] for row in results["versions"]] == [1, 2]
    assert {row["state"] for row in results["versions"]} <= {"serving", "retired", "refused"}
    assert results["sentence"] in printed.out
    with Image.open(picture) as figure:
        figure.verify()

    # The same as one process comes to, which simulates the server's rounds and the devices.
    simulated = simulate(scenes, history, server / "federation", tmp_path / "simulated")
    np.testing.assert_allclose(last.flat, simulated, rtol=0, atol=1e-5)

    # The devices had what the yardsticks had: the second part came half-way, to the pixel.
    for camera in CAMERAS:
        files = sorted((out / camera.name / "images").iterdir())
        images = [np.array(Image.open(path)) for path in files]
        wanted = [scenes.seen.read(int(index)) for part in scenes.streams[camera.name].parts for index in part]
        np.testing.assert_array_equal(images, wanted)


def simulate(scenes: Scenes, history: History, federation: Path, folder: Path) -> np.ndarray:
    """The global model that a simulation on the same images ends with."""
    plan = Plan.from_json((federation / "plan.json").read_text())
    settings = Settings(
        checkpoint=folder, server=folder, out=folder, picture=folder, rounds=ROUNDS, steps=STEPS, images=IMAGES
    )
    begun = history.load(0)
    assert begun is not None
    world = World(
        recipe=plan.recipe,
        seed=0,
        federation=FederationSettings(plan=plan, learner=settings.learner()),
        manifest=history.manifest,
        start=begun.flat,
        source=scenes.seen,
        streams=scenes.streams,
        rounds=ROUNDS,
    )
    with closing(COURSES["federated"](world, folder, Watch(lambda: None, lambda: None))) as course:
        for number in range(1, ROUNDS + 1):
            course.run_round(number)
        return course.shared()


def accuracy_of_encoder(run: Path, scenes: Scenes) -> float:
    """k-NN accuracy of the run's encoder, by its file and the plain function."""
    encoder = load_encoder(run / "encoder.safetensors")
    features, labels = [], []
    for source in (scenes.bank, scenes.asked):
        features.append(encoder.embed([source.read(index) for index in range(len(source))]))  # type: ignore[misc]
        labels.append(torch.tensor([source.label(index) for index in range(len(source))]))
    return knn_accuracy(features[0], labels[0], features[1], labels[1], k=NEIGHBORS)


def test_a_signal_ends_all_of_it(run: Path, server: Path, tmp_path: Path) -> None:
    paths = {"checkpoint": run / "checkpoint.safetensors", "server": server, "out": tmp_path / "federation"}
    paths["picture"] = tmp_path / "federation.png"
    words = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    words += ["--rounds", "2", "--steps", "100000", "--images", "24"]
    command = [sys.executable, "-m", "server.demonstration", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            wait_for(lambda: (tmp_path / "federation" / "camera-1.log").exists() or process.poll() is not None)
            process.send_signal(signal.SIGTERM)
            assert process.stderr.read() == b"lowssl demo: stopped by SIGTERM\n"
            assert process.wait() == 143
        finally:
            process.kill()
    assert programs_of(tmp_path) == []


def test_a_server_that_cannot_start_is_one_line_that_names_its_log(run: Path, tmp_path: Path) -> None:
    (tmp_path / "server").write_text("a file")
    paths = {
        "checkpoint": run / "checkpoint.safetensors",
        "server": tmp_path / "server",
        "out": tmp_path / "federation",
    }
    paths["picture"] = tmp_path / "federation.png"
    words = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    words += ["--rounds", "2", "--steps", "1", "--images", "24"]
    command = [sys.executable, "-m", "server.demonstration", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("lowssl demo: ")
    assert done.stderr.count("\n") == 1
    assert programs_of(tmp_path) == []


def programs_of(folder: Path) -> list[str]:
    """The command lines that run on something in a folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if int(path.parent.name) != os.getpid() and any(str(folder) in word for word in words):
            lines.append(" ".join(words))
    return lines


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_camera_sees_its_places_alone_and_others_once_it_is_turned(scenes: Scenes) -> None:
    classes = scenes.seen.classes or ()
    for camera in CAMERAS:
        stream = scenes.streams[camera.name]
        for part, places in zip(stream.parts, camera.places, strict=True):
            assert {classes[scenes.seen.label(int(index)) or 0] for index in part} == set(places)
            assert len(part) == IMAGES
        assert [len(stream.arriving(number, 4)) for number in (1, 2, 3, 4)] == [IMAGES, 0, IMAGES, 0]
    seen_by_all = {place for camera in CAMERAS for places in camera.places for place in places}
    assert seen_by_all == set(classes)


def test_dirt_hides_two_fifths_of_an_image_and_leaves_the_rest_as_it_is() -> None:
    white = np.full((64, 64, 3), 255, np.uint8)
    dirty = np.stack([through_dirt(white, np.random.default_rng(seed)) for seed in range(20)])
    dark = round(0.15 * 255)
    assert (dirty.min(), dirty.max()) == (dark, 255)
    assert ((255 - dirty.astype(float)) / (255 - dark)).mean() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(
    ("last", "word"), [(0.53, "more than"), (0.51, "level with"), (0.49, "level with"), (0.47, "fewer than")]
)
def test_words_follow_the_figures(last: float, word: str) -> None:
    alone = {"a": [0.3, 0.3, 0.4], "b": [0.5, 0.5, 0.6]}
    figures = Figures(start=0.5, shared=[0.5, 0.5, last], alone=alone, pooled=[0.5, 0.5, last], asked=500, half=1)
    assert figures.error == pytest.approx(0.022, abs=0.001)  # sqrt(.5 x .5 / 500)
    assert f" {word} the start (50 of 100), {word} a device alone (50 of 100) and level with " in figures.sentence()
    assert figures.mean_alone == pytest.approx([0.4, 0.4, 0.5])
    (row,) = (line for line in figures.table().splitlines() if line.startswith("global model"))
    assert row.split()[2:] == ["50.0", "50.0", f"{100 * last:.1f}"]
