"""Exported encoders in fp16, and in int8 with those layers left in fp32 that would spoil the features."""

from collections.abc import Iterable, Mapping
from itertools import repeat

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lowssl_core.errors import UserError
from lowssl_core.export.checks import GraphRunner, measure_agreement
from lowssl_core.export.description import FEATURES, INPUT
from lowssl_core.images import Pixels

# Layers are given back to fp32 until the centred cosine is this: half the error that the gate allows, because it looks
# at other images. With more than half of the layers in fp32 the file is no faster than an fp32 one.
_TARGET = 0.99
_MOST_GIVEN_BACK = 0.5

_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
# What clamps or picks values goes into the rounding of the layer before it. Additions stay in fp32: in int8 they cost
# MobileNetV2 half of its gain, and accuracy everywhere.
_CLAMPS = frozenset({"Relu", "Clip", "MaxPool"})

_IMAGES = 64  # for ranges, and as many others for measuring
_BATCH = 8
_SAMPLE = 4096  # values of an activation from each image
_SHRINKING = np.linspace(0.3, 1, 29)  # ranges that are tried, of the whole


def preprocessing(model: ModelProto) -> list[NodeProto]:
    """The nodes before the network, in order: [Transpose,] Cast, Mul, Add; the last one's output are its planes.

    Raises:
        UserError: the graph does not begin as `to_onnx` makes it.
    """
    name = INPUT
    found: list[NodeProto] = []
    for expected in ("Transpose", "Cast", "Mul", "Add"):
        consumers = [node for node in model.graph.node if name in node.input and node.op_type != "Shape"]
        if len(consumers) == 1 and consumers[0].op_type == expected:
            found.append(consumers[0])
            name = consumers[0].output[0]
    if [node.op_type for node in found[-3:]] != ["Cast", "Mul", "Add"]:
        raise UserError(
            "the graph does not begin with LowSSL's normalization: it was not exported by LowSSL from torch"
        )
    return found


