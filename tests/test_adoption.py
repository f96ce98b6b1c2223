"""ONNX encoders of others: the same features as before, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lowssl_core.errors import UserError
from lowssl_core.evaluation.onnx_encoder import OnnxEncoder
from lowssl_core.export import adoption
from lowssl_core.export.adoption import adopt
from lowssl_core.export.checks import GraphRunner
from lowssl_core.export.description import Description
from lowssl_core.export.mobile import web_problems
from lowssl_core.photos import open_photos
from lowssl_core.preprocess import Preprocess

SIZE, WIDTH = 16, 5
INPUTS = np.stack(
    [Preprocess(size=SIZE)(np.asarray(open_photos(split="test").read(index))) for index in range(0, 40, 5)]
)
SHAPES: dict[str, tuple[int, list[Any]]] = {
    "uint8 nhwc": (TensorProto.UINT8, ["n", SIZE, SIZE, 3]),
    "uint8 nchw": (TensorProto.UINT8, ["n", 3, SIZE, SIZE]),
    "float nchw": (TensorProto.FLOAT, ["n", 3, SIZE, SIZE]),
    "float nchw, batch of 1": (TensorProto.FLOAT, [1, 3, SIZE, SIZE]),
    "float nchw, batch of 4": (TensorProto.FLOAT, [4, 3, SIZE, SIZE]),
}


def foreign(
    kind: str = "float nchw", *, outputs: tuple[str, ...] = ("y",), reshape: list[int] | None = None, opset: int = 17
) -> ModelProto:
    """A small convolutional network; its names are those that adopting adds, to see that they do not collide."""
    data_type, shape = SHAPES[kind]
    rng = np.random.default_rng(0)
    nodes = []
    name = "embedding"
    if "nhwc" in kind:
        nodes.append(helper.make_node("Transpose", [name], ["planes"], perm=[0, 3, 1, 2]))
        name = "planes"
    if "uint8" in kind:
        nodes.append(helper.make_node("Cast", [name], ["levels"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", ["levels", "scale"], ["scaled"]))
        name = "scaled"
    nodes.append(helper.make_node("Conv", [name, "weight"], ["images"], name="images", strides=[4, 4]))
    nodes.append(helper.make_node("Relu", ["images"], ["shift"]))
    nodes.append(helper.make_node("GlobalAveragePool", ["shift"], ["pooled"]))
    for number, output in enumerate(outputs):
        nodes.append(helper.make_node("Reshape", ["pooled", "shape"], [f"flat{number}"]))
        nodes.append(helper.make_node("Add", [f"flat{number}", f"offset{number}"], [output]))
    batch = shape[0]
    constants = {
        "weight": rng.standard_normal((WIDTH, 3, 4, 4)).astype(np.float32),
        "scale": np.float32(1 / 255),
        "shape": np.array(reshape or [0, -1]),
        **{f"offset{number}": np.float32(number) for number in range(len(outputs))},
    }
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("embedding", data_type, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, WIDTH]) for output in outputs],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def written(model: ModelProto, folder: Path, **metadata: str) -> Path:
    helper.set_model_props(model, metadata)
    path = folder / "theirs.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def described(model: ModelProto) -> Description:
    return Description.from_properties({entry.key: entry.value for entry in model.metadata_props}, of="the model")


@pytest.mark.parametrize("kind", list(SHAPES))
def test_an_adopted_encoder_gives_the_features_of_the_file(kind: str, tmp_path: Path) -> None:
    path = written(foreign(kind), tmp_path)
    model = adopt(path)
    onnx.checker.check_model(model, full_check=True)
    expected = OnnxEncoder(path).embed_inputs(INPUTS)
    for batch in (1, 3, 8):
        outputs = GraphRunner(model).run_in_batches(INPUTS, [batch] * 8)
        torch.testing.assert_close(torch.from_numpy(outputs["features"]), expected, rtol=1e-5, atol=1e-5)
        unit = torch.nn.functional.normalize(expected)
        torch.testing.assert_close(torch.from_numpy(outputs["embedding"]), unit, rtol=1e-5, atol=1e-5)
    assert [side.dim_param or side.dim_value for side in model.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        SIZE,
        SIZE,
        3,
    ]
    assert web_problems(model) == []


def test_an_adopted_encoder_describes_itself(tmp_path: Path) -> None:
    path = written(foreign(), tmp_path, resize="20", author="someone")
    facts = described(adopt(path, name="theirs, tried", version="v7", licence="MIT"))
    assert (facts.name, facts.version, facts.licence) == ("theirs, tried", "v7", "MIT")
    assert (facts.size, facts.resize, facts.width, facts.backbone) == (SIZE, 20, WIDTH, "onnx")
    assert (facts.precision, facts.layout, facts.parity) == ("fp32", "nhwc", None)
    assert facts.weights_hash == OnnxEncoder(path).info.weights_hash
    assert described(adopt(path)).name == "theirs"
    assert described(adopt(path, resize=17)).resize == 17


def test_the_output_called_features_is_taken_else_the_first(tmp_path: Path) -> None:
    for outputs in (("logits", "features"), ("first", "second")):
        path = written(foreign(outputs=outputs), tmp_path)
        found = GraphRunner(adopt(path)).run(INPUTS)["features"]
        np.testing.assert_allclose(found, OnnxEncoder(path).embed_inputs(INPUTS), rtol=1e-5, atol=1e-5)


def test_an_adopted_file_is_passed_through_unchanged(tmp_path: Path) -> None:
    ours = adopt(written(foreign(), tmp_path))
    path = tmp_path / "ours.onnx"
    path.write_bytes(ours.SerializeToString())
    assert adopt(path) == ours
    assert adopt(path, resize=described(ours).resize) == ours
    with pytest.raises(UserError, match="says resize 18; it cannot be 20"):
        adopt(path, resize=20)


def test_a_file_of_ours_whose_graph_was_changed_is_refused(tmp_path: Path) -> None:
    model = adopt(written(foreign(), tmp_path))
    del model.graph.output[1]
    path = tmp_path / "changed.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="not those that its metadata say"):
        adopt(path)


def test_remarks_of_others_do_not_come_along(tmp_path: Path) -> None:
    model = foreign()
    model.doc_string = model.graph.doc_string = model.graph.node[0].doc_string = "made in /home/someone"
    model.graph.node[1].metadata_props.add(key="stack", value="/home/someone/train.py")
    adopted = adopt(written(model, tmp_path, author="/home/someone"))
    assert b"/home/someone" not in adopted.SerializeToString()


def test_a_half_precision_file_says_so(tmp_path: Path) -> None:
    model = foreign()
    weight = model.graph.initializer[0]
    half = numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), "half")
    model.graph.initializer.append(half)
    model.graph.initializer.remove(weight)
    model.graph.node.insert(0, helper.make_node("Cast", ["half"], ["weight"], to=TensorProto.FLOAT))
    assert described(adopt(written(model, tmp_path))).precision == "fp16"


def test_functions_of_a_file_are_taken_apart(tmp_path: Path) -> None:
    model = foreign()
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type, relu.domain = "Rectify", "theirs"
    opset = helper.make_opsetid("", 17)
    body = [helper.make_node("Relu", ["x"], ["y"])]
    model.functions.append(helper.make_function("theirs", "Rectify", ["x"], ["y"], body, [opset]))
    model.opset_import.append(helper.make_opsetid("theirs", 1))
    path = written(model, tmp_path)
    adopted = adopt(path)
    assert {entry.domain for entry in adopted.opset_import} == {""}
    np.testing.assert_allclose(
        GraphRunner(adopted).run(INPUTS)["features"], OnnxEncoder(path).embed_inputs(INPUTS), rtol=1e-5, atol=1e-5
    )


def with_external_weights() -> ModelProto:
    model = foreign()
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../../etc/passwd")
    return model


def with_external_constant() -> ModelProto:
    model = foreign()
    hidden = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    hidden.external_data.add(key="location", value="weights.bin")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["unused"], value=hidden))
    return model


def with_foreign_operator() -> ModelProto:
    model = foreign()
    model.graph.node[1].op_type, model.graph.node[1].domain = "Launch", "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    return model


def with_scaling_by_the_batch() -> ModelProto:
    """As dynamic quantization does: activations are divided by the largest of all images'."""
    model = foreign()
    position = next(index for index, node in enumerate(model.graph.node) if node.op_type == "GlobalAveragePool")
    model.graph.node[position].input[0] = "divided"
    model.graph.node.insert(position, helper.make_node("Div", ["shift", "most"], ["divided"]))
    model.graph.node.insert(position, helper.make_node("ReduceMax", ["shift"], ["most"], keepdims=0))
    return model


