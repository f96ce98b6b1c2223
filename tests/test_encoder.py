import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from lowssl_core import encoder as encoder_module
from lowssl_core.backbones import BackboneConfig, build_backbone
from lowssl_core.checkpoint import save_checkpoint, take_checkpoint
from lowssl_core.encoder import EncoderInfo, load_encoder, save_encoder
from lowssl_core.errors import UserError
from lowssl_core.loader import DataConfig
from lowssl_core.methods import DINOConfig, MoCoConfig, SwAVConfig
from lowssl_core.methods.method import Method
from lowssl_core.preprocess import Preprocess
from lowssl_core.recipe import Recipe
from lowssl_core.schedules import Progress
from lowssl_core.views import IMAGENET_MEAN, IMAGENET_STD

INFO = EncoderInfo(
    name="a test", backbone="resnet_tiny", width=256, size=16, resize=18, method="dino", images_seen=12, data="noise"
)


def backbone_with_statistics(seed: int = 0) -> nn.Module:
    """A backbone whose running statistics are not those of a fresh one."""
    torch.manual_seed(seed)
    backbone, _ = build_backbone("resnet_tiny")
    with torch.no_grad():
        backbone(torch.randn(8, 3, 16, 16))
    return backbone.eval()


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (20 + i, 40 - i, 3)).astype(np.uint8) for i in range(count)]


def test_features_equal_one_image_at_a_time_written_out() -> None:
    backbone, images = backbone_with_statistics(), pictures(5)
    rows = []
    with torch.no_grad():
        for image in images:
            pixels = Preprocess(size=16, resize=18)(image) / 255
            normal = (pixels - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
            rows.append(backbone(torch.tensor(normal, dtype=torch.float32).permute(2, 0, 1)[None])[0])
    features = encoder_module.Encoder(backbone, INFO).embed(iter(images), batch_size=2)
    torch.testing.assert_close(features, torch.stack(rows), atol=1e-4, rtol=1e-4)


def test_embedding_needs_evaluation_mode_and_images() -> None:
    backbone = backbone_with_statistics()
    with pytest.raises(ValueError, match="training mode"):
        encoder_module.embed(backbone.train(), pictures(1), Preprocess(size=16))
    with pytest.raises(ValueError, match="no images"):
        encoder_module.Encoder(backbone, INFO).embed([])


def test_an_encoder_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    backbone = backbone_with_statistics().to(memory_format=torch.channels_last)
    info = save_encoder(tmp_path / "e.safetensors", backbone, INFO)
    loaded = load_encoder(tmp_path / "e.safetensors")
    assert loaded.info == info == dataclasses.replace(INFO, weights_hash=info.weights_hash)
    assert len(info.weights_hash) == 64
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(loaded.backbone.state_dict()[name], value, atol=0, rtol=0)


def test_half_precision_halves_the_file_and_keeps_the_features(tmp_path: Path) -> None:
    backbone = backbone_with_statistics()
    save_encoder(tmp_path / "whole.safetensors", backbone, INFO)
    save_encoder(tmp_path / "half.safetensors", backbone, INFO, half=True)
    whole, half = (tmp_path / f"{name}.safetensors" for name in ("whole", "half"))
    assert half.stat().st_size < 0.52 * whole.stat().st_size
    loaded = load_encoder(half)
    assert next(loaded.backbone.parameters()).dtype == torch.float32
    features = load_encoder(whole).embed(pictures(4))
    assert torch.cosine_similarity(loaded.embed(pictures(4)), features).min() > 0.9999


def test_other_weights_have_another_hash(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    hashes = {save_encoder(path, backbone_with_statistics(seed), INFO).weights_hash for seed in (0, 0, 1)}
    assert len(hashes) == 2


def change_a_weight(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def rewrite_facts(**changes: object) -> Callable[[bytes], bytes]:
    def rewrite(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lowssl"])
        metadata["facts"] |= changes
        return safetensors.torch.save(safetensors.torch.load(data), {"lowssl": json.dumps(metadata)})

    return rewrite


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_a_weight, "do not match the hash"),
        (lambda data: data[:-100], "damaged or no safetensors"),
        (lambda data: b"", "damaged or no safetensors"),
        (lambda data: b"this is not a model", "damaged or no safetensors"),
        (lambda data: safetensors.torch.save({"x": torch.zeros(1)}), "not written by LowSSL"),
        (lambda data: safetensors.torch.save({"x": torch.zeros(1)}, {"lowssl": "[1"}), "metadata cannot be read"),
        (lambda data: safetensors.torch.save({"x": torch.zeros(1)}, {"lowssl": "[1]"}), "metadata cannot be read"),
        (rewrite_facts(backbone="resnet18"), "512 wide|256 wide"),
        (rewrite_facts(backbone="resnet18", width=512), "do not fit the backbone"),
        (rewrite_facts(backbone="no_such_net"), "no_such_net"),
        (rewrite_facts(size="16"), "size is '16'"),
        (rewrite_facts(branch="both"), "branch is 'both'"),
        (rewrite_facts(resize=3), "size <= resize"),
        (rewrite_facts(colour="red"), "colour"),
    ],
)
def test_a_file_that_is_damaged_or_mismatched_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "e.safetensors"
    save_encoder(path, backbone_with_statistics(), INFO)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["missing.safetensors", "."])
