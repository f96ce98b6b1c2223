import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from evaluation_data import write_checkpoint
from export_models import lively_encoder, photographs, tiles
from google.protobuf import text_format
from torch import Tensor, nn

import lowssl_core.encoder
import lowssl_core.views
from lowssl_core.backbones import BACKBONES
from lowssl_core.command_line import main
from lowssl_core.encoder import Encoder, load_encoder, save_encoder
from lowssl_core.errors import UserError
from lowssl_core.evaluation.onnx_encoder import OnnxEncoder
from lowssl_core.evaluation.subjects import open_subjects
from lowssl_core.evaluation.timm_models import renormalize, untrained
from lowssl_core.export import description as described
from lowssl_core.export.checks import measure_agreement, missed_bounds, nearest_other
from lowssl_core.export.description import Description
from lowssl_core.export.exporting import ExportReport, RefusedExport, export_encoder
from lowssl_core.export.speed import milliseconds_an_image
from lowssl_core.photos import open_photos

SIZES = {"mobilenetv2": 64, "resnet18": 64, "resnet34": 64, "vit_tiny": 64, "resnet_tiny": 32, "mobilenetv2_tiny": 32}


@pytest.fixture(scope="module")
def tiny() -> Encoder:
    return lively_encoder("resnet_tiny", 32)


@pytest.fixture(scope="module")
def tiny_report(tiny: Encoder, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export_encoder(tiny, tmp_path_factory.mktemp("tiny") / "tiny.onnx")


@pytest.fixture(scope="module")
def tiny_file(tiny_report: ExportReport) -> Path:
    return tiny_report.path


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])


def properties(path: Path) -> dict[str, str]:
    """Metadata as a server reads them: through ONNX Runtime."""
    return dict(session(path).get_modelmeta().custom_metadata_map)


def largest_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# What a file says of itself.


def describe(**changes: object) -> Description:
    facts = {"name": "an encoder", "version": "v3", "backbone": "resnet18", "width": 512, "size": 224, "resize": 256}
    return Description(**(facts | changes))  # type: ignore[arg-type]


def test_a_description_survives_its_way_through_text() -> None:
    full = describe(
        method="dino",
        recipe_hash="abc",
        weights_hash="def",
        branch="teacher",
        images_seen=12,
        data="photos, split train: 1877 images",
        licence="CC0-1.0",
        precision="int8",
        layout="nchw",
        parity=3.25e-7,
        agreement={"cosine": 0.9991, "centered_cosine": 0.1 + 0.2, "neighbors": 0.98},
    )
    for description in (full, describe()):
        assert Description.from_properties(description.to_properties(), of="file") == description


def test_a_description_holds_all_that_is_known_of_an_encoder() -> None:
    names = {entry.name for entry in dataclasses.fields(Description)}
    assert {entry.name for entry in dataclasses.fields(lowssl_core.encoder.EncoderInfo)} < names
    assert described.Branch == lowssl_core.encoder.Branch
    assert described.MEAN == lowssl_core.views.IMAGENET_MEAN
    assert described.STD == lowssl_core.views.IMAGENET_STD


@pytest.mark.parametrize("name", ["name", "version", "backbone", "width", "size", "resize", "branch", "layout", "data"])
def test_a_description_with_an_entry_missing_is_refused_by_name(name: str) -> None:
    text = describe().to_properties()
    del text[name]
    with pytest.raises(UserError, match=f"^FILE: its metadata cannot be used: no entry '{name}'$"):
        Description.from_properties(text, of="FILE")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "lowssl-onnx-2"}, "format 'lowssl-onnx-2', not 'lowssl-onnx-1'"),
        ({"format": ""}, "was not exported by LowSSL"),
        ({"width": "many"}, "width is 'many', not a number"),
        ({"width": "0"}, "width is 0"),
        ({"size": "300"}, "size 300 and resize 256"),
        ({"images_seen": "-1"}, "images_seen -1"),
        ({"branch": "twig"}, "branch is 'twig'; it is one of student, teacher, recalibrated"),
        ({"precision": "int4"}, "it is one of fp32, fp16, int8"),
        ({"layout": "NHWC"}, "it is one of nhwc, nchw"),
        ({"parity": "small"}, "parity is 'small', not a number"),
        ({"parity": "nan"}, "parity is nan, not a finite number"),
        ({"agreement.cosine": "inf"}, "agreement in cosine is inf"),
        ({"agreement.mood": "1.0"}, "agreement has mood; it may have cosine"),
        ({"crop": "random"}, "its crop is 'random'; images are prepared with 'center'"),
        ({"interpolation": "nearest"}, "its interpolation is 'nearest'"),
        ({"version": ""}, "name and version must not be empty"),
    ],
)
def test_a_description_with_a_wrong_entry_is_refused_in_one_line(changes: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=r"^FILE") as refused:
        Description.from_properties(describe().to_properties() | changes, of="FILE")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_other_programs_add_to_the_metadata_is_passed_over() -> None:
    text = describe().to_properties() | {"onnx.infer": "onnxruntime.quant"}
    assert Description.from_properties(text, of="FILE") == describe()


