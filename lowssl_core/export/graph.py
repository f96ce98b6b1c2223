"""An encoder as an ONNX graph: uint8 images in, normalization inside, features and unit-length embedding out."""

import copy
import warnings

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor, nn

from lowssl_core.encoder import Encoder
from lowssl_core.errors import UserError
from lowssl_core.export.description import EMBEDDING, FEATURES, INPUT, Layout
from lowssl_core.views import IMAGENET_MEAN, IMAGENET_STD

# The first with Gelu as one operator. Later ones bring nothing that these networks use, and each asks for newer
# runtimes: 20 is read by ONNX Runtime from 1.17 on, here, on phones and in browsers.
OPSET = 20

BATCH = "batch"


class EncoderGraph(nn.Module):
    """What the graph computes: an encoder from evaluation-style input to features and embedding.

    Args:
        backbone: from normalized images (B, 3, S, S) to (B, width).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        # The same numbers as in lowssl_core.views.normalize, which keeps them in a cache that tracing would spoil.
        self.register_buffer("shift", -mean / deviation)
        self.register_buffer("scale", (255 * deviation).reciprocal())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, width), and the same of length 1, of (B, S, S, 3) uint8."""
        planes = images.permute(0, 3, 1, 2).float() * self.scale + self.shift
        # Strides of channels_last would have the exporter spell out pooling as gathers.
        features = self.backbone(planes.contiguous()).float()
        # As functional.normalize does it, in fewer operators.
        return features, features / features.norm(dim=1, keepdim=True).clamp_min(1e-12)


def to_onnx(encoder: Encoder, *, layout: Layout = "nhwc") -> ModelProto:
    """The graph of an encoder on the CPU, without metadata, and without any trace of the machine that made it.

    The batch is dynamic. What depends on the weights alone, such as positions resampled to the input's size, is
    computed once, here.

    Args:
        encoder: it is left as it is.
        layout: of the input: (B, S, S, 3) or (B, 3, S, S).

    Raises:
        UserError: torch's exporter does not know what the backbone does.
    """
    backbone = copy.deepcopy(encoder.backbone).cpu().to(memory_format=torch.contiguous_format)
    for part in backbone.modules():
        # timm's switch between one fused call, which is exported with shapes computed at run time, and plain products.
        if isinstance(getattr(part, "fused_attn", None), bool):
            part.fused_attn = False  # type: ignore[assignment]
    try:
        model = _export(EncoderGraph(backbone).eval(), encoder.info.size)
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"backbone {encoder.info.backbone!r} cannot become an ONNX graph: {reason}") from None
    _strip(model)
    _fold_constants(model)
    return channels_first(model) if layout == "nchw" else model


def _export(graph: EncoderGraph, size: int) -> ModelProto:
    # The exporter warns its own developers, of deprecations inside it.
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        program = torch.onnx.export(
            graph,
            (torch.zeros(2, size, size, 3, dtype=torch.uint8),),  # a batch of 1 would be taken for a constant
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[FEATURES, EMBEDDING],
            dynamic_shapes={"images": {0: torch.export.Dim(BATCH)}},
            external_data=False,
        )
    assert program is not None
    model: ModelProto = program.model_proto
    return model


def channels_first(model: ModelProto) -> ModelProto:
    """A copy of an NHWC graph that takes (B, 3, S, S): the transposition that it begins with is left out."""
    model = copy.deepcopy(model)
    graph = model.graph
    (first,) = (node for node in graph.node if node.op_type == "Transpose" and list(node.input) == [INPUT])
    (turned,) = first.output
    for node in graph.node:
        node.input[:] = [INPUT if name == turned else name for name in node.input]
    graph.node.remove(first)
    batch, height, width, channels = graph.input[0].type.tensor_type.shape.dim
    sizes = [batch.dim_param, channels.dim_value, height.dim_value, width.dim_value]
    graph.input[0].CopyFrom(helper.make_tensor_value_info(INPUT, onnx.TensorProto.UINT8, sizes))
    _keep_only(model, {name for node in graph.node for name in (*node.input, *node.output)})
    return model


def _strip(model: ModelProto) -> None:
    """Remove what the exporter notes beside the graph: stack frames with absolute paths, module names, remarks."""
    graph = model.graph
    assert not model.functions, "the exporter inlines functions"
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    graph.name = "encoder"


def _fold_constants(model: ModelProto) -> None:
    """Replace, in place, what is computed from constants alone by what ONNX Runtime computes of it."""
    graph = model.graph
    known = {initializer.name for initializer in graph.initializer} | {""}
    folded: list[NodeProto] = []
    rest: list[NodeProto] = []
    for node in graph.node:  # in topological order
        is_constant = len(node.input) > 0 and known.issuperset(node.input)
        (folded if is_constant else rest).append(copy.deepcopy(node))
        if is_constant:
            known.update(node.output)
    made = {name for node in folded for name in node.output}
    needed = sorted(made & {name for node in rest for name in node.input})
    if not needed:
        return
    values = _evaluate(model, folded, needed)
    del graph.node[:]
    graph.node.extend(rest)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    _keep_only(model, {name for node in rest for name in (*node.input, *node.output)})


def _evaluate(model: ModelProto, nodes: list[NodeProto], outputs: list[str]) -> dict[str, np.ndarray]:
    """The values of `outputs`, which `nodes` compute from the model's constants."""
    import onnxruntime

    used = {name for node in nodes for name in node.input}
    part = helper.make_graph(
        nodes,
        "constants",
        inputs=[],
        outputs=[helper.make_empty_tensor_value_info(name) for name in outputs],
        initializer=[initializer for initializer in model.graph.initializer if initializer.name in used],
    )
    alone = helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = onnxruntime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(outputs, session.run(outputs, {}), strict=True))


def _keep_only(model: ModelProto, names: set[str]) -> None:
    """Drop constants and remarks on shapes of values that are no longer in the graph; inputs have no remarks."""
    graph = model.graph
    for entries in (graph.initializer, graph.value_info):
        kept = [copy.deepcopy(entry) for entry in entries if entry.name in names]
        del entries[:]
        entries.extend(kept)