def to_fp16(model: ModelProto) -> ModelProto:
    """An fp32 export with its network in fp16; normalization, both outputs and the division by the length are in fp32.

    Half the size. A processor without fp16 arithmetic computes in fp32 between roundings.

    Args:
        model: of `to_onnx`, with or without metadata; it is left as it is.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    # The converter gets the network alone: it would round between each two nodes that are to stay in fp32.
    before = preprocessing(model)
    after = _descendants(model, FEATURES)
    graph = onnx.load_model_from_string(model.SerializeToString()).graph
    outside = {node.name for node in (*before, *after)}
    weights = {name for node in (*before, *after) for name in node.input}
    network = helper.make_graph(
        [node for node in graph.node if node.name not in outside],
        graph.name,
        [*graph.input, helper.make_tensor_value_info(before[-1].output[0], TensorProto.FLOAT, None)],
        [output for output in graph.output if output.name == FEATURES],
        [weight for weight in graph.initializer if weight.name not in weights],
        value_info=graph.value_info,
    )
    half: ModelProto = convert_float_to_float16(
        helper.make_model(network, opset_imports=model.opset_import, ir_version=model.ir_version), keep_io_types=True
    )
    whole = onnx.load_model_from_string(model.SerializeToString())
    del whole.graph.node[:], whole.graph.initializer[:], whole.graph.value_info[:]
    whole.graph.node.extend([*before, *half.graph.node, *after])
    whole.graph.initializer.extend(half.graph.initializer)
    whole.graph.initializer.extend(weight for weight in graph.initializer if weight.name in weights)
    OnnxModel(whole).topological_sort()  # the converter puts what it adds at the end
    return whole


def to_int8(model: ModelProto, backbone: str, inputs: Pixels) -> ModelProto:
    """An fp32 export with its layers in int8, as far as the features allow it; static, so an image's are its own.

    Activations are rounded to 8 bits within ranges of least squared error, weights to 7 bits for each channel: with 8,
    processors that add products in pairs of 16 bits would saturate and answer differently from others. A mean shift of
    the features is taken off. If the features of images that had no part in this suffer, the layers that harm them
    most, measured one by one, stay in fp32, half of them at most; whether the result is good is for `checks` to say.

    Args:
        model: of `to_onnx`; it is left as it is.
        backbone: its name, for errors.
        inputs: 16 or more photographs, evaluation-style (N, S, S, 3).

    Raises:
        UserError: too few images, or a network without convolutions and matrix products of constant weights.
    """
    if len(inputs) < 16:
        raise UserError(f"int8 is calibrated on 16 or more photographs; here are {len(inputs)}")
    calibration, others = inputs[0::2][:_IMAGES], inputs[1::2][:_IMAGES]
    model = onnx.shape_inference.infer_shapes(model)
    layers = _layers(model)
    if not layers:
        raise UserError(
            f"{backbone} has no convolution or matrix product that int8 would make faster; it is for networks like "
            "MobileNetV2, ResNet and ViT"
        )
    ranges = _activation_ranges(model, layers, calibration)
    reference = _features(model, others)

    def centered_cosine(candidate: ModelProto) -> float:
        found = torch.from_numpy(_features(candidate, others))
        return measure_agreement(found, torch.from_numpy(reference)).centered_cosine

    def without(kept: Iterable[str]) -> ModelProto:
        rounded = _quantized(model, ranges, set(layers) - set(kept))
        return _unshifted(rounded, _features(model, calibration) - _features(rounded, calibration))

    whole = without([])
    if centered_cosine(whole) >= _TARGET:
        return whole
    harm = {name: _spread(_features(_quantized(model, ranges, {name}), others) - reference) for name in layers}
    worst = sorted(layers, key=lambda name: -harm[name])
    most = int(len(layers) * _MOST_GIVEN_BACK)
    low, high = min(1, most), most  # the search ends at the fewest that are enough, or at as many as may be
    while low < high:
        middle = (low + high) // 2
        if centered_cosine(without(worst[:middle])) >= _TARGET:
            high = middle
        else:
            low = middle + 1
    return without(worst[:low])


def _layers(model: ModelProto) -> list[str]:
    """Names of the layers with constant weights that are worth rounding, in order."""
    weights = {weight.name for weight in model.graph.initializer}
    found = [node for node in model.graph.node if node.op_type in _LAYERS and node.input[1] in weights]
    # The first one sees the pixels. It is small beside depthwise convolutions and transformers, harms them most, and
    # in int8 slows MobileNetV2 down; for plain convolutional networks it is a tenth of the work.
    is_plain = all(node.op_type == "Conv" and _groups(node) == 1 for node in found)
    return [node.name for node in (found if is_plain else found[1:])]


def _groups(node: NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)


def _activation_ranges(model: ModelProto, layers: list[str], images: Pixels) -> dict[str, tuple[float, float]]:
    """For what goes into and comes out of the layers: the range with the least squared rounding error on `images`."""
    chosen = [node for node in model.graph.node if node.name in set(layers)]
    names = {name for node in chosen for name in (node.input[0], node.output[0])}
    for node in model.graph.node:  # in topological order
        if node.op_type in _CLAMPS and node.input[0] in names:
            names.add(node.output[0])
    return {name: _best_range(values) for name, values in _sampled(model, sorted(names), images).items()}


def _sampled(model: ModelProto, names: list[str], images: Pixels) -> dict[str, NDArray[np.float32]]:
    """Some values of each activation on `images`, the extremes of each batch among them."""
    open_model = onnx.load_model_from_string(model.SerializeToString())
    del open_model.graph.output[:]
    open_model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(open_model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        for name, value in zip(names, session.run(names, {INPUT: batch}), strict=True):
            flat = value.reshape(-1)
            sample = flat[rng.integers(0, len(flat), _SAMPLE * len(batch))]
            found[name] += [sample, np.array([flat.min(), flat.max()], np.float32)]
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _best_range(values: NDArray[np.float32]) -> tuple[float, float]:
    """The range, zero within, that 256 levels cover `values` (N,) with at the least squared error."""
    lowest, highest = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if highest == lowest:
        return lowest, highest

    def error(factor: float) -> float:
        step = (highest - lowest) * factor / 255
        zero = round(-lowest * factor / step)
        rounded = (np.clip(np.round(values / step) + zero, 0, 255) - zero) * step
        return float(((rounded - values) ** 2).sum())

    best = min(_SHRINKING, key=error)
    return lowest * best, highest * best


def _quantized(model: ModelProto, ranges: Mapping[str, tuple[float, float]], layers: set[str]) -> ModelProto:
    """The model with these layers in int8: activations U8, weights S8 of 7 bits for each output channel."""
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.transformers.onnx_model import OnnxModel

    clamps = [node.name for node in model.graph.node if node.op_type in _CLAMPS]
    found = {
        name: TensorData(lowest=np.float32(lowest), highest=np.float32(highest))
        for name, (lowest, highest) in ranges.items()
    }
    quantizer = QDQQuantizer(
        onnx.load_model_from_string(model.SerializeToString()),
        per_channel=True,
        reduce_range=True,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, found),
        nodes_to_quantize=[*layers, *clamps],
        nodes_to_exclude=[],
        op_types_to_quantize=[*_LAYERS, *_CLAMPS],
        # Products go on in fp32: what follows them in a transformer is not done in int8 anyway.
        extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
    )
    quantizer.quantize_model()
    quantized: ModelProto = quantizer.model.model
    del quantized.graph.value_info[:]  # shapes of what is no longer there
    OnnxModel(quantized).topological_sort()  # the quantizer puts what it adds at the end
    return quantized


def _unshifted(model: ModelProto, missing: NDArray[np.float32]) -> ModelProto:
    """The model with the mean of `missing` (N, width) added to its features."""
    graph = model.graph
    rounded = FEATURES + "_rounded"
    for node in graph.node:
        node.output[:] = [rounded if name == FEATURES else name for name in node.output]
    position = next(index for index, node in enumerate(graph.node) if rounded in node.output)
    shift = numpy_helper.from_array(missing.mean(0, dtype=np.float64).astype(np.float32), FEATURES + "_shift")
    graph.initializer.append(shift)
    graph.node.insert(position + 1, helper.make_node("Add", [rounded, shift.name], [FEATURES], name="unshift"))
    return model


def _features(model: ModelProto, inputs: Pixels) -> NDArray[np.float32]:
    return GraphRunner(model).run_in_batches(inputs, repeat(_BATCH))[FEATURES]


def _spread(difference: NDArray[np.float32]) -> float:
    """How much a difference of features (N, width) varies over images."""
    return float(difference.var(axis=0).sum())


def _descendants(model: ModelProto, name: str) -> list[NodeProto]:
    """The nodes that depend on the value called `name`, in the graph's order, which is topological."""
    reached = {name}
    found = []
    for node in model.graph.node:
        if reached.intersection(node.input):
            found.append(node)
            reached.update(node.output)
    return found