def test_reading_a_description_takes_neither_torch_nor_onnx() -> None:
    program = (
        "import sys; import lowssl_core.export.description\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# The graph gives what the network gives.


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_a_file_gives_torch_features_at_every_batch_size(name: str, tmp_path: Path) -> None:
    encoder = lively_encoder(name, SIZES[name])
    pictures = photographs(9)
    expected = encoder.embed(pictures)
    report = export_encoder(encoder, tmp_path / "e.onnx")
    assert report.description.parity is not None
    assert report.description.parity < 1e-4

    judged = OnnxEncoder(report.path)
    assert judged.preprocess == encoder.preprocess
    inputs = np.stack([judged.preprocess(picture) for picture in pictures])
    for batch in (1, 3, 8):
        found = torch.cat([judged.embed_inputs(inputs[start : start + batch]) for start in range(0, 9, batch)])
        assert largest_difference(found, expected) < 1e-4
    _, embedding = session(report.path).run(None, {"images": inputs})
    assert largest_difference(torch.from_numpy(embedding), nn.functional.normalize(expected)) < 1e-4

    # Otherwise the comparison would say nothing.
    assert (expected - expected.mean(0)).norm(dim=1).min() > 0.01 * expected.norm(dim=1).mean()
    assert torch.equal(encoder.embed(pictures), expected), "exporting leaves the encoder as it was"
    # What depends on the weights alone, as positions resampled to the input's size, is not computed for each image.
    assert "Resize" not in {node.op_type for node in report.model.graph.node}


def test_both_layouts_give_the_same_features(tiny: Encoder, tiny_report: ExportReport, tmp_path: Path) -> None:
    inputs = np.stack([tiny.preprocess(picture) for picture in photographs(4)])
    first = export_encoder(tiny, tmp_path / "nchw.onnx", layout="nchw")
    assert first.description == dataclasses.replace(tiny_report.description, layout="nchw")
    by_layout = [
        session(report.path).run(None, {"images": np.ascontiguousarray(images)})
        for report, images in ((tiny_report, inputs), (first, inputs.transpose(0, 3, 1, 2)))
    ]
    for here, there in zip(*by_layout, strict=True):
        np.testing.assert_array_equal(here, there)
    assert session(first.path).get_inputs()[0].shape == ["batch", 3, 32, 32]
    assert "Transpose" not in {node.op_type for node in first.model.graph.node}


def test_a_timm_models_own_normalization_is_in_the_graph(tmp_path: Path) -> None:
    mean, deviation = (0.5, 0.4, 0.3), (0.2, 0.5, 0.3)
    encoder = untrained("test_resnet")
    pictures = photographs(8)
    inputs = np.stack([encoder.preprocess(picture) for picture in pictures])
    pixels = torch.from_numpy(inputs).permute(0, 3, 1, 2).float() / 255
    own = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)
    with torch.no_grad():
        expected = encoder.backbone(own)
    renormalize(encoder.backbone, mean, deviation)
    path = export_encoder(encoder, tmp_path / "e.onnx").path
    assert largest_difference(OnnxEncoder(path).embed_inputs(inputs), expected) < 1e-4


