"""Encoders exported to ONNX, run by ONNX Runtime on the CPU."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowssl_core.encoder import EncoderInfo
from lowssl_core.errors import UserError
from lowssl_core.preprocess import Preprocess
from lowssl_core.views import normalize


class OnnxEncoder:
    """An ONNX file as an encoder.

    The input is images of one fixed size: uint8, (B, S, S, 3) or (B, 3, S, S), with the normalization in the graph, or
    float32 (B, 3, S, S), normalized by ImageNet's mean and standard deviation. Of the outputs the one called "features"
    is taken, or else the first. The short side before the centre crop is the file's metadata entry "resize", or else
    the usual margin of 256 to 224.

    Args:
        path: the file.

    Raises:
        UserError: ONNX Runtime is missing, or the file is not such a model.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"{path}: reading ONNX files takes onnxruntime: pip install 'lowssl[evaluation]'") from None
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a class of its own for each kind of broken file
            raise UserError(f"{path} cannot be read as an ONNX model: {str(error).splitlines()[0]}") from None
        self._input = self._session.get_inputs()[0]
        self._channels_first, size = _layout(path, self._input.shape)
        self._is_float = self._input.type == "tensor(float)"
        if not self._is_float and self._input.type != "tensor(uint8)":
            raise UserError(f"{path}: its input is {self._input.type}; an encoder's is uint8 or float")
        outputs = self._session.get_outputs()
        self._output = next((output for output in outputs if output.name == "features"), outputs[0])
        # A batch of the graph's own: exports for phones have a fixed one.
        self._batch = self._input.shape[0] if isinstance(self._input.shape[0], int) else None
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.preprocess = _preprocess(path, size, metadata)
        self.info = EncoderInfo(
            name=path.stem,
            backbone="onnx",
            width=self._width(path),
            **asdict(self.preprocess),
            weights_hash=hashlib.sha256(data).hexdigest(),
        )

    def embed_inputs(self, inputs: NDArray[np.uint8]) -> Tensor:
        """Features (B, width), float32, of evaluation-style input (B, size, size, 3)."""
        step = self._batch or len(inputs)
        parts = [self._run(inputs[start : start + step]) for start in range(0, len(inputs), step)]
        return torch.from_numpy(np.concatenate(parts))

    def _run(self, inputs: NDArray[np.uint8]) -> NDArray[np.float32]:
        count = len(inputs)
        if self._batch and count < self._batch:
            inputs = np.concatenate([inputs, np.repeat(inputs[-1:], self._batch - count, axis=0)])
        images: NDArray[Any] = inputs
        if self._is_float:
            images = normalize(torch.from_numpy(inputs)).contiguous().numpy()
        elif self._channels_first:
            images = np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))
        (features,) = self._session.run([self._output.name], {self._input.name: images})
        return np.asarray(features, np.float32)[:count]

    def _width(self, path: Path) -> int:
        """How long features are, by embedding a gray image: a graph's own word for it is often symbolic."""
        size = self.preprocess.size
        try:
            features = self._run(np.full((1, size, size, 3), 128, np.uint8))
        except Exception as error:  # see above
            raise UserError(f"{path} cannot be run on an image: {str(error).splitlines()[0]}") from None
        if features.ndim != 2:
            raise UserError(f"{path}: its output {self._output.name!r} has shape {features.shape}, not (B, width)")
        return int(features.shape[1])


def _layout(path: Path, shape: list[int | str | None]) -> tuple[bool, int]:
    """Whether channels come first, and the side of the images."""
    if len(shape) == 4:
        for channels_first, sides in ((True, shape[2:4]), (False, shape[1:3])):
            if shape[1 if channels_first else 3] == 3 and isinstance(sides[0], int) and sides[0] == sides[1]:
                return channels_first, sides[0]
    raise UserError(f"{path}: its input has shape {shape}; an encoder's is (B, S, S, 3) or (B, 3, S, S) with fixed S")


def _preprocess(path: Path, size: int, metadata: dict[str, str]) -> Preprocess:
    try:
        resize = int(metadata["resize"]) if "resize" in metadata else None
        return Preprocess(size=size, resize=resize)
    except ValueError as error:
        raise UserError(f"{path}: its metadata's resize cannot be used: {error}") from None
