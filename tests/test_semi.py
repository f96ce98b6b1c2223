"""Fine-tuning on a share of the labels: the lists, what is kept of a head, and training."""

import copy
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_data import write_checkpoint
from test_linear_protocol import tiles
from torch import nn
from torch.nn.functional import cross_entropy

from lowssl_core.backbones import build_backbone
from lowssl_core.checkpoint import Checkpoint, backbone_state, load_checkpoint
from lowssl_core.encoder import load_encoder
from lowssl_core.errors import UserError
from lowssl_core.evaluation.labelled import LabelledImages, Subset
from lowssl_core.evaluation.semi import (
    SemiConfig,
    head_layers,
    label_list,
    read_list,
    semi_config,
    semi_run,
    write_list,
)
from lowssl_core.evaluation.supervised import SupervisedRun
from lowssl_core.interruption import Interruption
from lowssl_core.methods import DINOConfig, MethodConfig, MoCoConfig, SwAVConfig
from lowssl_core.preprocess import Preprocess
from lowssl_core.sources import ArraySource, Image, Source
from lowssl_core.tensor_file import read_tensors

METHODS: dict[str, MethodConfig] = {
    "dino": DINOConfig(hidden=24, bottleneck=8, outputs=16),
    "moco": MoCoConfig(hidden=24, outputs=8, queue_length=16),
    "swav": SwAVConfig(hidden=24, outputs=8, prototypes=6, queue_length=8),
}
HIDDEN_LAYERS = {"dino": 2, "moco": 1, "swav": 1}
PREPROCESS = Preprocess(size=16)
QUICK = SemiConfig(batch_size=8, epochs=3, base_lr=0.3)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: write_checkpoint(root / name, config) for name, config in METHODS.items()}


def names_of(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def some(source: Source) -> list[str]:
    """All names but every fifth."""
    return [name for place, name in enumerate(names_of(source)) if place % 5]


def run_of(path: Path, checkpoint: Path | None = None, config: SemiConfig = QUICK) -> SupervisedRun:
    encoder, head = load_encoder(path), head_layers(load_checkpoint(path), "student")
    train, test = tiles("train", 7), tiles("test", 3)
    return semi_run(encoder.backbone, head, PREPROCESS, train, some(train), test, config, checkpoint=checkpoint)


# Lists of labelled images


def labelled(counts: list[int]) -> tuple[list[str], list[int]]:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return [f"train/{label}/{place}.jpg" for place, label in enumerate(labels)], labels


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ([1300, 732, 1000], 0.01, [10, 10, 10]),
        ([1300, 732, 1000], 0.1, [101, 101, 101]),
        ([40, 60], 0.01, [1, 1]),
        ([3, 100], 0.1, [3, 5]),
        ([5, 5, 5], 1.0, [5, 5, 5]),
    ],
)
def test_every_class_gives_nearly_as_many_and_at_least_one(
    counts: list[int], share: float, expected: list[int]
) -> None:
    names, labels = labelled(counts)
    chosen = label_list(names, labels, share, seed=0)
    assert len(set(chosen)) == len(chosen)
    given = Counter(name.split("/")[1] for name in chosen)
    for label, count in enumerate(expected):
        assert 0 <= given[str(label)] - count <= 1
    assert len(chosen) == max(int(share * len(names)), len(counts)) or counts == [3, 100]


