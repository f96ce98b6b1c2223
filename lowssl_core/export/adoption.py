"""ONNX encoders that others made, checked and turned into files of this package's kind."""

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from lowssl_core.errors import UserError
from lowssl_core.evaluation.onnx_encoder import OnnxEncoder
from lowssl_core.export.description import EMBEDDING, FEATURES, FORMAT, INPUT, MEAN, STD, Description, Precision
from lowssl_core.preprocess import Preprocess

MAX_BYTES = 2**30
"""The largest file that is read; protobuf itself ends at 2 GiB."""

# From 11 on, operators that are added here mean the same in each opset; what is newer than ONNX Runtime, it says.
_MIN_OPSET = 11

# Standard operators and ONNX Runtime's own. Others need code that a file cannot bring along.
_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})

# Names of the foreign graph get this in front, so that none is one of ours.
_PREFIX = "adopted/"

_IR_VERSION = 8  # from 4 on, weights need not be among the inputs; ONNX Runtime reads 8 since 2022

_PARITY = 1e-4


def adopt(
    path: Path,
    *,
    name: str | None = None,
    version: str = "1",
    resize: int | None = None,
    licence: str = "",
) -> ModelProto:
    """Read an ONNX encoder and make it one of this package's kind: uint8 NHWC in, features and embedding out.

    What `OnnxEncoder` takes is adopted: uint8 (B, S, S, 3) or (B, 3, S, S) with normalization in the graph, or float32
    (B, 3, S, S) normalized by ImageNet's statistics; of the outputs "features", or else the first. The result gives
    what the file gives, also for batches that the file itself does not take: that is tried before it is returned.

    Args:
        path: a file that nobody vouches for. It is as safe as ONNX Runtime: no code of its own, no second file.
        name: for people; default: the file's.
        version: for people.
        resize: short side of an image before the centre square is cut; default: the file's metadata entry "resize", or
            the usual margin.
        licence: of the weights.

    Returns:
        The model with a `Description` as its metadata. A file that is of this kind already is returned as it is.

    Raises:
        UserError: no such file, too large, damaged, of another kind, with weights in a second file, with operators of
            its own, or with a batch of fixed size that its graph depends on; a file of this kind given a resize.
    """
    model = _read(path)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if properties.get("format") == FORMAT:
        return _check_own(model, properties, path, resize)
    model = _without_functions(model, path)
    _check_operators(model, path)
    encoder = OnnxEncoder(path)
    size = encoder.info.size
    try:
        preprocess = Preprocess(size=size, resize=encoder.info.resize if resize is None else resize)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    adopted = _with_our_ends(model, encoder.info.width)
    description = Description(
        name=name or path.stem,
        version=version,
        backbone=encoder.info.backbone,
        width=encoder.info.width,
        size=size,
        resize=preprocess.resize,
        weights_hash=encoder.info.weights_hash,
        licence=licence,
        precision=_precision(model),
    )
    helper.set_model_props(adopted, description.to_properties())
    _check_parity(adopted, encoder, path, fixed_batch=not _is_dynamic(model))
    return adopted