def test_what_is_no_file_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        load_encoder(tmp_path / path)


def checkpoint_file(folder: Path, method_config: DINOConfig | MoCoConfig | SwAVConfig) -> tuple[Path, Method]:
    """A checkpoint of a method whose student and teacher differ, and the method."""
    recipe = Recipe(
        method=method_config, backbone=BackboneConfig(name="resnet_tiny"), data=DataConfig(batch_size=4), epochs=2
    )
    torch.manual_seed(0)
    method = recipe.method.build(recipe.backbone, 4)
    with torch.no_grad():
        for parameter in method.online.backbone.parameters():
            parameter.mul_(1.5)
    facts = {"data": {"images": 9, "description": "noise"}, "preprocess": {"size": 16, "resize": 20}}
    progress = Progress(step=3, total_steps=4, steps_per_epoch=2)
    checkpoint = take_checkpoint(method, recipe.optim.build(method), recipe=recipe, progress=progress, facts=facts)
    path = folder / "a run" / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint)
    return path, method


@pytest.mark.parametrize("config", [DINOConfig(hidden=8, outputs=6), MoCoConfig(hidden=8, outputs=6, queue_length=8)])
def test_a_checkpoint_is_an_encoder_of_either_branch(tmp_path: Path, config: DINOConfig | MoCoConfig) -> None:
    path, method = checkpoint_file(tmp_path, config)
    assert method.teacher is not None
    student, teacher = load_encoder(path), load_encoder(path, branch="teacher")
    assert student.info == EncoderInfo(
        name="a run",
        backbone="resnet_tiny",
        width=256,
        size=16,
        resize=20,
        method=config.name,
        recipe_hash=student.info.recipe_hash,
        branch="student",
        images_seen=12,
        data="noise",
    )
    assert teacher.info == dataclasses.replace(student.info, branch="teacher")
    for encoder, network in ((student, method.online), (teacher, method.teacher)):
        expected = encoder_module.Encoder(network.backbone, encoder.info).embed(pictures(3))
        torch.testing.assert_close(encoder.embed(pictures(3)), expected, atol=1e-5, rtol=1e-5)


def test_a_method_without_a_moving_average_has_no_teacher_to_load(tmp_path: Path) -> None:
    path, _ = checkpoint_file(tmp_path, SwAVConfig(hidden=8, outputs=6, prototypes=5))
    with pytest.raises(UserError, match="no teacher"):
        load_encoder(path, branch="teacher")


def test_the_default_encoder_loads_or_says_that_it_is_not_there() -> None:
    packaged = Path(encoder_module.__file__).parent / "weights" / "default.safetensors"
    if packaged.exists():
        assert load_encoder("default").embed(pictures(2)).shape[0] == 2
        assert packaged.stat().st_size <= 6_000_000
    else:
        with pytest.raises(UserError, match="no default encoder"):
            load_encoder("default")
