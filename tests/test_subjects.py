"""What can be judged: branches of checkpoints, timm models with weights on this machine, ONNX files, yardsticks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import timm
import torch
from evaluation_data import write_checkpoint, write_data
from torch import Tensor, nn
from torchvision.transforms.functional import normalize as torchvision_normalize

from lowssl_core.encoder import load_encoder, save_encoder
from lowssl_core.errors import UserError
from lowssl_core.evaluation.subjects import PixelEmbedder, check_same_classes, fingerprint, open_subject, open_subjects
from lowssl_core.evaluation.timm_models import load_timm, untrained
from lowssl_core.methods import DINOConfig, MethodConfig, MoCoConfig, SwAVConfig
from lowssl_core.photos import open_photos
from lowssl_core.quality import raw_pixels
from lowssl_core.sources import open_source
from lowssl_core.views import IMAGENET_MEAN, IMAGENET_STD, normalize

INPUTS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DINOConfig(hidden=8, bottleneck=8, outputs=6), ["student", "teacher", "recalibrated"]),
        (MoCoConfig(hidden=8, outputs=6, queue_length=8), ["student", "teacher", "recalibrated"]),
        (SwAVConfig(hidden=8, outputs=6, prototypes=5), ["student", "recalibrated"]),
    ],
)
def test_a_checkpoint_is_judged_in_all_its_branches(config: MethodConfig, expected: list[str], tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "checkpoint.safetensors", config)
    subjects = open_subjects(str(path), recalibrate_on=open_source("photos"))
    assert [subject.name for subject in subjects] == expected
    prints = [fingerprint(subject.embedder) for subject in subjects]
    assert len(set(prints)) == len(prints)
    features = [subject.embedder.embed_inputs(INPUTS) for subject in subjects]
    assert all(not torch.allclose(features[0], other) for other in features[1:])
    assert [s.name for s in open_subjects(str(path), branches=("student",))] == ["student"]


def test_a_branch_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c.safetensors", SwAVConfig(hidden=8, outputs=6, prototypes=5))
    with pytest.raises(UserError, match=r"has no teacher: it has student$"):
        open_subjects(str(path), branches=("teacher",))


def test_a_network_without_batchnorm_has_no_recalibrated_student(tmp_path: Path) -> None:
    path = write_checkpoint(
        tmp_path / "c.safetensors", DINOConfig(hidden=8, bottleneck=8, outputs=6, head_batchnorm=False), "vit_tiny"
    )
    subjects = open_subjects(str(path), recalibrate_on=open_source("photos"))
    assert [subject.name for subject in subjects] == ["student", "teacher"]


def test_an_encoder_file_goes_by_its_own_branch(tmp_path: Path) -> None:
    teacher = load_encoder(write_checkpoint(tmp_path / "c.safetensors"), branch="teacher")
    save_encoder(tmp_path / "teacher.safetensors", teacher.backbone, teacher.info)
    (subject,) = open_subjects(str(tmp_path / "teacher.safetensors"), recalibrate_on=open_source("photos"))
    assert subject.name == "teacher"
    assert open_subject(str(tmp_path / "teacher.safetensors")).name == "teacher"


def test_yardsticks_are_raw_pixels_and_the_network_as_it_starts(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c.safetensors")
    *_, start, pixels = open_subjects(str(path), branches=("student",), yardsticks=True)
    assert (start.name, pixels.name) == ("untrained", "raw pixels")
    assert (start.embedder.info.backbone, start.embedder.info.size) == ("resnet_tiny", 32)
    images = [open_photos(split="test").read(i) for i in range(4)]
    assert isinstance(pixels.embedder, PixelEmbedder)
    inputs = np.stack([pixels.embedder.preprocess(image) for image in images])  # type: ignore[arg-type]
    assert torch.equal(pixels.embedder.embed_inputs(inputs), raw_pixels(images))  # type: ignore[arg-type]


def cached_weights(home: Path, repository: str, model: nn.Module) -> None:
    """Weights where huggingface_hub keeps what was fetched."""
    folder = home / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123456789abcdef")
    snapshot = folder / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, snapshot / "model.safetensors")


def test_a_timm_model_has_its_published_weights_and_its_own_normalization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    torch.manual_seed(3)
    published = timm.create_model(name, pretrained=False)  # a model as published: with its classifier
    cached_weights(tmp_path, f"timm/{name}", published)
    encoder = load_timm(name)
    assert (encoder.info.size, encoder.info.resize) == (224, round(224 / 0.9))
    inputs = np.random.default_rng(1).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    # The oracle: the model's own normalization, by torchvision, and its own forward pass.
    floats = torchvision_normalize(torch.from_numpy(inputs).permute(0, 3, 1, 2) / 255, [0.5] * 3, [0.5] * 3)
    with torch.no_grad():
        expected = published.eval().forward_head(published.forward_features(floats), pre_logits=True)
    torch.testing.assert_close(encoder.embed_inputs(inputs), expected, rtol=1e-4, atol=1e-4)


def test_timm_weights_that_are_not_here_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"not on this machine.*hf download timm/resnet18.a1_in1k model.safetensors$"):
        load_timm("resnet18")
    with pytest.raises(UserError, match="has no published weights of 'mobilenetv2_035'"):
        load_timm("mobilenetv2_035")
    with pytest.raises(UserError, match="timm has no model 'resnet181'"):
        load_timm("resnet181")


def test_imagenets_normalization_is_left_alone() -> None:
    encoder = untrained("resnet_tiny")
    assert not encoder.backbone.conv1._forward_pre_hooks  # type: ignore[union-attr, operator]


class Exported(nn.Module):
    """An encoder's graph: uint8 images in, features and L2-normalised embedding out."""

    def __init__(self, backbone: nn.Module, channels_first: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels_first = channels_first

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        floats = images.float() / 255
        if not self.channels_first:
            floats = floats.permute(0, 3, 1, 2)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        features = self.backbone((floats - mean) / std)
        return nn.functional.normalize(features, dim=1), features


def export(path: Path, module: nn.Module, example: Tensor, names: list[str], **metadata: str) -> None:
    dynamic = {0: torch.export.Dim("batch")} if len(example) > 1 else {}
    torch.onnx.export(
        module.eval(),
        (example,),
        path,
        output_names=names,
        dynamic_shapes=(dynamic,),
        external_data=False,
        verbose=False,
        dynamo=True,
    )
    model = onnx.load(path)
    for key, value in metadata.items():
        model.metadata_props.append(onnx.StringStringEntryProto(key=key, value=value))
    onnx.save(model, path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nhwc", "nchw", "float, batch of 1"])
def test_an_onnx_file_gives_the_features_of_the_network_it_was_made_from(kind: str, tmp_path: Path) -> None:
    encoder = load_encoder("default")
    backbone = encoder.backbone.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    path = tmp_path / "model.onnx"
    if kind == "float, batch of 1":
        export(path, backbone, normalize(torch.from_numpy(INPUTS[:1])).contiguous(), ["embedding"])
    else:
        images = torch.from_numpy(INPUTS if kind == "nhwc" else INPUTS.transpose(0, 3, 1, 2).copy())
        export(path, Exported(backbone, kind == "nchw"), images, ["unit", "features"], resize="40")
    (subject,) = open_subjects(str(path))
    assert subject.name == "onnx"
    assert subject.embedder.info.width == encoder.info.width
    assert subject.embedder.preprocess.resize == (37 if kind.startswith("float") else 40)
    torch.testing.assert_close(
        subject.embedder.embed_inputs(INPUTS), encoder.embed_inputs(INPUTS), rtol=1e-3, atol=1e-4
    )
    with pytest.raises(UserError, match="needs the network itself"):
        _ = subject.encoder


def graph(shape: list[Any], kind: int, rank: int = 2) -> bytes:
    source = onnx.helper.make_tensor_value_info("x", kind, shape)
    result = onnx.helper.make_tensor_value_info("y", kind, [None] * len(shape))
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [source], [result]), opset_imports=[onnx.helper.make_opsetid("", 20)]
    )
    model.ir_version = 10
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no model", "cannot be read as an ONNX model"),
        (graph(["b", 10], onnx.TensorProto.FLOAT), r"input has shape \['b', 10\]"),
        (graph(["b", 3, "h", "w"], onnx.TensorProto.FLOAT), "with fixed S"),
        (graph(["b", 3, 8, 8], onnx.TensorProto.INT32), "tensor.int32.*uint8 or float"),
        (graph(["b", 3, 8, 8], onnx.TensorProto.FLOAT), r"not \(B, width\)"),
    ],
)
def test_other_onnx_files_are_refused_in_one_line(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        open_subjects(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nothing.safetensors", "nothing.onnx", "resnet18", "untrained:nothing", "timm:"])
def test_a_model_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(UserError) as caught:
        open_subjects(name)
    assert "\n" not in str(caught.value)


def test_data_that_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    one = open_source(str(write_data(tmp_path / "one", 1, 1)))
    two = open_source(str(write_data(tmp_path / "two", 1, 1, ("cat", "coffee", "rocket"))))
    with pytest.raises(UserError, match="tissue only in --data, rocket only in --eval-data"):
        check_same_classes(one, two)
    bare = open_source(str(tmp_path / "one" / "train" / "cat"))
    with pytest.raises(UserError, match=r"--eval-data: .*no labels: this task needs labels"):
        check_same_classes(one, bare)


def test_fingerprints_tell_weights_and_preprocessing_apart(tmp_path: Path) -> None:
    encoder = load_encoder(write_checkpoint(tmp_path / "c.safetensors"))
    info = save_encoder(tmp_path / "e.safetensors", encoder.backbone, encoder.info)
    assert json.dumps(info.weights_hash)
    other = untrained("resnet_tiny", like=encoder.info), untrained("resnet_tiny"), untrained("resnet_tiny", seed=1)
    assert len({fingerprint(each) for each in (encoder, *other)}) == 4
    assert fingerprint(load_encoder(tmp_path / "e.safetensors")) == fingerprint(encoder)
