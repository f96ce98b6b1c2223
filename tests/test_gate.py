import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_data import write_data
from numpy.typing import NDArray
from PIL import Image
from registry_data import Place, add_pixel_encoder, check_whole, write_file

from lowssl_core.errors import UserError
from lowssl_core.images import Pixels
from lowssl_core.neighbors import knn_accuracy
from lowssl_core.photos import open_photos
from lowssl_core.preprocess import Preprocess
from lowssl_core.quality import retrieval_copy
from lowssl_core.sources import open_source
from lowssl_core.sources.memory import load_images
from server.registry.blobs import DamagedFileError
from server.registry.gate import judge, judge_and_promote
from server.registry.registry import Registry, open_registry
from server.registry.report import GateReport

WHO = "a test"
Projection = NDArray[np.float32]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 48 packaged tiles: quick to measure."""
    folder = tmp_path_factory.mktemp("probe")
    source = open_photos(split="test")
    for index in range(0, 144, 3):
        image = source.read(index)
        assert isinstance(image, np.ndarray)
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture
def place(tmp_path: Path, probe: Path) -> Place:
    return Place(tmp_path / "data", probe=probe)


@pytest.fixture
def registry(place: Place) -> Iterator[Registry]:
    opened = open_registry(place)
    yield opened
    opened.close()


def good(width: int = 64, seed: int = 0) -> Projection:
    """Orthogonal directions: the angles between images are nearly those of their pixels."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(192, width)))[0].astype(np.float32)


def of_rank(rank: int) -> Projection:
    return good(rank) @ good(64)[:rank]


def names_of_failed(report: GateReport) -> set[str]:
    return {check.name for check in report.failed}


def pooled(images: list[Pixels]) -> NDArray[np.float64]:
    """What the made-up encoder sees, by numpy: 8 x 8 mean colors, channel by channel, less their mean."""
    inputs = np.stack([Preprocess(size=32, resize=37)(image) for image in images]).astype(np.float64)
    blocks = inputs.reshape(len(images), 8, 4, 8, 4, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2)
    rows = blocks.reshape(len(images), -1)
    return rows - rows.mean(axis=1, keepdims=True)


