from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowssl_core.command_line import main
from lowssl_core.figures import GLOBAL, LOCAL, curves_figure, neighbors_figure, views_figure
from lowssl_core.views import ViewsConfig, measure

RECIPE = "dino-mobilenetv2-matched"


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.kron(rng.integers(0, 256, (height // 10, width // 10, 3)), np.ones((10, 10, 1))).astype(np.uint8)


def count_pixels(path: Path, color: str) -> int:
    """How many pixels of a PNG have exactly this color."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return int((pixels == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum())


@pytest.mark.parametrize(("num_locals", "local_size"), [(6, "matched"), (1, 30), (0, 12)])
def test_views_figure_shows_globals_and_locals_in_their_colors(
    tmp_path: Path, num_locals: int, local_size: int
) -> None:
    config = ViewsConfig(global_size=24, num_locals=num_locals, local_size=local_size)
    image = np.zeros((40, 60, 3), np.uint8)
    views_figure(tmp_path / "v.png", image, config, measure(config, np.array([[40, 60]])))
    assert count_pixels(tmp_path / "v.png", GLOBAL) > 1000
    assert (count_pixels(tmp_path / "v.png", LOCAL) > 1000) == (num_locals > 0)


def test_views_figure_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    config = ViewsConfig(global_size=24, num_locals=2)
    measured = measure(config, np.array([[40, 60]]))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        views_figure(tmp_path / name, picture(), config, measured, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_neighbors_figure_shows_each_image_as_often_as_it_is_found(tmp_path: Path) -> None:
    colors = ("#102030", "#405060", "#708090")
    images = [np.full((8, 8, 3), [int(color[i : i + 2], 16) for i in (1, 3, 5)], np.uint8) for color in colors]
    neighbors = np.array([[1, 2], [2, 0], [1, 0]])
    neighbors_figure(tmp_path / "n.png", images, [0, 1], neighbors, np.ones((3, 2), np.float32))
    seen = [count_pixels(tmp_path / "n.png", color) for color in colors]
    # Two columns: 0 above 1 and 2, 1 above 2 and 0.
    assert min(seen) > 5000
    assert max(seen) < 1.05 * min(seen)


def test_curves_figure_has_a_panel_for_each_measure_there_is(tmp_path: Path) -> None:
    training = [{"images": 64, "loss": 3.0, "global_loss": 2.5, "local_loss": 3.2}]
    unlabelled = [{"images": 0, "retrieval": 0.1, "rankme": 5.0}, {"images": 64, "retrieval": 0.2, "rankme": 6.0}]
    labelled = [row | {"knn": 0.5} for row in unlabelled]
    baselines = {"raw pixels": {"retrieval": 0.3, "knn": 0.6}, "random network": {"retrieval": 0.3}}
    widths = []
    for index, rows in enumerate(([], unlabelled, labelled)):
        path = tmp_path / f"{index}.png"
        curves_figure(path, training, rows, baselines, title="a run")
        with Image.open(path) as figure:
            widths.append(figure.width)
    assert widths == [width * widths[0] for width in (1, 2, 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.fromarray(picture(120, 160)).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_the_command_prints_the_matched_size_and_writes_the_figure(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "new" / "views.png"
    assert main(["views", RECIPE, "--data", str(folder / "images"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "2 x 224 px    6 x 128 px" in printed
    expected = measure(ViewsConfig(local_size=128), np.array([[120, 160]]))
    assert f"{expected.ratio:.3f}" in printed
    assert f"{expected.matched_size} px" in printed
    with Image.open(out) as image:
        assert image.format == "PNG"


def test_the_command_measures_images_as_a_run_shrinks_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["views", RECIPE, "--data", str(folder / "images"), "--out", str(folder / "v.png")]
    assert main([*argv, "--set", "data.shrink_to=60", "--set", "views.local_size=matched"]) == 0
    expected = measure(ViewsConfig(), np.array([[60, 80]]))
    assert f"{expected.global_pixel_scale:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "no-such-recipe"}, "no-such-recipe"),
        ({"--data": "nowhere"}, "nowhere"),
        ({"--data": "empty"}, "empty"),
        ({"--data": ""}, "data path is empty"),
        ({"--out": "images"}, "is a folder"),
        ({"--out": "images/0.png/v.png"}, "images/0.png"),
        ({"--set": "views.local_size=big"}, "views.local_size"),
        ({"--set": "views.local_size"}, "key=value"),
        ({"--set": "views.global_scale=[0.0, 1.0]"}, "global_scale"),
        ({"recipe": "dino-vit-tiny-matched"}, "multiples of 16"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    given = {"recipe": RECIPE, "--data": "images", "--out": "v.png", "--set": "views.local_size=100"} | changes
    options = [part for key, value in given.items() if key != "recipe" for part in (key, value)]
    assert main(["views", given["recipe"], *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (folder / "v.png").exists()