def with_infinite_weights() -> ModelProto:
    model = foreign()
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(np.full((WIDTH, 3, 4, 4), np.inf, np.float32), weight.name))
    return model


def with_a_missing_value() -> ModelProto:
    model = foreign()
    model.graph.node[1].input[0] = "nowhere"
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (with_external_weights(), "weights .'weight'. in a second file"),
        (with_external_constant(), "weights .'hidden'. in a second file"),
        (with_foreign_operator(), "com.example.Launch"),
        (foreign(opset=9), "opset 9; expected 11 or newer"),
        (foreign("float nchw, batch of 1", reshape=[1, -1]), "batch of 3: its graph has a batch of fixed size inside"),
        (with_scaling_by_the_batch(), "other features in a batch of 3 than alone"),
        (with_infinite_weights(), "are not finite"),
        (with_a_missing_value(), "is not a valid ONNX model"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(model: ModelProto, message: str, tmp_path: Path) -> None:
    path = written(model, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        adopt(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_model_at_all_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "theirs.onnx"
    with pytest.raises(UserError, match="No such file"):
        adopt(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="cannot be read as an ONNX model") as caught:
        adopt(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is not a valid ONNX model"):
        adopt(path)
    monkeypatch.setattr(adoption, "MAX_BYTES", 50)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="an encoder has at most"):
        adopt(path)
