"""An exported encoder for phones and browsers: the network alone, its file in ORT format, and what a browser lacks."""

import copy
import tempfile
from pathlib import Path
from typing import Literal

import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, helper

from lowssl_core.export.description import FEATURES, INPUT
from lowssl_core.export.precision import preprocessing
from lowssl_core.files import write_atomically

# The metadata entry "preprocessing" of a core graph.
_IN_WORDS = (
    "Shrink or enlarge the RGB image so that its short side is {resize} pixels, bicubic with anti-aliasing, cut the "
    "centre square of {size} pixels, divide by 255, take `mean` off and divide by `std`, one of each for a channel; "
    "the graph takes float32 (1, 3, {size}, {size})."
)

# What onnxruntime-web 1.30 read under node, of files of each opset and IR version. Its WebAssembly build is ONNX
# Runtime's CPU provider with the operators of ONNX, of ai.onnx.ml and its own ones (com.microsoft).
_WEB_OPSET = 26
_WEB_IR_VERSION = 13
_WEB_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})


def core_graph(model: ModelProto) -> ModelProto:
    """The network of an exported encoder alone, with fixed shapes, as the accelerators of phones take it in one piece.

    Normalization and the embedding are left to the app: NNAPI and Core ML would split a graph that has them.

    Args:
        model: an fp32 export of `to_onnx` with its metadata; it is left as it is.

    Returns:
        A graph of standard operators from `images`, float32 (1, 3, S, S), normalized, to `features`, float32
        (1, width), with the metadata of `model`, in which "preprocessing" says how the input is made.

    Raises:
        UserError: the graph does not begin as `to_onnx` makes it.
    """
    model = copy.deepcopy(model)
    graph = model.graph
    planes = preprocessing(model)[-1].output[0]
    side = graph.input[0].type.tensor_type.shape.dim[2].dim_value
    for node in graph.node:
        # The batch's size is taken from the input; that of the float input is the same.
        node.input[:] = [INPUT if name == planes else name for name in node.input]
    (features,) = (output for output in graph.output if output.name == FEATURES)
    features.type.tensor_type.shape.dim[0].dim_value = 1
    outputs = [copy.deepcopy(features)]
    del graph.input[:], graph.output[:], graph.value_info[:]
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [1, 3, side, side]))
    graph.output.extend(outputs)
    _keep_ancestors(model)
    resize = next((entry.value for entry in model.metadata_props if entry.key == "resize"), str(side))
    for entry in model.metadata_props:
        if entry.key == "preprocessing":
            entry.value = _IN_WORDS.format(size=side, resize=resize)
    core = onnx.load_model_from_string(_optimized(model, "ONNX"))
    # ONNX Runtime lists every domain it knows, and remarks on what it fused.
    del core.opset_import[:]
    core.opset_import.extend(model.opset_import)
    for node in core.graph.node:
        node.ClearField("doc_string")
    return core


def write_ort(model: ModelProto, path: Path) -> None:
    """Write a model in ORT format (for ONNX Runtime's mobile and web builds), atomically; its metadata goes along.

    Only optimizations that are the same on every processor are made: no layout or instruction of this one gets in.
    """
    data = _optimized(model, "ORT")
    write_atomically(path, lambda file: file.write(data))


def web_problems(model: ModelProto) -> list[str]:
    """Why onnxruntime-web's WebAssembly build would not load a model, one line each; none if it would.

    Source: onnxruntime-web's README ("compiles the native ONNX Runtime CPU engine into WebAssembly ... including full
    ONNX operator coverage"), and version 1.30 tried under node.
    """
    problems = []
    for entry in model.opset_import:
        if entry.domain not in _WEB_DOMAINS:
            problems.append(f"operators of {entry.domain!r}; it has those of ONNX and of ONNX Runtime")
        elif entry.domain in ("", "ai.onnx") and entry.version > _WEB_OPSET:
            problems.append(f"opset {entry.version}; it reads up to {_WEB_OPSET}")
    if model.ir_version > _WEB_IR_VERSION:
        problems.append(f"IR version {model.ir_version}; it reads up to {_WEB_IR_VERSION}")
    if any(weight.data_location == TensorProto.EXTERNAL for weight in model.graph.initializer):
        problems.append("weights in a file beside it; it is to be one file")
    return problems


def _keep_ancestors(model: ModelProto) -> None:
    """Drop nodes and constants that no output needs."""
    graph = model.graph
    needed = {output.name for output in graph.output}
    nodes = []
    for node in reversed(graph.node):  # from the last: nodes are in topological order
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    weights = [weight for weight in graph.initializer if weight.name in needed]
    kept_nodes, kept_weights = copy.deepcopy(nodes[::-1]), copy.deepcopy(weights)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept_nodes)
    graph.initializer.extend(kept_weights)


def _optimized(model: ModelProto, file_format: Literal["ONNX", "ORT"]) -> bytes:
    """The model with ONNX Runtime's basic optimizations, which fold constants and use standard operators alone."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.save_model_format", file_format)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        options.optimized_model_filepath = str(target)
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return target.read_bytes()