class Undecided(nn.Module):
    """A network whose path depends on the pixels, which no graph can hold."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone(images if images.sum() > 0 else -images)
        return features


def test_a_network_that_cannot_be_traced_is_an_error_of_one_line(tiny: Encoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="backbone 'resnet_tiny' cannot become an ONNX graph: ") as refused:
        export_encoder(Encoder(Undecided(tiny.backbone), tiny.info), tmp_path / "e.onnx")
    assert "\n" not in str(refused.value)


def test_the_same_encoder_gives_the_same_file(tiny: Encoder, tiny_file: Path, tmp_path: Path) -> None:
    assert export_encoder(tiny, tmp_path / "again.onnx").path.read_bytes() == tiny_file.read_bytes()


def test_a_file_tells_no_path_of_the_machine_that_made_it(tiny_file: Path) -> None:
    data = tiny_file.read_bytes()
    for place in (Path.home(), Path(sys.prefix), Path(torch.__file__).parent, Path(__file__).parent):
        assert str(place).encode() not in data
    model = onnx.load(tiny_file)
    for initializer in model.graph.initializer:
        initializer.ClearField("raw_data")
    text = text_format.MessageToString(model)
    assert "backbone.conv1.weight" in text
    assert "/" not in text
    assert "stack_trace" not in text
    assert "doc_string" not in text


def test_opset_and_ir_version_are_ones_that_older_runtimes_read(tiny_file: Path) -> None:
    model = onnx.load(tiny_file)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert model.ir_version <= 10


# Checks.


def test_agreement_is_what_its_definition_says() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=(40, 8)) + 3
    ours = theirs + rng.normal(size=(40, 8)) * 0.4
    found = measure_agreement(torch.from_numpy(ours).float(), torch.from_numpy(theirs).float())

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    def nearest(rows: np.ndarray, index: int) -> int:
        others = [other for other in range(len(rows)) if other != index]
        return max(others, key=lambda other: cosine(rows[index], rows[other]))

    mean = theirs.mean(0)
    assert found.cosine == pytest.approx(np.mean([cosine(a, b) for a, b in zip(ours, theirs, strict=True)]), abs=1e-6)
    assert found.centered_cosine == pytest.approx(
        np.mean([cosine(a - mean, b - mean) for a, b in zip(ours, theirs, strict=True)]), abs=1e-6
    )
    same = [nearest(ours, index) == nearest(theirs, index) for index in range(40)]
    assert found.neighbors == np.mean(same)
    assert 0.1 < found.neighbors < 0.9
    assert found.centered_cosine < found.cosine


def test_identical_features_agree_wholly_and_no_image_is_its_own_neighbor() -> None:
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    agreement = measure_agreement(features, features)
    assert agreement.as_dict() == pytest.approx({"cosine": 1, "centered_cosine": 1, "neighbors": 1})
    assert (nearest_other(features) != torch.arange(30)).all()


def test_each_precision_is_held_to_its_own_bounds() -> None:
    good = {"cosine": 1.0, "centered_cosine": 1.0, "neighbors": 1.0}
    poor = {"cosine": 0.9, "centered_cosine": 0.9, "neighbors": 0.9}
    for precision in ("fp32", "fp16", "int8"):
        assert missed_bounds(precision, 1e-6, good) == []
        assert missed_bounds(precision, 2e-4, good) == ["parity with torch is 2.0e-04, above 1e-04"]
    assert missed_bounds("fp16", 0.0, poor) == ["mean cosine to fp32 is 0.9000, below 0.9999"]
    assert missed_bounds("int8", 0.0, poor) == [
        "centered cosine to fp32 is 0.9000, below 0.98",
        "nearest-neighbor agreement with fp32 is 0.9000, below 0.98",
    ]


class Moody(nn.Module):
    """A network that is another one while it is exported: a trace that went wrong."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone(images)
        return features + (0.01 * features.sum(1, keepdim=True) if torch.compiler.is_exporting() else 0)


def test_a_graph_that_is_not_the_network_is_refused_with_its_figure_unless_forced(
    tiny: Encoder, tmp_path: Path
) -> None:
    out = tmp_path / "e.onnx"
    out.write_bytes(b"what was there")
    moody = Encoder(Moody(tiny.backbone), tiny.info)
    with pytest.raises(RefusedExport, match=r"e.onnx was not written: parity with torch is \d\.\de[-+]\d\d, above"):
        export_encoder(moody, out)
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"what was there"

    report = export_encoder(moody, out, force=True)
    assert len(report.missed) == 1
    parity = Description.from_properties(properties(out), of="e.onnx").parity
    assert parity is not None
    assert parity > 1e-4
    assert f"{parity:.1e}" in report.missed[0]