def test_a_share_is_rounded_down_as_in_the_published_lists() -> None:
    # ImageNet-1k has 1,281,167 images and the published lists 12,811 and 128,116.
    names, labels = labelled([1286] * 3 + [1287] * 7)
    for share, count in ((0.01, 128), (0.1, 1286)):
        given = Counter(name.split("/")[1] for name in label_list(names, labels, share, seed=0))
        assert given.total() == count
        assert set(given.values()) == {count // 10, count // 10 + 1}
    assert len(label_list(*labelled([50, 50]), 0.29, seed=0)) == 29


def test_a_list_depends_on_the_seed_and_the_images_and_not_on_their_order() -> None:
    names, labels = labelled([50, 70, 60])
    chosen = label_list(names, labels, 0.1, seed=0)
    pairs = list(zip(names, labels, strict=True))
    random.Random(0).shuffle(pairs)
    assert label_list(*zip(*pairs, strict=True), 0.1, seed=0) == chosen  # type: ignore[arg-type]
    assert label_list(names, labels, 0.1, seed=1) != chosen


def test_a_list_is_the_same_everywhere() -> None:
    # What sha256sum and sort make of lines like "0 train/0/0.jpg": two of each class, and 1/6 before 0/4.
    assert label_list(*labelled([6, 6]), 0.42, seed=0) == [
        "train/0/0.jpg",
        "train/0/3.jpg",
        "train/1/10.jpg",
        "train/1/6.jpg",
        "train/1/7.jpg",
    ]


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_shares_that_cannot_be_are_refused(share: float) -> None:
    with pytest.raises(UserError, match="share"):
        label_list(*labelled([3, 3]), share, seed=0)


def imagenet_like() -> ArraySource:
    names = ["train/n01/n01_1.JPEG", "train/n01/n01_2.JPEG", "train/n02/n02_1.JPEG", "train/n02/1.JPEG", "1.JPEG"]
    return ArraySource([np.zeros((9, 9, 3), np.uint8)] * 5, names, description="like ImageNet")


def test_a_list_comes_back_from_its_file(tmp_path: Path) -> None:
    source = imagenet_like()
    write_list(tmp_path / "list.txt", names_of(source)[1:])
    assert read_list(tmp_path / "list.txt", source) == names_of(source)[1:]


def test_a_published_list_of_file_names_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "1percent.txt"
    path.write_bytes(b"n02_1.JPEG\r\nn01_2.JPEG\n\nn02/1.JPEG\nn02_1.JPEG\n1.JPEG")
    assert read_list(path, imagenet_like()) == [
        "train/n02/n02_1.JPEG",
        "train/n01/n01_2.JPEG",
        "train/n02/1.JPEG",
        "1.JPEG",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"n01_1.JPEG\nn09.JPEG\n01_2.JPEG\n", "2 of 3 names are not in like ImageNet: n09.JPEG, 01_2.JPEG$"),
        (b"a\nb\nc\nd\n", "4 of 4 names .*: a, b, c ..."),
        (b"\n \n", "empty"),
        (b"\xff\xfe\x00", "not a text file"),
        (None, "No such file"),
    ],
)
def test_lists_that_cannot_be_used_are_refused_in_one_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        read_list(tmp_path / "list.txt", imagenet_like())
    assert "\n" not in str(refused.value)


def test_a_name_that_is_several_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("x.png\n")
    source = ArraySource([np.zeros((9, 9, 3), np.uint8)] * 2, ["a/x.png", "b/x.png"], description="twins")
    with pytest.raises(UserError, match=r"1 of 1 names are the names of several images of twins: x\.png"):
        read_list(tmp_path / "list.txt", source)


# Heads


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("branch", ["student", "teacher"])
def test_a_head_s_hidden_layers_are_the_checkpoint_s(name: str, branch: str, checkpoints: dict[str, Path]) -> None:
    checkpoint = load_checkpoint(checkpoints[name])
    network = "online" if branch == "student" else "teacher"
    # Distinct values everywhere, so that a layer taken from elsewhere would be found out.
    tensors = {
        key: torch.full_like(value, number) if ".head." in key and value.is_floating_point() else value
        for number, (key, value) in enumerate(sorted(checkpoint.tensors.items()))
    }
    checkpoint = Checkpoint(recipe=checkpoint.recipe, progress=checkpoint.progress, facts={}, tensors=tensors)
    if name == "swav" and branch == "teacher":
        with pytest.raises(UserError, match="no teacher"):
            head_layers(checkpoint, "teacher")
        return
    layers = head_layers(checkpoint, "student" if branch == "student" else "teacher")
    assert sum(isinstance(layer, nn.Linear) for layer in layers) == HIDDEN_LAYERS[name]
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in layers) == (0 if name == "moco" else HIDDEN_LAYERS[name])
    assert isinstance(layers[-1], nn.GELU if name == "dino" else nn.ReLU)
    state = layers.state_dict()
    assert state
    for key, value in state.items():
        assert torch.equal(value, tensors[f"method.{network}.head.0.{key}"])
    assert all(parameter.requires_grad for parameter in layers.parameters())


