"""The paper's linear protocol, and the crops, the loop and the resumption that it shares with fine-tuning."""

import copy
import functools
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_data import write_checkpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torchvision.transforms import RandomResizedCrop

from lowssl_core.backbones import build_backbone
from lowssl_core.errors import UserError
from lowssl_core.evaluation.labelled import LabelledImages
from lowssl_core.evaluation.linear_protocol import LastBlocks, LinearConfig, linear_run, paper_config
from lowssl_core.evaluation.supervised import SupervisedRun
from lowssl_core.images import BadImage
from lowssl_core.interruption import Interruption, StoppedError
from lowssl_core.photos import open_photos
from lowssl_core.preprocess import Preprocess
from lowssl_core.sources import ArraySource, Image, Source
from lowssl_core.tensor_file import read_tensors
from lowssl_core.views import normalize

CPU = torch.device("cpu")
PREPROCESS = Preprocess(size=16)
QUICK = LinearConfig(batch_size=8, epochs=3, test_every_epochs=2, base_lr=3.0)


open_once = functools.cache(open_photos)


def tiles(split: str, each: int, classes: int = 3) -> ArraySource:
    """So many tiles of each of the first photographs."""
    photos = open_once(split=split)
    labels = np.array([photos.label(i) for i in range(len(photos))])
    chosen = np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(classes)])
    assert photos.classes is not None
    return ArraySource(
        [photos.read(i) for i in chosen],  # type: ignore[misc]
        [photos.name(i) for i in chosen],
        description="tiles",
        labels=labels[chosen].tolist(),
        classes=photos.classes[:classes],
    )


def backbone_with_statistics() -> nn.Module:
    torch.manual_seed(0)
    backbone, _ = build_backbone("resnet_tiny")
    with torch.no_grad():
        for _ in range(20):
            backbone(torch.randn(8, 3, 16, 16))
    return backbone.eval()


def run_of(config: LinearConfig = QUICK, checkpoint: Path | None = None, workers: int = 0) -> SupervisedRun:
    train, test = tiles("train", 7), tiles("test", 4)
    backbone = backbone_with_statistics()
    return linear_run(backbone, PREPROCESS, train, test, config, checkpoint=checkpoint, workers=workers)


class Spoiled(ArraySource):
    """Gray images, each of its number's gray value and class; one of them cannot be read."""

    def __init__(self, count: int = 120, bad: int = 7) -> None:
        images = [np.full((10, 12, 3), number, np.uint8) for number in range(count)]
        names = [str(number) for number in range(count)]
        super().__init__(images, names, description="gray", labels=list(range(count)), classes=names)
        self._bad = bad

    def read(self, index: int) -> Image:
        if index == self._bad:
            raise BadImage("spoiled")
        return super().read(index)


def images_of(source: Source, seed: int = 0, workers: int = 0) -> LabelledImages:
    return LabelledImages(source, Preprocess(size=8), seed=seed, device=CPU, workers=workers)


def grays(images: Tensor) -> list[int]:
    """The gray value that a batch of normalized images has."""
    return (images[:, 0].mean(dim=(1, 2)) * 0.229 + 0.485).mul(255).round().int().tolist()


# Crops and centers


def test_each_crop_comes_with_its_own_image_s_label_also_in_a_bad_image_s_place() -> None:
    epoch = list(islice(images_of(Spoiled()).crops(20), 6))
    for images, labels in epoch:
        assert grays(images) == labels.tolist()
    seen = torch.cat([labels for _, labels in epoch]).tolist()
    assert len(seen) == 120
    assert set(seen) == set(range(120)) - {7}


def test_centers_are_every_good_image_once_as_evaluation_sees_it() -> None:
    photos = tiles("test", 5)
    images, labels = (torch.cat(parts) for parts in zip(*images_of(photos).centers(4), strict=True))
    pixels = np.stack([Preprocess(size=8)(photos.read(i)) for i in range(len(photos))])  # type: ignore[arg-type]
    assert torch.equal(images, normalize(torch.from_numpy(pixels)))
    assert labels.tolist() == [photos.label(i) for i in range(len(photos))]
    seen = [int(label) for _, labels in images_of(Spoiled()).centers(32) for label in labels]
    assert seen == [number for number in range(120) if number != 7]