def test_features_that_are_not_finite_are_refused_also_by_force(tmp_path: Path) -> None:
    encoder = lively_encoder("resnet_tiny", 32)
    with torch.no_grad():
        next(encoder.backbone.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="not all finite"):
        export_encoder(encoder, tmp_path / "e.onnx", force=True)
    assert list(tmp_path.iterdir()) == []


def test_fp16_has_half_the_size_and_the_same_neighbors(tiny: Encoder, tiny_file: Path, tmp_path: Path) -> None:
    report = export_encoder(tiny, tmp_path / "half.onnx", precision="fp16", layout="nchw")
    assert report.path.stat().st_size < 0.6 * tiny_file.stat().st_size
    assert report.description.agreement["cosine"] >= 0.9999
    assert len(report.inputs) == 50
    expected = tiny.embed(photographs(4))
    inputs = np.stack([tiny.preprocess(picture) for picture in photographs(4)])
    found = OnnxEncoder(report.path).embed_inputs(inputs)
    assert 0 < largest_difference(found, expected) < 1e-2
    assert Description.from_properties(properties(report.path), of="half.onnx") == report.description


def test_int8_takes_many_different_images(tiny: Encoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="int8 takes --calibrate PATH: 200 or more different photographs"):
        export_encoder(tiny, tmp_path / "e.onnx", precision="int8")
    with pytest.raises(UserError, match="200 or more different images; here are 150"):
        export_encoder(tiny, tmp_path / "e.onnx", precision="int8", calibration=[*tiles(150), *tiles(150)])


def test_int8_that_keeps_the_features_is_written_and_judged_on_other_images(tiny: Encoder, tmp_path: Path) -> None:
    report = export_encoder(tiny, tmp_path / "e.onnx", precision="int8", calibration=tiles(200), force=True)
    assert len(report.inputs) == 100
    assert report.path.stat().st_size < 0.45 * report.fp32.ByteSize()
    assert report.description.agreement["centered_cosine"] > 0.9
    calibrated = {tiny.preprocess(tile).tobytes() for tile in tiles(200)[0::2]}
    assert not calibrated & {image.tobytes() for image in report.inputs}


def test_int8_that_loses_the_features_is_refused_with_its_figures(tmp_path: Path) -> None:
    encoder = lively_encoder("resnet_tiny", 32)
    before = encoder.embed(photographs(4))
    with torch.no_grad():  # the same function, with one channel of each block ten thousand times the others
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            block = getattr(encoder.backbone, stage)[0]
            block.bn1.weight[0] *= 1e4
            block.bn1.bias[0] *= 1e4
            block.conv2.weight[:, 0] /= 1e4
    torch.testing.assert_close(encoder.embed(photographs(4)), before, rtol=1e-3, atol=1e-3)
    with pytest.raises(RefusedExport, match=r"cosine to fp32 is 0\.\d{4}, below 0\.98; nearest.* is 0\.\d{4}, below"):
        export_encoder(encoder, tmp_path / "e.onnx", precision="int8", calibration=tiles(200))
    assert list(tmp_path.iterdir()) == []


def test_the_core_graph_is_written_beside_and_gives_the_same_features(tiny: Encoder, tmp_path: Path) -> None:
    report = export_encoder(tiny, tmp_path / "e.onnx", layout="nchw", mobile=True)
    as_onnx, as_ort = report.core_files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.core.onnx", "e.core.ort", "e.onnx"]
    core = OnnxEncoder(as_onnx)  # normalizes by itself what takes floats
    pictures = photographs(3)
    found = core.embed_inputs(np.stack([core.preprocess(picture) for picture in pictures]))
    assert largest_difference(found, tiny.embed(pictures)) < 1e-5
    gray = np.zeros((1, 3, 32, 32), np.float32)
    np.testing.assert_allclose(
        session(as_ort).run(None, {"images": gray})[0], session(as_onnx).run(None, {"images": gray})[0], atol=1e-5
    )


def test_speeds_are_one_for_each_model(tiny_report: ExportReport) -> None:
    times = milliseconds_an_image([tiny_report.model, tiny_report.model], tiny_report.inputs, seconds=0, least=3)
    assert len(times) == 2
    assert min(times) > 0


# The command.