# Fine-tuning


@pytest.mark.parametrize("name", METHODS)
def test_training_starts_from_the_checkpoint_and_moves_all_but_what_it_was_given(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(checkpoints[name])
    encoder, head = load_encoder(checkpoints[name]), head_layers(checkpoint, "student")
    given = copy.deepcopy(nn.Sequential(encoder.backbone, head).state_dict())
    train, test = tiles("train", 7), tiles("test", 3)
    run = semi_run(encoder.backbone, head, PREPROCESS, train, some(train), test, QUICK, checkpoint=tmp_path / "state")
    run.save()
    start = read_tensors(tmp_path / "state").tensors
    for key, value in backbone_state(checkpoint, "student").items():
        assert torch.equal(start[f"model.backbone.{key}"], value)
    for key, value in head.state_dict().items():
        assert torch.equal(start[f"model.head.{key}"], checkpoint.tensors[f"method.online.head.0.{key}"])
        assert torch.equal(start[f"model.head.{key}"], value)
    assert start["model.classifier.weight"].shape == (3, 24)
    outcome = run.complete("test", Interruption())
    end = read_tensors(tmp_path / "state").tensors
    still = [key for key, value in start.items() if key.startswith("model.") and torch.equal(value, end[key])]
    assert still == []
    after = nn.Sequential(encoder.backbone, head).state_dict()
    assert all(torch.equal(value, after[key]) for key, value in given.items())
    assert not encoder.backbone.training
    layers = "2 pre-trained layers" if name == "dino" else "1 pre-trained layer"
    assert outcome.notes == (f"the head is {layers} of the method's head and a new linear layer",)


def test_training_is_nesterov_s_written_out(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    run_of(checkpoints["dino"], tmp_path / "state").complete("test", Interruption())
    backbone = load_encoder(checkpoints["dino"]).backbone
    head = head_layers(load_checkpoint(checkpoints["dino"]), "student")
    classifier = nn.Linear(24, 3)
    with torch.no_grad():
        classifier.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(QUICK.seed))
        classifier.bias.zero_()
    network = nn.Sequential(backbone, head, classifier).requires_grad_(True).train()
    velocities = [torch.zeros_like(parameter) for parameter in network.parameters()]
    train = tiles("train", 7)
    listed = Subset(train, [place for place in range(len(train)) if place % 5])
    crops = LabelledImages(listed, PREPROCESS, seed=0, device=torch.device("cpu")).crops(8)
    for epoch in range(3):
        rate = 1e-6 + (0.3 * 8 / 256 - 1e-6) * (1 + np.cos(np.pi * epoch / 3)) / 2
        for images, labels in islice(crops, 2):
            loss = cross_entropy(network(images), labels)
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for parameter, velocity, gradient in zip(network.parameters(), velocities, gradients, strict=True):
                    velocity.mul_(0.9).add_(gradient)
                    parameter.sub_(rate * (gradient + 0.9 * velocity))
    tensors = read_tensors(tmp_path / "state").tensors
    assert sum(key.startswith("model.") for key in tensors) == len(network.state_dict())
    for part, module in zip(("backbone", "head", "classifier"), network, strict=True):
        for key, value in module.state_dict().items():
            torch.testing.assert_close(tensors[f"model.{part}.{key}"], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_stopped_at_any_step_and_resumed_ends_with_the_bits_of_a_straight_one(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    straight = run_of(checkpoints[name], tmp_path / "straight").complete("test", Interruption())
    for taken in (1, 2):
        run = run_of(checkpoints[name], tmp_path / "stopped")
        for _ in islice(run.steps(), taken):
            pass
        run.save()
    assert run_of(checkpoints[name], tmp_path / "stopped").complete("test", Interruption()) == straight
    ends = [read_tensors(tmp_path / end) for end in ("straight", "stopped")]
    different = [key for key, value in ends[0].tensors.items() if not torch.equal(value, ends[1].tensors[key])]
    assert different == []
    assert ends[0].facts == ends[1].facts


def test_dropout_draws_the_same_after_a_stop(tmp_path: Path) -> None:
    backbone, _ = build_backbone("resnet_tiny")
    train, test = tiles("train", 7), tiles("test", 3)

    def run_at(path: Path) -> SupervisedRun:
        head = nn.Sequential(nn.Dropout())
        return semi_run(backbone, head, PREPROCESS, train, some(train), test, QUICK, checkpoint=path)

    straight = run_at(tmp_path / "straight").complete("test", Interruption())
    run = run_at(tmp_path / "stopped")
    for _ in islice(run.steps(), 3):
        pass
    run.save()
    torch.rand(5)
    assert run_at(tmp_path / "stopped").complete("test", Interruption()) == straight


def test_only_the_listed_images_are_looked_at() -> None:
    class Watched(ArraySource):
        read_names: set[str]

        def read(self, index: int) -> Image:
            self.read_names.add(self.name(index))
            return super().read(index)

    plain = tiles("train", 7)
    images = [plain.read(index) for index in range(len(plain))]
    labels = [plain.label(index) for index in range(len(plain))]
    train = Watched(images, names_of(plain), description="watched", labels=labels, classes=plain.classes)  # type: ignore[arg-type]
    train.read_names = set()
    backbone, _ = build_backbone("resnet_tiny")
    semi_run(backbone, None, PREPROCESS, train, some(train), tiles("test", 3), QUICK).complete("test", Interruption())
    assert train.read_names == set(some(train))


def test_without_a_head_a_linear_layer_stands_on_the_backbone_and_that_is_said(tmp_path: Path) -> None:
    backbone, width = build_backbone("resnet_tiny")
    train, test = tiles("train", 7), tiles("test", 3)
    config, path = SemiConfig(epochs=1), tmp_path / "state"
    run = semi_run(backbone, None, PREPROCESS, train, some(train), test, config, checkpoint=path)
    outcome = run.complete("test", Interruption())
    assert read_tensors(path).tensors["model.classifier.weight"].shape == (3, width)
    assert not any(key.startswith("model.head") for key in read_tensors(path).tensors)
    no_head, lowered = outcome.notes
    assert "no pre-trained head" in no_head
    assert lowered.startswith("batch 1024 lowered to 16, all the training images; the learning rate with it, from 0.12")


@pytest.mark.parametrize("name", METHODS)
def test_fine_tuning_from_each_method_s_checkpoint_is_above_chance(name: str, checkpoints: dict[str, Path]) -> None:
    encoder, head = load_encoder(checkpoints[name]), head_layers(load_checkpoint(checkpoints[name]), "student")
    train, test = tiles("train", 30), tiles("test", 12)
    labels = [train.label(index) for index in range(len(train))]
    names = label_list(names_of(train), labels, 0.5, seed=0)  # type: ignore[arg-type]
    assert len(names) == 45
    config = SemiConfig(batch_size=16, epochs=15, base_lr=0.5)
    outcome = semi_run(encoder.backbone, head, Preprocess(size=32), train, names, test, config).complete(
        "test", Interruption()
    )
    assert outcome.top1 > 0.6  # one in three is chance
    assert outcome.history[-1].loss < outcome.history[0].loss


def test_a_name_that_is_not_in_the_data_is_refused() -> None:
    backbone, _ = build_backbone("resnet_tiny")
    train = tiles("train", 2)
    with pytest.raises(UserError, match=r"1 images are not in tiles: nobody\.jpg"):
        semi_run(backbone, None, PREPROCESS, train, ["nobody.jpg", train.name(0)], tiles("test", 2), QUICK)


def test_the_defaults_are_the_paper_s() -> None:
    config = semi_config(0.01)
    assert config == SemiConfig()
    assert (config.optimizer, config.nesterov, config.momentum) == ("sgd", True, 0.9)
    assert (config.learning_rate, config.batch_size, config.epochs) == (0.12, 1024, 60)
    assert semi_config(0.1) == SemiConfig(epochs=30)
