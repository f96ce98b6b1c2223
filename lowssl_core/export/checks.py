"""What an exported encoder must pass: a sound graph, the figures of torch, and agreement of low precision with fp32."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import cycle, repeat
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lowssl_core.errors import UserError
from lowssl_core.export.description import EMBEDDING, FEATURES, INPUT, Description, Precision
from lowssl_core.images import Pixels
from lowssl_core.neighbors import nearest
from lowssl_core.preprocess import Preprocess

BATCHES = (1, 3, 8)
"""Sizes of the batches that a graph is tried with."""

PARITY_BOUND = 1e-4
"""How far fp32 may lie from torch (`parity`)."""

BOUNDS: Mapping[Precision, Mapping[str, float]] = MappingProxyType(
    {"fp32": {}, "fp16": {"cosine": 0.9999}, "int8": {"centered_cosine": 0.98, "neighbors": 0.98}}
)
"""How much of `Agreement` a precision must reach. int8 is not held to the plain cosine: what all images share, which
says nothing about any of them, makes up most of it."""

_IN_WORDS = {
    "cosine": "mean cosine to fp32",
    "centered_cosine": "centered cosine to fp32",
    "neighbors": "nearest-neighbor agreement with fp32",
}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How alike two encoders see the same images.

    Attributes:
        cosine: mean cosine between the two features of an image.
        centered_cosine: the same after taking the reference's mean over all images off both.
        neighbors: share of images whose nearest other image, by cosine, is the same.
    """

    cosine: float
    centered_cosine: float
    neighbors: float

    def as_dict(self) -> dict[str, float]:
        """The figures by their names in `Description.agreement`."""
        return asdict(self)


class GraphRunner:
    """An exported encoder on ONNX Runtime's CPU provider, on one thread.

    Args:
        model: with the inputs and outputs that `to_onnx` makes, or a core graph of float32 (1, 3, S, S).
    """

    def __init__(self, model: ModelProto) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        data = model.SerializeToString()
        self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self._is_channels_first = self._session.get_inputs()[0].shape[1] == 3
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """The outputs by name, (B, width) each, of evaluation-style input (B, S, S, 3) in the type the graph takes."""
        images = inputs.transpose(0, 3, 1, 2) if self._is_channels_first else inputs
        found = self._session.run(self._outputs, {INPUT: np.ascontiguousarray(images)})
        return dict(zip(self._outputs, found, strict=True))

    def run_in_batches(self, inputs: NDArray[Any], sizes: Iterable[int]) -> dict[str, NDArray[np.float32]]:
        """The same for (N, S, S, 3), in batches of these sizes as long as there are images."""
        parts, start = [], 0
        for size in sizes:
            if start >= len(inputs):
                break
            parts.append(self.run(inputs[start : start + size]))
            start += size
        return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}


def check_structure(model: ModelProto, description: Description) -> None:
    """Look at the graph without running it.

    Raises:
        UserError: onnx.checker finds fault with it, or its inputs and outputs are not those described.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"{description.name}: onnx.checker refuses the graph: {str(error).splitlines()[0]}") from None
    expected = {
        INPUT: (TensorProto.UINT8, list(description.input_shape)),
        FEATURES: (TensorProto.FLOAT, ["batch", description.width]),
        EMBEDDING: (TensorProto.FLOAT, ["batch", description.width]),
    }
    found = {
        value.name: (
            value.type.tensor_type.elem_type,
            [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim],
        )
        for value in (*model.graph.input, *model.graph.output)
    }
    if found != expected:
        raise UserError(f"{description.name}: the graph has {found}; expected {expected}")


def measure_parity(runner: GraphRunner, inputs: Pixels, expected: Tensor) -> float:
    """How far an fp32 graph's outputs lie from torch's at batch 1, 3 and 8: the largest `relative_difference`.

    Args:
        runner: the graph.
        inputs: evaluation-style (N, S, S, 3); eight or more.
        expected: torch's features of them (N, width).

    Raises:
        UserError: an output that is not finite.
    """
    wanted = {FEATURES: expected.numpy(), EMBEDDING: F.normalize(expected).numpy()}
    differences = []
    for batch in BATCHES:
        outputs = runner.run_in_batches(inputs, repeat(batch))
        check_finite(outputs)
        differences += [relative_difference(outputs[name], values) for name, values in wanted.items()]
    return max(differences)


def relative_difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest difference over the largest expected number: numbers near zero have no error of their own."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def features_in_mixed_batches(runner: GraphRunner, inputs: Pixels) -> Tensor:
    """Features (N, width) of evaluation-style input, in batches of 1, 3, 8, 1, 3, 8 ...

    A graph whose answer to an image depends on the images beside it, as one that scales activations by their
    largest does, shows that in its agreement.

    Raises:
        UserError: an output that is not finite, or an embedding that is not its features at length 1.
    """
    outputs = runner.run_in_batches(inputs, cycle(BATCHES))
    check_finite(outputs)
    features = torch.from_numpy(outputs[FEATURES])
    off = float((F.normalize(features) - torch.from_numpy(outputs[EMBEDDING])).abs().max())
    if off > 1e-2:
        raise UserError(f"the graph's embedding is not its features at length 1: they differ by {off:.2g}")
    return features


def check_finite(outputs: Mapping[str, NDArray[np.float32]]) -> None:
    """Refuse outputs with NaN or infinity by a UserError."""
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise UserError(f"the graph's {name} are not all finite: the weights are broken, or too large for it")


def measure_agreement(features: Tensor, reference: Tensor) -> Agreement:
    """Compare features (N, D) with a reference's (N, D) of the same images, two or more, all different."""
    ours, theirs = features.double(), reference.double()
    mean = theirs.mean(0)
    here, there = nearest_other(features), nearest_other(reference)
    return Agreement(
        cosine=float(F.cosine_similarity(ours, theirs).mean()),
        centered_cosine=float(F.cosine_similarity(ours - mean, theirs - mean).mean()),
        neighbors=float((here == there).double().mean()),
    )


def nearest_other(features: Tensor) -> Tensor:
    """(N,) which other row each of the features (N, D) is nearest to, by cosine."""
    _, found = nearest(features, features, 2)
    itself = torch.arange(len(features))
    return torch.where(found[:, 0] == itself, found[:, 1], found[:, 0])


def missed_bounds(precision: Precision, parity: float, agreement: Mapping[str, float]) -> list[str]:
    """Which bounds an export misses, each in a few words with its figure; none if it is good."""
    missed = []
    if parity > PARITY_BOUND:
        missed.append(f"parity with torch is {parity:.1e}, above {PARITY_BOUND:.0e}")
    missed += [
        f"{_IN_WORDS[name]} is {agreement[name]:.4f}, below {bound}"
        for name, bound in BOUNDS[precision].items()
        if agreement[name] < bound
    ]
    return missed


def distinct_inputs(images: Iterable[Pixels], preprocess: Preprocess, most: int) -> Pixels:
    """Evaluation-style input (N, S, S, 3) of the first `most` images that differ in it; the rest is not looked at."""
    found: dict[bytes, Pixels] = {}
    for image in images:
        pixels = preprocess(image)
        found.setdefault(pixels.tobytes(), pixels)
        if len(found) == most:
            break
    size = preprocess.size
    return np.stack(list(found.values())) if found else np.empty((0, size, size, 3), np.uint8)