def units(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_figures_are_those_of_the_encoder_run_by_hand(
    registry: Registry, place: Place, probe: Path, tmp_path: Path
) -> None:
    version = add_pixel_encoder(registry, tmp_path, good())
    report = judge(registry, version, place)
    images, _, _ = load_images(open_source(str(probe)))
    features = pooled(images) @ good().astype(np.float64) + 1e-3
    values = np.linalg.svd(features, compute_uv=False)
    shares = values / values.sum()
    assert report.figures["rankme"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    found = []
    moved = []
    for seed in range(2):
        copies = [retrieval_copy(image, seed, index) for index, image in enumerate(images)]
        copied = units(pooled(copies) @ good().astype(np.float64) + 1e-3)
        cosines = copied @ units(features).T
        found += (cosines.argmax(axis=1) == np.arange(len(images))).tolist()
        moved.append(copied)
    assert report.figures["retrieval"] == pytest.approx(np.mean(found))
    near = np.square(moved[0] - moved[1]).sum(axis=1).mean()
    distances = np.square(units(features)[:, None] - units(features)[None]).sum(axis=2)
    far = distances.sum() / (len(images) * (len(images) - 1))
    assert report.figures["alignment"] == pytest.approx(near, rel=1e-4)
    assert report.figures["relative_alignment"] == pytest.approx(near / far, rel=1e-4)
    assert report.passed
    assert report.against is None
    assert [check.name for check in report.checks] == ["runs", "parity", "spread", "directions"]
    assert judge(registry, version, place) == report


@pytest.mark.parametrize(
    ("projection", "failed"),
    [
        (np.zeros((192, 64), np.float32), {"spread", "directions"}),
        (np.full((192, 64), np.nan, np.float32), {"runs"}),
        (of_rank(1), {"directions"}),
    ],
    ids=["constant", "not finite", "one direction"],
)
def test_a_collapsed_or_broken_encoder_is_refused_though_nothing_serves(
    registry: Registry, place: Place, tmp_path: Path, projection: Projection, failed: set[str]
) -> None:
    add_pixel_encoder(registry, tmp_path, projection)
    version, report = judge_and_promote(registry, "v1", place, who=WHO)
    assert version.state == "refused"
    assert names_of_failed(report) == failed
    assert registry.serving() is None
    event = registry.events("v1")[-1]
    assert (event.action, event.report) == ("refuse", report)
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["passed"] is False


def test_a_file_that_is_not_what_the_registry_says_does_not_pass(
    registry: Registry, place: Place, tmp_path: Path
) -> None:
    honest = add_pixel_encoder(registry, tmp_path, good())
    for content, reason in (
        (b"no graph at all", "cannot be loaded"),
        (registry.fetch(honest).read_bytes().replace(b"pixels", b"lasers"), "metadata are not those in the registry"),
    ):
        files = {"onnx": write_file(tmp_path, content)}
        liar = registry.add(kind="pretrained", description=honest.description, files=files, who=WHO)
        report = judge(registry, liar, place)
        assert names_of_failed(report) == {"runs"}
        assert reason in report.failed[0].why
        assert "\n" not in report.failed[0].why
    registry.fetch(honest).write_bytes(b"damaged")
    with pytest.raises(DamagedFileError, match=r"v1 \(onnx\)"):
        judge(registry, honest, place)


@pytest.mark.parametrize(
    ("kind", "described", "failed"),
    [
        ("pretrained", {"parity": 2e-4}, {"parity"}),
        ("pretrained", {"parity": None}, {"parity"}),
        ("imported", {"parity": None}, set()),
        ("pretrained", {"precision": "fp16", "agreement": {"cosine": 0.99995}}, set()),
        ("pretrained", {"precision": "fp16", "agreement": {"cosine": 0.9998}}, {"cosine"}),
        ("pretrained", {"precision": "int8", "agreement": {"centered_cosine": 0.99, "neighbors": 0.97}}, {"neighbors"}),
        ("pretrained", {"precision": "int8"}, {"centered cosine", "neighbors"}),
        ("imported", {"precision": "int8", "parity": None}, set()),
    ],
)
def test_parity_and_agreement_are_held_to_the_bounds_of_export(
    registry: Registry, place: Place, tmp_path: Path, kind: str, described: dict[str, object], failed: set[str]
) -> None:
    version = add_pixel_encoder(registry, tmp_path, good(), kind=kind, **described)  # type: ignore[arg-type]
    assert names_of_failed(judge(registry, version, place)) == failed


def test_an_encoder_worse_than_the_one_that_serves_is_refused_and_one_as_good_replaces_it(
    registry: Registry, place: Place, tmp_path: Path
) -> None:
    for projection in (good(), of_rank(4), good(seed=1), good(96, seed=2), of_rank(24)):
        add_pixel_encoder(registry, tmp_path, projection)
    assert judge_and_promote(registry, "v1", place, who=WHO)[0].state == "serving"
    version, report = judge_and_promote(registry, "v2", place, who=WHO)
    assert version.state == "refused"
    assert report.against == "v1"
    assert {"rankme", "retrieval"} <= names_of_failed(report)
    assert version.metrics == report.figures
    # Another basis of the same size, and then a wider one: as good.
    for name, before in (("v3", "v1"), ("v4", "v3")):
        version, report = judge_and_promote(registry, name, place, who=WHO)
        assert (version.state, report.against) == ("serving", before), report.failed
    with pytest.raises(UserError, match="v4 serves already"):
        judge_and_promote(registry, "v4", place, who=WHO)
    # Someone knows better.
    version, report = judge_and_promote(registry, "v5", place, who="someone", why="a trial", force=True)
    assert not report.passed
    assert version.state == "serving"
    event = registry.events("v5")[-1]
    assert (event.action, event.who, event.why, event.report) == ("force", "someone", "a trial", report)
    check_whole(registry)


def test_what_is_known_of_the_serving_version_is_what_would_be_measured(
    registry: Registry, place: Place, tmp_path: Path
) -> None:
    for projection in (good(), good(seed=1)):
        add_pixel_encoder(registry, tmp_path, projection)
    registry.promote("v1", who=WHO)
    measured = judge(registry, registry.version("v2"), place)
    registry.promote("v2", who=WHO)
    judge_and_promote(registry, "v1", place, who=WHO)
    assert judge(registry, registry.version("v2"), place) == measured


def test_a_version_that_cannot_be_measured_does_not_hold_up_its_successor(
    registry: Registry, place: Place, tmp_path: Path
) -> None:
    for projection in (np.full((192, 64), np.nan, np.float32), good()):
        add_pixel_encoder(registry, tmp_path, projection)
    registry.promote("v1", who=WHO)
    version, report = judge_and_promote(registry, "v2", place, who=WHO)
    assert version.state == "serving"
    assert report.checks[-1].name == "comparison"
    assert "v1, which serves, cannot be measured" in report.checks[-1].why


def test_a_version_is_judged_again_where_another_came_to_serve_meanwhile(
    registry: Registry, place: Place, tmp_path: Path
) -> None:
    for projection in (good(), good(seed=1), good(seed=2)):
        add_pixel_encoder(registry, tmp_path, projection)
    judge_and_promote(registry, "v1", place, who=WHO)
    steps: list[str] = []

    def promote_another(step: str) -> None:
        steps.append(step)
        if len(steps) == 1:
            registry.promote("v3", who="someone else")

    version, report = judge_and_promote(registry, "v2", place, who=WHO, on_step=promote_another)
    assert steps.count("measuring v2") == 2
    assert (version.state, report.against) == ("serving", "v3")


def test_labels_count_where_there_are_any(tmp_path: Path, probe: Path) -> None:
    write_data(tmp_path / "labelled")
    place = Place(tmp_path / "data", probe=probe, probe_labelled=tmp_path / "labelled")
    registry = open_registry(place)
    for projection in (good(), of_rank(2)):
        add_pixel_encoder(registry, tmp_path, projection)
    version, report = judge_and_promote(registry, "v1", place, who=WHO)
    train, test = (open_source(str(tmp_path / "labelled"), split=split) for split in ("train", "test"))
    sides = []
    for source in (train, test):
        images, labels, _ = load_images(source)
        sides += [pooled(images) @ good().astype(np.float64) + 1e-3, torch.tensor(labels)]
    assert version.metrics["knn"] == pytest.approx(knn_accuracy(sides[0], sides[1], sides[2], sides[3]))
    assert "k-NN" in report.probe
    worse = judge(registry, registry.version("v2"), place)
    assert [check.name for check in worse.checks][-1] == "knn"
    assert worse.checks[-1].bound == pytest.approx(version.metrics["knn"] - 0.03)
    registry.close()


def test_images_that_cannot_be_used_are_named(registry: Registry, tmp_path: Path, probe: Path) -> None:
    version = add_pixel_encoder(registry, tmp_path, good())
    (tmp_path / "few").mkdir()
    for index in range(3):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(tmp_path / "few" / f"{index}.png")
    cases: list[tuple[Place, str]] = [
        (Place(tmp_path, probe=tmp_path / "nowhere"), "nowhere"),
        (Place(tmp_path, probe=tmp_path / "few"), "3 readable images; judging takes 16 or more"),
        (Place(tmp_path, probe=probe, probe_labelled=probe), f"probe_labelled {probe}: "),
    ]
    for place, reason in cases:
        with pytest.raises(UserError, match=reason) as caught:
            judge(registry, version, place)
        assert "\n" not in str(caught.value)
    assert registry.version("v1").state == "candidate"
