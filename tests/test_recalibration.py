import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lowssl_core.backbones import build_backbone
from lowssl_core.command_line import main
from lowssl_core.encoder import Encoder, EncoderInfo, load_encoder, save_encoder
from lowssl_core.recalibration import mixed_batches, recalibrate_batchnorm
from lowssl_core.sources import ArraySource

INFO = EncoderInfo(name="test", backbone="resnet_tiny", width=256, size=16, resize=18)


def fresh_backbone(drop_path: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("resnet_tiny", drop_path)[0]


def normed(backbone: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in backbone.modules() if isinstance(layer, nn.BatchNorm2d)]


def uneven_batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [
        torch.randn(count, 3, 16, 16) * scale + shift for count, scale, shift in ((12, 1, 0), (5, 3, 1), (2, 1, -2))
    ]


def test_one_batch_gives_what_batchnorm_itself_computes() -> None:
    batch = torch.randn(16, 3, 16, 16, generator=torch.manual_seed(1))
    backbone = fresh_backbone()
    expected = copy.deepcopy(backbone).train()
    for layer in normed(expected):
        layer.momentum = 1.0
    with torch.no_grad():
        expected(batch)
    done = recalibrate_batchnorm(backbone, [batch])
    assert (done.layers, done.images) == (len(normed(backbone)), 16)
    for layer, same in zip(normed(backbone), normed(expected), strict=True):
        torch.testing.assert_close(layer.running_mean, same.running_mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.running_var, same.running_var, atol=1e-5, rtol=1e-4)


def test_statistics_are_those_of_all_values_of_all_batches_together() -> None:
    backbone = fresh_backbone()
    seen: dict[nn.Module, list[Tensor]] = {}
    observed = copy.deepcopy(backbone).train()
    for layer in normed(observed):
        layer.register_forward_pre_hook(lambda layer, args: seen.setdefault(layer, []).append(args[0].double()))
    with torch.no_grad():
        for batch in uneven_batches():
            observed(batch)
    recalibrate_batchnorm(backbone, uneven_batches())
    for layer, twin in zip(normed(backbone), normed(observed), strict=True):
        values = torch.cat([value.transpose(0, 1).flatten(1) for value in seen[twin]], dim=1)
        torch.testing.assert_close(layer.running_mean, values.mean(1).float(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.running_var, values.var(1).float(), atol=1e-5, rtol=1e-4)


def test_neither_earlier_statistics_nor_momentum_nor_stochastic_depth_matter() -> None:
    results = []
    for momentum, drop_path in ((0.1, 0.0), (None, 0.9)):
        backbone = fresh_backbone(drop_path)
        for layer in normed(backbone):
            layer.momentum = momentum
            layer.running_mean.uniform_(5, 6)
        recalibrate_batchnorm(backbone, uneven_batches())
        assert not backbone.training
        assert all(layer.momentum == momentum for layer in normed(backbone))
        results.append(torch.cat([layer.running_mean for layer in normed(backbone)]))
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)


def test_a_backbone_without_batchnorm_is_left_alone_and_the_images_unread() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4))
    assert recalibrate_batchnorm(backbone, iter(lambda: pytest.fail("read"), None)).layers == 0


@pytest.mark.parametrize("batches", [[], [torch.zeros(1, 3, 16, 16)]])
def test_no_images_and_lonely_images_are_refused_and_nothing_changes(batches: list[Tensor]) -> None:
    backbone = fresh_backbone()
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(ValueError, match="image"):
        recalibrate_batchnorm(backbone, batches)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_batches_are_mixed_limited_and_never_of_one_image() -> None:
    images = [np.full((16, 16, 3), level, np.uint8) for level in range(100)]
    source = ArraySource(images, [str(level) for level in range(100)], description="levels")
    encoder = Encoder(fresh_backbone(), INFO)
    batches = list(mixed_batches(source, encoder, limit=33, batch_size=8))
    assert [len(batch) for batch in batches] == [8, 8, 8, 8]
    levels = torch.cat(batches)[:, 0, 0, 0]
    assert len(levels.unique()) == 32
    assert not torch.equal(levels, levels.sort().values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(9):
        image = Image.fromarray(rng.integers(0, 256, (24, 30, 3)).astype(np.uint8))
        image.save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    save_encoder(tmp_path / "encoder.safetensors", fresh_backbone(), INFO)
    return tmp_path


def test_the_command_writes_a_recalibrated_encoder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "new" / "encoder.safetensors"
    argv = ["recalibrate", str(folder / "encoder.safetensors"), "--data", str(folder / "images"), "--out", str(out)]
    assert main([*argv, "--device", "cpu"]) == 0
    assert "on 9 images" in capsys.readouterr().out
    encoder = load_encoder(out)
    assert encoder.info.branch == "recalibrated"
    assert all(layer.running_mean.abs().max() > 0 for layer in normed(encoder.backbone))


def test_the_command_says_when_there_is_no_batchnorm(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone, width = build_backbone("vit_tiny")
    path, out = folder / "vit.safetensors", folder / "out.safetensors"
    info = EncoderInfo(name="test", backbone="vit_tiny", width=width, size=16, resize=18)
    saved = save_encoder(path, backbone, info)
    assert main(["recalibrate", str(path), "--data", str(folder / "images"), "--out", str(out), "--device", "cpu"]) == 0
    assert "vit_tiny has no BatchNorm" in capsys.readouterr().out
    assert load_encoder(out).info == saved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "missing.safetensors"}, "No such file"),
        ({"checkpoint": "images/0.png"}, "no safetensors file"),
        ({"--data": "nowhere"}, "nowhere"),
        ({"--data": "images/broken.png"}, "cannot be used as data"),
        ({"--images": "1"}, "at least 2 images"),
        ({"--out": "images"}, "is a folder"),
        ({"--device": "toaster"}, "toaster"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], message: str
) -> None:
    given = {"checkpoint": "encoder.safetensors", "--data": "images", "--out": "new.safetensors"} | changes
    paths = {
        key: str(folder / value) if key in ("checkpoint", "--data", "--out") else value for key, value in given.items()
    }
    options = [part for key, value in paths.items() if key != "checkpoint" for part in (key, value)]
    assert main(["recalibrate", paths["checkpoint"], *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (folder / "new.safetensors").exists()
