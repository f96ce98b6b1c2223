"""The detector sees what the encoder sees, starts from its weights, and trains all of them."""

import numpy as np
import pytest
import torch
from torch import nn

from lowssl_core.backbones import build_backbone
from lowssl_core.compute import synchronise_batchnorm
from lowssl_core.detection.network import NetworkConfig, Pyramid, build_detector, decay_groups, to_device
from lowssl_core.detection.recipe import DetectionRecipe, detection_recipe_names, load_detection_recipe
from lowssl_core.encoder import load_encoder
from lowssl_core.errors import UserError
from lowssl_core.photos import open_photos
from lowssl_core.recipe import differences
from lowssl_core.schedules import Progress
from lowssl_core.views import normalize

SMALL = NetworkConfig(
    short_side=64, long_side=96, smallest_anchor=16, channels=16, hidden=32, proposals=50, regions=16, detections=20
)
BACKBONES = ("mobilenetv2", "resnet18", "resnet34", "resnet_tiny")


def tiles(count: int) -> torch.Tensor:
    """Tiles of photographs, normalized: (count, 3, 64, 64)."""
    photos = open_photos(split="test")
    return normalize(torch.from_numpy(np.stack([photos.read(index) for index in range(count)])))


@pytest.mark.parametrize("name", BACKBONES)
def test_stage_features_are_those_of_the_classification_path(name):
    torch.manual_seed(0)
    backbone, width = build_backbone(name)
    pyramid = Pyramid(backbone.eval(), width, 16)
    images = tiles(2)
    modules = {stage["reduction"]: stage["module"] for stage in backbone.feature_info if stage["reduction"] > 2}
    seen: dict[str, torch.Tensor] = {}
    for module in modules.values():
        backbone.get_submodule(module).register_forward_hook(lambda part, _, out, name=module: seen.update({name: out}))
    features = backbone(images)
    along_the_path = dict(seen)
    stages = pyramid.stages(images)
    assert [tuple(stage.shape[2:]) for stage in stages] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    for stage, stride in zip(stages[:3], (4, 8, 16), strict=True):
        assert torch.equal(stage, along_the_path[modules[stride]])
    assert stages[3].shape[1] == width
    torch.testing.assert_close(stages[3].mean((2, 3)), features, rtol=1e-5, atol=1e-6)


def test_an_encoders_weights_arrive_and_all_of_them_are_trained():
    encoder, again = load_encoder("default"), load_encoder("default")
    torch.manual_seed(0)
    detector = to_device(build_detector(encoder.backbone, encoder.info.width, 3, SMALL), torch.device("cpu"))
    state = detector.backbone.backbone.state_dict()
    assert state.keys() == again.backbone.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in again.backbone.state_dict().items())
    images = tiles(2)
    torch.testing.assert_close(
        detector.eval().backbone.stages(images)[3].mean((2, 3)), again.backbone(images), rtol=1e-5, atol=1e-6
    )
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, 10:50, 20:60] = 1
    target = {"boxes": torch.tensor([[20.0, 10, 60, 50]]), "labels": torch.tensor([2]), "masks": mask}
    losses = detector.train()([torch.rand(3, 64, 64)] * 2, [target] * 2)
    torch.stack(list(losses.values())).sum().backward()
    still = [name for name, parameter in detector.named_parameters() if parameter.grad is None]
    assert still == []
    assert all(parameter.grad.abs().sum() > 0 for parameter in detector.backbone.backbone.parameters())


def test_images_reach_the_backbone_as_encoders_see_them():
    pixels = open_photos(split="test").read(5)
    detector = build_detector(*build_backbone("resnet_tiny"), 1, SMALL)
    seen, _ = detector.eval().transform([torch.from_numpy(pixels).permute(2, 0, 1).float() / 255])
    torch.testing.assert_close(seen.tensors, normalize(torch.from_numpy(pixels)[None]), rtol=1e-5, atol=1e-5)


def test_short_and_long_side_bound_the_image():
    detector = build_detector(*build_backbone("resnet_tiny"), 1, SMALL).eval()
    for (height, width), expected in {(128, 160): (64, 80), (40, 200): (19, 96), (32, 32): (64, 64)}.items():
        seen, _ = detector.transform([torch.rand(3, height, width)])
        assert seen.image_sizes == [expected]