def _read(path: Path) -> ModelProto:
    """The file's content; UserError for what is no ONNX model in one file."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path} has {size / 2**20:.0f} MiB; an encoder has at most {MAX_BYTES / 2**20:.0f}")
        model = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # protobuf's implementations have an error of their own each
        raise UserError(f"{path} cannot be read as an ONNX model: {_first_line(error)}") from None
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise UserError(
                f"{path} keeps its weights ({tensor.name!r}) in a second file, which is not read: save it as one file, "
                "onnx.save(model, file, save_as_external_data=False)"
            )
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker has three
        raise UserError(f"{path} is not a valid ONNX model: {_first_line(error)}") from None
    return model


def _check_own(model: ModelProto, properties: dict[str, str], path: Path, resize: int | None) -> ModelProto:
    """A file of our kind, if its graph is what its description says."""
    description = Description.from_properties(properties, of=str(path))
    if resize is not None and resize != description.resize:
        raise UserError(f"{path} was exported by LowSSL and says resize {description.resize}; it cannot be {resize}")
    inputs = [(value.name, value.type.tensor_type.elem_type, _sizes(value)) for value in model.graph.input]
    expected = [(INPUT, TensorProto.UINT8, list(description.input_shape[1:]))]
    outputs = [value.name for value in model.graph.output]
    if [(key, kind, sizes[1:]) for key, kind, sizes in inputs] != expected or outputs != [FEATURES, EMBEDDING]:
        raise UserError(f"{path}: its inputs and outputs are not those that its metadata say")
    return model


def _without_functions(model: ModelProto, path: Path) -> ModelProto:
    """Functions that the file defines, replaced by what they consist of."""
    if not model.functions:
        return model
    try:
        inlined: ModelProto = onnx.inliner.inline_local_functions(model)
    except Exception as error:  # whatever the file's functions get wrong
        raise UserError(f"{path}: its functions cannot be used: {_first_line(error)}") from None
    return inlined


def _check_operators(model: ModelProto, path: Path) -> None:
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in _nodes(model.graph) if node.domain not in _DOMAINS})
    if foreign:
        raise UserError(f"{path} has operators that come with no ONNX Runtime: {', '.join(foreign[:5])}")
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < _MIN_OPSET:
        raise UserError(f"{path} has opset {opset}; expected {_MIN_OPSET} or newer: onnx.version_converter")


def _with_our_ends(model: ModelProto, width: int) -> ModelProto:
    """The model between our input and our outputs, with a dynamic batch; names and remarks of others are gone."""
    inner = copy.deepcopy(model)
    weights = {weight.name for weight in inner.graph.initializer}
    inputs = [value for value in inner.graph.input if value.name not in weights]
    outputs = list(inner.graph.output)
    chosen = next((value for value in outputs if value.name == FEATURES), outputs[0])
    channels_first = _sizes(inputs[0])[1] == 3 and _sizes(inputs[0])[2] == _sizes(inputs[0])[3]
    size = _sizes(inputs[0])[2]
    is_float = inputs[0].type.tensor_type.elem_type == TensorProto.FLOAT
    inner = onnx.compose.add_prefix(inner, prefix=_PREFIX)
    before = _input_nodes(_PREFIX + inputs[0].name, channels_first=channels_first, is_float=is_float)
    after = [
        helper.make_node("Cast", [_PREFIX + chosen.name], [FEATURES], to=TensorProto.FLOAT),
        helper.make_node("LpNormalization", [FEATURES], [EMBEDDING], axis=1, p=2),
    ]
    graph = helper.make_graph(
        [*before, *inner.graph.node, *after],
        "encoder",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", size, size, 3])],
        [helper.make_tensor_value_info(key, TensorProto.FLOAT, ["batch", width]) for key in (FEATURES, EMBEDDING)],
        initializer=[*inner.graph.initializer, *(_statistics() if is_float else ())],
    )
    graph.sparse_initializer.extend(inner.graph.sparse_initializer)
    for node in _nodes(graph):
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    used = {node.domain for node in _nodes(graph)} | {"", "ai.onnx"}
    opsets = [entry for entry in inner.opset_import if entry.domain in used]
    return helper.make_model(graph, opset_imports=opsets, ir_version=max(model.ir_version, _IR_VERSION))


def _input_nodes(name: str, *, channels_first: bool, is_float: bool) -> list[NodeProto]:
    """From `images` to the foreign graph's input."""
    transpose = helper.make_node("Transpose", [INPUT], ["planes" if is_float else name], perm=[0, 3, 1, 2])
    if is_float:
        return [
            transpose,
            helper.make_node("Cast", ["planes"], ["levels"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["levels", "scale"], ["scaled"]),
            helper.make_node("Add", ["scaled", "shift"], [name]),
        ]
    return [transpose] if channels_first else [helper.make_node("Identity", [INPUT], [name])]


def _statistics() -> list[TensorProto]:
    mean, deviation = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    return [
        numpy_helper.from_array(np.float32(1) / (np.float32(255) * deviation), "scale"),
        numpy_helper.from_array(-mean / deviation, "shift"),
    ]


def _check_parity(adopted: ModelProto, encoder: OnnxEncoder, path: Path, *, fixed_batch: bool) -> None:
    """Run both on a batch of 3 and on one image; UserError unless they agree.

    The original runs image by image, so that a graph in which a batch's size is written somewhere is found out.
    """
    size = encoder.info.size
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    expected = np.concatenate([encoder.embed_inputs(image[None]).numpy() for image in images])
    if not np.isfinite(expected).all():
        raise UserError(f"{path}: its features of a test image are not finite")
    for batch in (images, images[:1]):
        wanted = expected[: len(batch)]
        try:
            found = _run(adopted, batch)
            reason = f"its features have shape {found.shape}"
        except Exception as error:  # ONNX Runtime has a class of its own for each kind of failure
            found, reason = np.empty(0, np.float32), _first_line(error)
        if found.shape != wanted.shape:
            if fixed_batch:
                reason = "its graph has a batch of fixed size inside; export it with a dynamic one"
            raise UserError(f"{path} cannot be run on a batch of {len(batch)}: {reason}")
        if np.abs(found - wanted).max() > _PARITY * np.abs(wanted).max():
            raise UserError(
                f"{path} gives an image other features in a batch of {len(batch)} than alone: it cannot be served"
            )


def _run(model: ModelProto, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (features,) = session.run([FEATURES], {INPUT: images})
    return np.asarray(features)


def _precision(model: ModelProto) -> Precision:
    """What the file's weights are kept in."""
    if any(
        "Integer" in node.op_type or "Quantize" in node.op_type or "QLinear" in node.op_type
        for node in _nodes(model.graph)
    ):
        return "int8"
    halves = any(weight.data_type == TensorProto.FLOAT16 for weight in model.graph.initializer)
    return "fp16" if halves else "fp32"


def _is_dynamic(model: ModelProto) -> bool:
    weights = {weight.name for weight in model.graph.initializer}
    (value, *_) = (value for value in model.graph.input if value.name not in weights)
    return not isinstance(_sizes(value)[0], int)


def _sizes(value: ValueInfoProto) -> list[int | str]:
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.type.tensor_type.shape.dim]


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and those inside its conditions and loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _graphs(inner)


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    return (node for part in _graphs(graph) for node in part.node)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every constant of a model, wherever it is kept."""
    nodes = [*_nodes(model.graph), *(node for function in model.functions for node in function.node)]
    for part in _graphs(model.graph):
        yield from part.initializer
        for sparse in part.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from [attribute.t] if attribute.HasField("t") else []
        yield from attribute.tensors


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
