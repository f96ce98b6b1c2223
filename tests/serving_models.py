"""Small ONNX encoders of the kind that is served, for tests: each version answers differently."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lowssl_core.export.description import EMBEDDING, FEATURES, INPUT, Description, Layout


def describe(version: str = "v1", *, size: int = 32, width: int = 16, layout: Layout = "nhwc") -> Description:
    return Description(
        name=f"small {version}",
        version=version,
        backbone="convolution",
        width=width,
        size=size,
        resize=round(size * 256 / 224),
        layout=layout,
    )


def build_model(description: Description, *, seed: int = 0) -> onnx.ModelProto:
    """A strided convolution, ReLU and a mean over positions, with normalization and L2 norm in the graph."""
    rng, width = np.random.default_rng(seed), description.width
    weights = {
        "mean": np.array([123.7, 116.3, 103.5], np.float32).reshape(1, 3, 1, 1),
        "std": np.array([58.4, 57.1, 57.4], np.float32).reshape(1, 3, 1, 1),
        "kernel": rng.normal(size=(width, 3, 4, 4)).astype(np.float32),
        "axes": np.array([2, 3], np.int64),
        "last": np.array([1], np.int64),
    }
    channels_first = [] if description.layout == "nchw" else [("Transpose", ["float"], "nchw", {"perm": [0, 3, 1, 2]})]
    steps = [
        ("Cast", [INPUT], "float", {"to": TensorProto.FLOAT}),
        *channels_first,
        ("Sub", ["nchw" if channels_first else "float", "mean"], "centered", {}),
        ("Div", ["centered", "std"], "normalized", {}),
        ("Conv", ["normalized", "kernel"], "convolved", {"strides": [4, 4]}),
        ("Relu", ["convolved"], "positive", {}),
        ("ReduceMean", ["positive", "axes"], FEATURES, {"keepdims": 0}),
        ("ReduceL2", [FEATURES, "last"], "length", {"keepdims": 1}),
        ("Div", [FEATURES, "length"], EMBEDDING, {}),
    ]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [output], **options) for kind, inputs, output, options in steps],
        "encoder",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, description.input_shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in (FEATURES, EMBEDDING)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, description.to_properties())
    onnx.checker.check_model(model)
    return model


def write_model(path: Path, description: Description | None = None, *, seed: int = 0) -> Path:
    onnx.save(build_model(description or describe(), seed=seed), path)
    return path
