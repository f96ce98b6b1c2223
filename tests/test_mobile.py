"""The core graph, its file in ORT format, and what browsers would not load."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_models import lively_encoder, tiles
from onnx import ModelProto, TensorProto, helper

from lowssl_core.encoder import Encoder
from lowssl_core.errors import UserError
from lowssl_core.export.description import MEAN, STD
from lowssl_core.export.graph import to_onnx
from lowssl_core.export.mobile import core_graph, web_problems, write_ort

ENCODERS = {"resnet_tiny": 48, "mobilenetv2_tiny": 32, "vit_tiny": 32}
PROPERTIES = {"format": "lowssl-onnx-1", "name": "small", "resize": "37", "preprocessing": "uint8", "mean": str(MEAN)}


@pytest.fixture(scope="module", params=list(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return lively_encoder(request.param, ENCODERS[request.param])


@pytest.fixture(scope="module")
def model(encoder: Encoder) -> ModelProto:
    made = to_onnx(encoder)
    helper.set_model_props(made, PROPERTIES)
    return made


def normalized(encoder: Encoder) -> np.ndarray:
    """Float planes (1, 3, S, S) each, as an app would make them from the words in the metadata."""
    pixels = np.stack([encoder.preprocess(tile) for tile in tiles(4)])
    planes = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    return planes.transpose(0, 3, 1, 2)[:, None].astype(np.float32)


def features(session: onnxruntime.InferenceSession, planes: np.ndarray) -> np.ndarray:
    return np.concatenate([session.run(["features"], {"images": image})[0] for image in planes])


def test_the_core_graph_and_its_ort_file_give_torchs_features(
    encoder: Encoder, model: ModelProto, tmp_path: Path
) -> None:
    core, path = core_graph(model), tmp_path / "core.ort"
    write_ort(core, path)
    expected = encoder.embed_inputs(np.stack([encoder.preprocess(tile) for tile in tiles(4)]))
    for source in (core.SerializeToString(), str(path)):
        session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(features(session, normalized(encoder)))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_core_graph_has_fixed_shapes_and_standard_operators(encoder: Encoder, model: ModelProto) -> None:
    core = core_graph(model)
    onnx.checker.check_model(core, full_check=True)
    shapes = [[side.dim_value for side in value.type.tensor_type.shape.dim] for value in core.graph.input]
    assert shapes == [[1, 3, encoder.info.size, encoder.info.size]]
    assert [value.name for value in core.graph.output] == ["features"]
    assert {node.domain for node in core.graph.node} <= {"", "ai.onnx"}
    # Nothing is computed from shapes, which accelerators would leave to the processor.
    assert not {node.op_type for node in core.graph.node} & {"Shape", "Cast", "Expand", "ConstantOfShape"}


def test_metadata_survive_in_both_files(model: ModelProto, tmp_path: Path) -> None:
    core, path = core_graph(model), tmp_path / "core.ort"
    write_ort(core, path)
    for source in (core.SerializeToString(), str(path)):
        session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
        found = session.get_modelmeta().custom_metadata_map
        assert {**found, "preprocessing": "uint8"} == PROPERTIES
        assert "float32" in found["preprocessing"]
        assert "37 pixels" in found["preprocessing"]


def test_the_ort_file_carries_nothing_of_the_machine(model: ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "core.ort"
    write_ort(core_graph(model), path)
    data = path.read_bytes()
    assert data[4:8] == b"ORTM"
    assert str(tmp_path).encode() not in data
    assert b"ReorderInput" not in data  # to the layout of this processor's vectors
    assert str(Path.cwd()).encode() not in data


def test_the_model_that_was_given_stays_as_it_is(model: ModelProto) -> None:
    before = model.SerializeToString(deterministic=True)
    core_graph(model)
    assert model.SerializeToString(deterministic=True) == before


def relu(*, opset: int = 20, ir_version: int = 10, domain: str = "") -> ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("images", "features")]
    node = helper.make_node("Relu", ["images"], ["features"], domain=domain)
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def test_a_graph_that_is_not_an_export_has_no_core() -> None:
    with pytest.raises(UserError, match="does not begin with LowSSL's normalization"):
        core_graph(relu())


def test_exports_load_in_a_browser(model: ModelProto) -> None:
    assert web_problems(model) == []
    assert web_problems(core_graph(model)) == []


@pytest.mark.parametrize(
    ("unfit", "reason"),
    [
        (relu(opset=99), "opset 99"),
        (relu(ir_version=99), "IR version 99"),
        (relu(domain="com.example"), "com.example"),
        (relu(domain="com.microsoft"), None),
    ],
)
def test_what_a_browser_lacks_is_named(unfit: ModelProto, reason: str | None) -> None:
    problems = web_problems(unfit)
    assert [reason in problem for problem in problems] == [True] if reason else problems == []


def test_weights_in_a_second_file_do_not_reach_a_browser() -> None:
    model = relu()
    weight = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[4])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="w.bin")
    assert "one file" in web_problems(model)[0]