def test_each_branch_of_a_checkpoint_is_exported_by_choice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    inputs = np.stack([np.asarray(open_photos(split="test").read(index))[:32, :32] for index in range(0, 60, 6)])
    expected = {
        "student": load_encoder(checkpoint),
        "teacher": load_encoder(checkpoint, branch="teacher"),
        "recalibrated": open_subjects(
            str(checkpoint), branches=["recalibrated"], recalibrate_on=open_photos(split="test")
        )[0].encoder,
    }
    found = {}
    for branch, encoder in expected.items():
        out = tmp_path / f"{branch}.onnx"
        argv = ["export", str(checkpoint), "--out", str(out), "--branch", branch]
        assert main([*argv, *(["--recalibrate-on", "photos::test"] if branch == "recalibrated" else [])]) == 0
        found[branch] = OnnxEncoder(out).embed_inputs(inputs)
        assert largest_difference(found[branch], encoder.embed_inputs(inputs)) < 1e-5
        said = Description.from_properties(properties(out), of=branch)
        assert (said.branch, said.name, said.method, said.backbone) == (branch, "run", "dino", "resnet_tiny")
        assert (said.images_seen, said.data, said.size, said.resize) == (12, "noise", 32, 37)
        assert len(said.weights_hash) == 64
        assert said.version == said.weights_hash[:12]
    for one, other in (("student", "teacher"), ("student", "recalibrated"), ("teacher", "recalibrated")):
        assert largest_difference(found[one], found[other]) > 1e-3

    printed = capfd.readouterr()
    assert printed.err == ""
    assert "torch.onnx" not in printed.out
    assert "parity" in printed.out
    assert "student.onnx" in printed.out


def test_what_the_user_says_of_an_encoder_is_in_the_file(
    tiny: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_encoder(tmp_path / "e.safetensors", tiny.backbone, tiny.info)
    argv = ["export", str(tmp_path / "e.safetensors"), "--out", str(tmp_path / "e.onnx"), "--precision", "fp16"]
    assert main([*argv, "--name", "shoes", "--version", "2026-11", "--licence", "CC0-1.0", "--mobile"]) == 0
    said = Description.from_properties(properties(tmp_path / "e.onnx"), of="e.onnx")
    assert (said.name, said.version, said.licence, said.precision) == ("shoes", "2026-11", "CC0-1.0", "fp16")
    assert said.weights_hash == load_encoder(tmp_path / "e.safetensors").info.weights_hash
    printed = capsys.readouterr().out
    for words in (
        "shoes",
        "fp16",
        "MB, fp32",
        "on one thread, fp32",
        "agreement",
        "e.core.ort",
        "onnxruntime-web loads it",
    ):
        assert words in printed


def test_an_exported_encoder_is_judged_as_the_one_it_was_made_from(
    tiny: Encoder, tiny_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "e.safetensors"
    save_encoder(source, tiny.backbone, tiny.info)
    figures = []
    for model in (source, tiny_file):
        results = tmp_path / "results.json"
        argv = ["evaluate", "quality", str(model), "--data", "photos::test", "--images", "60", "--views", "2"]
        assert main([*argv, "--json", str(results)]) == 0
        row = json.loads(results.read_text())["rows"][0]
        figures.append(row["values"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    assert figures[0]["retrieval"] == figures[1]["retrieval"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere.safetensors"], "there is no model 'nowhere.safetensors'"),
        (["encoder.onnx"], "encoder.onnx is an ONNX file already"),
        (["default", "--branch", "teacher"], "default has no teacher: it has student"),
        (["default", "--branch", "recalibrated"], "--branch recalibrated takes --recalibrate-on PATH"),
        (["default", "--recalibrate-on", "photos"], "--recalibrate-on goes with --branch recalibrated"),
        (["untrained:resnet_tiny", "--branch", "student"], "has no branches"),
        (["default", "--calibrate", "nowhere"], "there is no data at 'nowhere'"),
        (["default", "--precision", "int8"], "int8 takes --calibrate PATH: 200 or more"),
        (["default", "--out", "e.pt"], "--out e.pt: the file's name ends in .onnx"),
        (["default", "--out", "folder.onnx"], "--out folder.onnx is a folder"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    assert main(["export", *(argv if "--out" in argv else [*argv, "--out", "e.onnx"])]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("lowssl export: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err
    assert printed.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.onnx"]