def test_regions_are_read_where_they_lie_whatever_batch_came_first():
    """The box head's input of a linear ramp over the image is the ramp at the region's cells, at each level."""
    detector = build_detector(*build_backbone("resnet_tiny"), 1, SMALL)
    pool = detector.roi_heads.box_roi_pool
    for height, width, box, read_from in [(70, 65, (4.0, 8, 30, 40), 4), (256, 256, (16.0, 32, 200, 240), 16)]:
        padded = [-(-side // 32) * 32 for side in (height, width)]
        maps = {}
        for level, stride in enumerate((4, 8, 16, 32)):
            rows, columns = (torch.arange(side // stride).float() * stride + stride / 2 for side in padded)
            maps[str(level)] = (1000 * rows[:, None] + columns)[None, None]
        cells = pool(maps, [torch.tensor([box])], [(height, width)])[0, 0]
        steps = [(torch.arange(7) + 0.5) * (box[end + 2] - box[end]) / 7 + box[end] for end in (0, 1)]
        # RoIAlign takes a map's entries to lie at its cells' corners: it is half a stride off.
        off = (cells - 1000 * steps[1][:, None] - steps[0]) / 1001
        torch.testing.assert_close(off, torch.full_like(off, read_from / 2), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "message"), [("vit_tiny", r"VisionTransformer.* has \[16\]"), ("mobilenetv2_tiny", "")]
)
def test_a_backbone_without_four_stages_is_refused(name, message):
    with pytest.raises(UserError, match=f"strides 4, 8, 16 and 32.*{message}"):
        build_detector(*build_backbone(name), 3, SMALL)


@pytest.mark.parametrize("name", ["mobilenetv2_035", "resnet_tiny"])
def test_synchronised_batchnorm_computes_the_same_function(name):
    torch.manual_seed(0)
    pyramid = Pyramid(*build_backbone(name), 16).eval()
    images = tiles(2)
    expected = pyramid(images)
    converted = synchronise_batchnorm(pyramid)
    kinds = {type(module) for module in converted.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert all(issubclass(kind, nn.SyncBatchNorm) for kind in kinds)
    assert all(torch.equal(expected[level], value) for level, value in converted(images).items())


def test_every_parameter_is_in_one_group_and_norms_do_not_decay():
    detector = build_detector(*build_backbone("mobilenetv2_035"), 3, SMALL)
    decaying, still = decay_groups(detector, 0.1)
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.1, 0.0)
    names = [*decaying["names"], *still["names"]]
    assert sorted(names) == sorted(name for name, _ in detector.named_parameters())
    modules = {name.rpartition(".")[0] for name in still["names"]}
    assert all(isinstance(detector.get_submodule(each), nn.modules.batchnorm._BatchNorm) for each in modules)
    assert "backbone.backbone.bn1.weight" in still["names"]
    assert "roi_heads.box_head.fc6.bias" in decaying["names"]


# Recipes


def test_the_paper_scale_recipe_is_the_1x_schedule():
    recipe = load_detection_recipe("coco-1x")
    assert differences(recipe, DetectionRecipe()) == []
    assert (recipe.iterations, recipe.batch_size, recipe.network.short_side) == (90_000, 16, 800)
    rates = {0: 2e-5, 500: 0.01001, 1000: 0.02, 59_999: 0.02, 60_000: 0.002, 79_999: 0.002, 80_000: 0.0002}
    for step, rate in rates.items():
        progress = Progress(step=step, total_steps=90_000, steps_per_epoch=7330)
        assert recipe.optim.learning_rate(progress) == pytest.approx(rate)


def test_every_recipe_can_be_read_and_changed():
    assert detection_recipe_names() == ["coco-1x", "tiny-1x"]
    for name in detection_recipe_names():
        changed = load_detection_recipe(name, ["optim.lr=0.5", "monitor.evaluate_every=7", "optim.steps=[3, 4]"])
        assert (changed.optim.lr, changed.monitor.evaluate_every, changed.optim.steps) == (0.5, 7, (3, 4))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning=1", "unknown key optim.learning; optim has lr, momentum"),
        ("iterations=0", "iterations is 0; it is a whole number from 1"),
        ("optim.steps=[5]", "optim.steps is [5]; it is a list of 2 numbers"),
        ("optim.steps=[5, 4]", "optim.steps is [5, 4]; it is two iterations, the earlier first"),
        ("optim.lr=nan", "optim.lr is nan"),
        ("optim.momentum=1", "optim.momentum is 1.0"),
        ("network.channels=0", "network.channels is 0"),
        ("network.long_side=100", "network.long_side is 100, shorter than short_side (800)"),
        ("monitor.evaluate_every=0", "monitor.evaluate_every is 0"),
        ("max_bad_fraction=1", "max_bad_fraction is 1.0"),
        ("seed=-1", "seed is -1"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_key(override, message):
    with pytest.raises(UserError) as caught:
        load_detection_recipe("coco-1x", [override])
    assert message in str(caught.value)


def test_a_recipe_that_is_nowhere_is_refused_with_the_names_there_are():
    with pytest.raises(UserError, match="'coco-2x' is neither a TOML file nor one of coco-1x, tiny-1x"):
        load_detection_recipe("coco-2x")
