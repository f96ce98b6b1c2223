"""What the registry's tests share: descriptions and files made up, registries to open, and what must always be true."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lowssl_core.export.description import Description
from server.registry.registry import Registry
from server.registry.report import Check, GateReport
from server.registry.version import Event, Kind, Version

PIXELS = {
    "name": "pixels",
    "version": "new",
    "backbone": "none",
    "size": 32,
    "resize": 37,
    "method": "none",
    "weights_hash": "ab",
    "parity": 1e-6,
}


@dataclass(frozen=True)
class Place:
    """Where a registry is: what `open_registry` and the gate ask of settings."""

    data_dir: Path
    database_url: str | None = None
    files_url: str | None = None
    probe: Path | None = None
    probe_labelled: Path | None = None


def description(name: str = "something") -> Description:
    return Description(name=name, version="new", backbone="resnet18", width=512, size=64, resize=73, weights_hash="ab")


def pixel_encoder(projection: NDArray[np.float32], **described: object) -> tuple[bytes, Description]:
    """An ONNX file of LowSSL's kind that projects 8 x 8 mean colors, less their mean, and its description.

    Args:
        projection: (192, D).
        described: what the description says otherwise.
    """
    about = Description(**{**PIXELS, "width": projection.shape[1], **described})  # type: ignore[arg-type]
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["nchw"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("ReduceMean", ["flat", "axes"], ["mean"]),
        helper.make_node("Sub", ["flat", "mean"], ["centered"]),
        helper.make_node("MatMul", ["centered", "projection"], ["projected"]),
        helper.make_node("Add", ["projected", "bias"], ["features"]),
        helper.make_node("ReduceL2", ["features", "axes"], ["length"]),
        helper.make_node("Div", ["features", "length"], ["embedding"]),
    ]
    weights = {
        "projection": projection.astype(np.float32),
        "bias": np.full(projection.shape[1], 1e-3, np.float32),
        "axes": np.array([1]),
    }
    graph = helper.make_graph(
        nodes,
        "pixels",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 32, 32, 3])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", projection.shape[1]])
            for name in ("features", "embedding")
        ],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    helper.set_model_props(model, about.to_properties())
    return model.SerializeToString(), about


def add_pixel_encoder(
    registry: Registry, folder: Path, projection: NDArray[np.float32], *, kind: Kind = "pretrained", **described: object
) -> Version:
    content, about = pixel_encoder(projection, **described)
    files = {"onnx": write_file(folder, content)}
    return registry.add(kind=kind, description=about, files=files, who="a test")


def write_file(folder: Path, content: bytes, name: str = "file") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def add(registry: Registry, folder: Path, content: bytes = b"weights", **options: object) -> Version:
    files = {"onnx": write_file(folder, content)}
    return registry.add(kind="imported", description=description(), files=files, who="a test", **options)  # type: ignore[arg-type]


def report(version: str, *, passed: bool, against: str | None = None) -> GateReport:
    check = Check(name="rank", passed=passed, value=1.5, bound=None, why="because")
    return GateReport(version=version, against=against, probe="none", checks=[check], figures={"rankme": 1.5})


def replayed_states(events: Iterable[Event]) -> dict[str, str]:
    """The state of each version as its events have it."""
    states: dict[str, str] = {}
    for event in events:
        before = states.get(event.version)
        if event.action == "add":
            assert before is None
            states[event.version] = "candidate"
        elif event.action == "refuse":
            assert before in ("candidate", "refused", "retired")
            states[event.version] = "retired" if before == "retired" else "refused"
        elif event.action == "retire":
            assert before == "serving"
            states[event.version] = "retired"
        elif event.action == "prune":
            assert before in ("retired", "refused")
        else:
            assert before in (("retired",) if event.action == "rollback" else ("candidate", "refused", "retired"))
            assert "serving" not in states.values(), "the one before is retired first"
            states[event.version] = "serving"
    return states


def check_whole(registry: Registry) -> None:
    """What is true of a registry at any time."""
    versions = registry.versions()
    assert [version.number for version in versions] == list(range(1, len(versions) + 1))
    assert sum(version.state == "serving" for version in versions) <= 1
    assert {version.name: version.state for version in versions} == replayed_states(registry.events())
    for version in versions:
        for role, file in version.files.items():
            content = registry.fetch(version, role).read_bytes()
            assert (hashlib.sha256(content).hexdigest(), len(content)) == (file.sha256, file.bytes)
        assert version.files or version.state in ("retired", "refused"), "what may serve keeps its files"