def test_too_many_bad_images_stop_the_work() -> None:
    for batches in (images_of(Spoiled(50)).crops(10), images_of(Spoiled(50)).centers(10)):
        with pytest.raises(UserError, match=r"1 of 50 images cannot be used.*spoiled"):
            list(islice(batches, 5))


def test_crops_are_boxes_of_the_asked_area_and_half_are_mirrored() -> None:
    ramp = np.zeros((256, 256, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(256)[None, :], np.arange(256)[:, None]
    source = ArraySource([ramp] * 64, [str(i) for i in range(64)], description="ramps", labels=[0] * 64, classes=["a"])
    images = torch.cat([batch for batch, _ in islice(images_of(source).crops(64), 8)])
    red, green = (images[:, i] * s + m for i, (s, m) in enumerate(((0.229, 0.485), (0.224, 0.456))))
    widths, heights = red.mean(1)[:, -1] - red.mean(1)[:, 0], green.mean(2)[:, -1] - green.mean(2)[:, 0]
    areas = widths.abs() * heights * (8 / 7) ** 2  # between the centers of the outer pixels of 8
    assert 0.04 < areas.min() < 0.13
    assert 0.9 < areas.max() < 1.1
    boxes = [RandomResizedCrop.get_params(torch.zeros(3, 256, 256), [0.08, 1], [3 / 4, 4 / 3]) for _ in range(2000)]
    assert areas.mean() == pytest.approx(np.mean([h * w for _, _, h, w in boxes]) / 256**2, abs=0.05)
    assert (widths < 0).float().mean() == pytest.approx(0.5, abs=0.07)
    assert (heights > 0).all()


def test_crops_depend_on_seed_epoch_and_image_alone() -> None:
    def take(batches: Iterator[tuple[Tensor, Tensor]], steps: int) -> list[Tensor]:
        return [images for images, _ in islice(batches, steps)]

    photos = tiles("train", 7)
    straight = take(images_of(photos).crops(5), 10)
    assert all(map(torch.equal, straight[6:], take(images_of(photos).crops(5, 6), 4)))
    assert all(map(torch.equal, straight, take(images_of(photos, workers=1).crops(5), 10)))
    assert not torch.equal(straight[0], take(images_of(photos, seed=1).crops(5), 1)[0])
    assert not torch.equal(straight[0], straight[4])


# The protocol


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_training_is_the_protocol_written_out(optimizer: str, tmp_path: Path) -> None:
    config = LinearConfig(
        batch_size=8, epochs=3, base_lr=3.0, final_lr=0.1, optimizer="lars" if optimizer == "lars" else "sgd"
    )
    run = run_of(config, tmp_path / "state")
    outcome = run.complete("test", Interruption())

    backbone, train = backbone_with_statistics(), tiles("train", 7)
    weight = torch.empty(3, 256).normal_(std=0.01, generator=torch.Generator().manual_seed(config.seed))
    parameters, momenta = [weight, torch.zeros(3)], [torch.zeros(3, 256), torch.zeros(3)]
    crops = LabelledImages(train, PREPROCESS, seed=0, device=CPU).crops(8)
    losses = []
    for epoch in range(3):
        rate = 0.1 + (3.0 * 8 / 256 - 0.1) * (1 + np.cos(np.pi * epoch / 3)) / 2
        for images, labels in islice(crops, 2):
            with torch.no_grad():
                features = backbone(images)
            scores = features @ parameters[0].T + parameters[1]
            losses.append(cross_entropy(scores, labels))
            errors = (scores.softmax(1) - one_hot(labels, 3)) / 8
            gradients = [errors.T @ features, errors.sum(0)]
            if optimizer == "lars":
                gradients[0] *= 0.001 * parameters[0].norm() / gradients[0].norm()
            for place, gradient in enumerate(gradients):
                momenta[place] = 0.9 * momenta[place] + gradient
                parameters[place] = parameters[place] - rate * momenta[place]

    state = read_tensors(tmp_path / "state").tensors
    torch.testing.assert_close(state["model.weight"], parameters[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state["model.bias"], parameters[1], rtol=1e-4, atol=1e-6)
    assert outcome.loss == pytest.approx(float(sum(losses[4:]) / 2), rel=1e-4)
    test = tiles("test", 4)
    pixels = np.stack([PREPROCESS(test.read(i)) for i in range(len(test))])  # type: ignore[arg-type]
    with torch.no_grad():
        answers = (backbone(normalize(torch.from_numpy(pixels))) @ parameters[0].T + parameters[1]).argmax(1)
    assert outcome.top1 == pytest.approx(np.mean(answers.numpy() == [test.label(i) for i in range(len(test))]))


def test_the_defaults_are_the_paper_s() -> None:
    cnn, transformer = paper_config(backbone_with_statistics()), paper_config(build_backbone("vit_tiny")[0])
    assert (cnn.optimizer, cnn.batch_size, cnn.epochs, cnn.learning_rate) == ("lars", 4096, 100, 0.05 * 16)
    assert (transformer.optimizer, transformer.batch_size, transformer.epochs) == ("sgd", 1024, 100)
    assert transformer.learning_rate == pytest.approx(0.04)
    assert (cnn.last_blocks, transformer.last_blocks, transformer.nesterov) == (1, 4, False)


def test_a_transformer_s_features_are_the_normed_cls_of_its_last_blocks_and_end_in_its_own() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny")[0].eval()
    images = torch.randn(2, 3, 32, 32)
    outputs: list[Tensor] = []
    for block in backbone.blocks[-4:]:
        block.register_forward_hook(lambda block, args, output: outputs.append(output))
    with torch.no_grad():
        own = backbone(images)
        expected = torch.cat([backbone.norm(tokens)[:, 0] for tokens in outputs], dim=1)
        features = LastBlocks(backbone, 4)(images)
    assert features.shape == (2, 4 * 192)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(features[:, 3 * 192 :], own)


def test_a_transformer_goes_through_the_protocol() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny")[0]
    config = LinearConfig(optimizer="sgd", batch_size=6, epochs=1, last_blocks=4)
    run = linear_run(backbone, Preprocess(size=32), tiles("train", 2), tiles("test", 2), config)
    assert run.complete("test", Interruption()).top5 is None


@pytest.mark.parametrize(("name", "blocks", "message"), [("resnet_tiny", 4, "CLS"), ("vit_tiny", 13, "12 blocks")])
def test_blocks_that_a_network_has_not_are_refused(name: str, blocks: int, message: str) -> None:
    backbone = build_backbone(name)[0]
    with pytest.raises(UserError, match=message):
        linear_run(backbone, PREPROCESS, tiles("train", 2), tiles("test", 2), LinearConfig(last_blocks=blocks))


def test_the_backbone_stays_as_it_was_and_the_accuracy_is_above_chance() -> None:
    backbone = backbone_with_statistics().train()
    before = copy.deepcopy(backbone.state_dict())
    config = LinearConfig(optimizer="sgd", base_lr=1.0, batch_size=32, epochs=8)
    train, test = tiles("train", 40, classes=10), tiles("test", 12, classes=10)
    run = linear_run(backbone, Preprocess(size=32), train, test, config)
    outcome = run.complete("test", Interruption())
    assert outcome.top1 > 0.35  # the most frequent of ten classes has one in ten
    assert outcome.top5 is not None
    assert outcome.top5 > outcome.top1
    assert outcome.history[0].loss > outcome.history[-1].loss
    assert not backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_a_batch_larger_than_the_data_is_lowered_with_its_rate_and_that_is_said() -> None:
    outcome = run_of(LinearConfig(epochs=1)).complete("test", Interruption())
    assert outcome.config.batch_size == 21
    assert outcome.history[0].learning_rate == pytest.approx(0.05 * 21 / 256)
    assert outcome.notes == (
        "batch 4096 lowered to 21, all the training images; the learning rate with it, from 0.8 to 0.004102",
    )


def test_tests_come_every_few_epochs_and_at_the_end() -> None:
    outcome = run_of().complete("test", Interruption())
    assert [epoch.epoch for epoch in outcome.history] == [1, 2, 3]
    assert [epoch.top1 is not None for epoch in outcome.history] == [False, True, True]
    assert outcome.top1 == outcome.history[-1].top1


# Stopping and going on


def test_a_run_stopped_at_any_step_and_resumed_ends_with_the_bits_of_a_straight_one(tmp_path: Path) -> None:
    straight = run_of(checkpoint=tmp_path / "straight").complete("test", Interruption())
    path = tmp_path / "stopped"
    for taken in (1, 3, 1):  # in the middle of an epoch, at the end of one, and after that
        run = run_of(checkpoint=path, workers=1)
        steps = run.steps()
        for _ in islice(steps, taken):
            pass
        run.save()
        steps.close()  # type: ignore[attr-defined]
        torch.rand(5)  # what happens in between is no matter
    resumed = run_of(checkpoint=path)
    assert resumed.progress.step == 5
    assert resumed.complete("test", Interruption()) == straight
    ends = [read_tensors(tmp_path / name) for name in ("straight", "stopped")]
    assert ends[0].hash == ends[1].hash
    assert ends[0].facts == ends[1].facts


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_heard_after_the_step_and_the_state_is_kept(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    run = run_of(checkpoint=tmp_path / "state")
    with Interruption() as interruption:
        signal.raise_signal(number)
        with pytest.raises(StoppedError) as stopped:
            run.complete("test", interruption)
    assert stopped.value.status == status
    assert run_of(checkpoint=tmp_path / "state").progress.step == 1


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = run_of(checkpoint=tmp_path / "state").complete("test", Interruption())
    again = run_of(checkpoint=tmp_path / "state")
    assert again.progress.is_done
    assert list(again.steps()) == []
    assert again.outcome() == first


def test_another_run_s_state_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "state"
    run_of(checkpoint=path).complete("test", Interruption())
    with pytest.raises(UserError, match=r"another run \(there, here\): epochs \(3, 4\), seed \(0, 1\), weights"):
        run_of(LinearConfig(batch_size=8, epochs=4, test_every_epochs=2, base_lr=3.0, seed=1), path)
    backbone = backbone_with_statistics()
    with pytest.raises(UserError, match=r"\): data \(21 images, \w+, 24 images, \w+\); give another folder"):
        linear_run(backbone, PREPROCESS, tiles("train", 8), tiles("test", 4), QUICK, checkpoint=path)
    backbone.bn1.running_mean += 1  # type: ignore[operator, union-attr]
    with pytest.raises(UserError, match=r"\): weights \(\w+, \w+\);"):
        linear_run(backbone, PREPROCESS, tiles("train", 7), tiles("test", 4), QUICK, checkpoint=path)
    with pytest.raises(UserError, match="no checkpoint of an evaluation"):
        run_of(checkpoint=write_checkpoint(tmp_path / "pretraining"))


# What cannot be


def test_numbers_that_run_away_are_named_and_the_state_before_is_kept(tmp_path: Path) -> None:
    run = run_of(LinearConfig(optimizer="sgd", base_lr=1e38, batch_size=8, epochs=3), tmp_path / "state")
    with pytest.raises(UserError, match=r"epoch 1: the loss or the weights are no numbers.*lower base_lr"):
        run.complete("test", Interruption())
    assert not (tmp_path / "state").exists()


def test_data_that_do_not_go_together_are_refused() -> None:
    backbone, train = backbone_with_statistics(), tiles("train", 2)
    with pytest.raises(UserError, match="different classes"):
        linear_run(backbone, PREPROCESS, train, tiles("test", 2, classes=4), QUICK)
    bare = ArraySource([np.zeros((9, 9, 3), np.uint8)], ["a"], description="bare")
    with pytest.raises(UserError, match="needs labels"):
        linear_run(backbone, PREPROCESS, bare, train, QUICK)
    with pytest.raises(UserError, match="at least 2 images"):
        linear_run(backbone, PREPROCESS, tiles("train", 1, classes=1), tiles("test", 1, classes=1), QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"test_every_epochs": 0}, "test_every_epochs is 0"),
        ({"base_lr": float("nan")}, "base_lr is nan"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"nesterov": True}, "nesterov goes with"),
        ({"last_blocks": 0}, "last_blocks is 0"),
        ({"crop_scale": (0.5, 0.1)}, "crop_scale is"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearConfig(**change)  # type: ignore[arg-type]
