"""One encoder's ONNX file, checked and ready to run from any thread."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from lowssl_core.errors import UserError
from lowssl_core.export.description import EMBEDDING, FEATURES, INPUT, Description
from lowssl_core.images import Pixels

Provider = Literal["cpu", "cuda", "tensorrt"]

MAX_BATCH = 32
"""The most images that a GPU is given at a time."""

_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_OUTPUTS = [FEATURES, EMBEDDING]


class EncoderSession:
    """An encoder in ONNX Runtime: one thread for each call of `run`, as many calls at a time as there are callers.

    Args:
        path: an ONNX file as `lowssl export` writes it.
        provider: where it runs.

    Attributes:
        description: what the file says of itself.
        preprocess: how an image becomes its input.

    Raises:
        UserError: no such file, one of another kind, or one that cannot be run here.
    """

    def __init__(self, path: Path, *, provider: Provider = "cpu") -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        session = _open(path, [_PROVIDERS["cpu"]])
        properties = session.get_modelmeta().custom_metadata_map
        self.description = Description.from_properties(properties, of=str(path))
        self.preprocess = self.description.preprocess
        if provider != "cpu":
            session = _open(path, _on_gpu(provider, self.description))
        self._session = session
        self._check(path)

    def run(self, inputs: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Features (B, width) and the same at length 1, of evaluation-style input (B, size, size, 3) uint8."""
        if self.description.layout == "nchw":
            inputs = np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))
        features, embedding = self._session.run(_OUTPUTS, {INPUT: inputs})
        return features, embedding

    def _check(self, path: Path) -> None:
        """Refuse a file that does not hold what its description says, by its signature and by running it once."""
        size, width = self.description.size, self.description.width
        batch, *sides = self.description.input_shape
        inputs = [(entry.name, entry.type, *entry.shape) for entry in self._session.get_inputs()]
        if len(inputs) != 1 or inputs[0] != (INPUT, "tensor(uint8)", inputs[0][2], *sides):
            raise UserError(f"{path}: its inputs are {inputs}; an encoder has {INPUT}, uint8, ({batch}, {sides})")
        if isinstance(inputs[0][2], int):
            raise UserError(f"{path} takes batches of {inputs[0][2]} images alone; an encoder takes any number")
        outputs = {entry.name: entry.type for entry in self._session.get_outputs()}
        if any(outputs.get(name) != "tensor(float)" for name in _OUTPUTS):
            raise UserError(f"{path}: its outputs are {outputs}; an encoder has {' and '.join(_OUTPUTS)}, float")
        try:
            features, embedding = self.run(np.full((1, size, size, 3), 128, np.uint8))
        except Exception as error:  # ONNX Runtime has a class of its own for each kind of failure
            raise UserError(f"{path} cannot be run on an image: {_first_line(error)}") from None
        if features.shape != (1, width) or embedding.shape != (1, width):
            raise UserError(f"{path}: features are {features.shape}, embedding {embedding.shape}; width is {width}")
        if not (np.isfinite(features).all() and abs(float(np.linalg.norm(embedding)) - 1) < 1e-3):
            raise UserError(f"{path}: a gray image's features are not finite, or its embedding's length is not 1")


def available_gpus() -> list[Provider]:
    """The GPU providers that this installation of ONNX Runtime has; whether there is a GPU shows when one is opened."""
    names = onnxruntime.get_available_providers()
    return [provider for provider, name in _PROVIDERS.items() if provider != "cpu" and name in names]


def _open(path: Path, providers: list[Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # see above
        raise UserError(f"{path} cannot be read as an ONNX model: {_first_line(error)}") from None
    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if first not in session.get_providers():  # ONNX Runtime falls back to the CPU in near silence
        raise UserError(f"{path}: ONNX Runtime's {first} cannot be used on this machine")
    return session


def _on_gpu(provider: Provider, description: Description) -> list[Any]:
    """Providers with their options, first choice first: what one cannot run, the next one does."""
    # An exhaustive search for algorithms would start anew with each batch size.
    cuda = (_PROVIDERS["cuda"], {"cudnn_conv_algo_search": "HEURISTIC"})
    if provider == "cuda":
        return [cuda, _PROVIDERS["cpu"]]
    # One engine for all batch sizes; without a profile each new size would build another, in minutes.
    sides = "x".join(map(str, description.input_shape[1:]))
    batches = {"min": 1, "opt": MAX_BATCH // 2, "max": MAX_BATCH}
    profile = {f"trt_profile_{end}_shapes": f"{INPUT}:{batch}x{sides}" for end, batch in batches.items()}
    return [(_PROVIDERS["tensorrt"], profile), cuda, _PROVIDERS["cpu"]]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
