import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from evaluation_data import write_checkpoint
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from registry_data import check_whole

from lowssl_core.command_line import main
from lowssl_core.encoder import load_encoder, save_encoder
from lowssl_core.photos import open_photos
from server.registry.registry import open_registry
from server.settings import Settings

Outcome = tuple[int, str, str]


class Shell:
    """`lowssl registry` on one folder."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys

    def run(self, *arguments: object) -> Outcome:
        self._capsys.readouterr()
        status = main(["registry", *map(str, arguments), "--data-dir", str(self.folder)])
        out, error = self._capsys.readouterr()
        return status, out, error

    def json(self, *arguments: object, status: int = 0) -> Any:
        found, out, error = self.run(*arguments, "--json")
        assert found == status, error
        return json.loads(out)

    def refusal(self, *arguments: object) -> str:
        status, out, error = self.run(*arguments)
        assert (status, out) == (2, "")
        assert error.startswith("lowssl registry: ")
        assert error.count("\n") == 1
        return error


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    folder = tmp_path / "probe"
    folder.mkdir()
    source = open_photos(split="test")
    for index in range(0, 160, 5):
        image = source.read(index)
        assert isinstance(image, np.ndarray)
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    monkeypatch.setenv("LOWSSL_SERVER_PROBE", str(folder))
    return Shell(tmp_path / "data", capsys)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose student and teacher differ."""
    return write_checkpoint(tmp_path_factory.mktemp("a run") / "checkpoint.safetensors")


def foreign_onnx(path: Path, *, collapsed: bool = False) -> Path:
    """An encoder that another program exported: float NCHW in, one output."""
    weights = np.random.default_rng(0).normal(size=(12, 3, 8, 8)).astype(np.float32)
    if collapsed:
        weights[:] = weights[0]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["maps"], strides=[8, 8]),
            helper.make_node("Relu", ["maps"], ["bent"]),
            helper.make_node("GlobalAveragePool", ["bent"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["y"]),
        ],
        "foreign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 12])],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def stored_features(shell: Shell, name: str, inputs: np.ndarray) -> np.ndarray:
    registry = open_registry(Settings(data_dir=shell.folder))
    session = onnxruntime.InferenceSession(str(registry.fetch(registry.version(name))))
    registry.close()
    (features,) = session.run(["features"], {"images": inputs})
    return np.asarray(features)


def test_what_is_imported_answers_as_its_source_does(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    student, teacher = (load_encoder(checkpoint, branch=branch) for branch in ("student", "teacher"))
    half = tmp_path / "half.safetensors"
    info = save_encoder(half, student.backbone, student.info, half=True)
    foreign = foreign_onnx(tmp_path / "foreign.onnx")
    done = [
        shell.json("import", checkpoint, "--why", "the first", "--who", "me"),
        shell.json("import", checkpoint, "--branch", "teacher", "--parent", "v1", "--licence", "MIT", "--name", "猫"),
        shell.json("import", half),
        shell.json("import", foreign),
    ]
    versions = [one["version"] for one in done]
    assert [version["name"] for version in versions] == ["v1", "v2", "v3", "v4"]
    assert [version["kind"] for version in versions] == ["pretrained"] * 3 + ["imported"]
    assert [sorted(version["files"]) for version in versions] == [["encoder", "onnx"]] * 3 + [["onnx"]]
    expected = {
        "v1": student.embed_inputs(inputs),
        "v2": teacher.embed_inputs(inputs),
        "v3": load_encoder(half).embed_inputs(inputs),
    }
    for name, features in expected.items():
        found = torch.from_numpy(stored_features(shell, name, inputs))
        assert (found - features).abs().max() < 1e-4 * features.abs().max(), name
    assert not torch.equal(expected["v1"], expected["v2"])
    about = versions[1]["description"]
    assert (about["name"], about["licence"], about["branch"], versions[1]["parent"]) == ("猫", "MIT", "teacher", "v1")
    assert versions[0]["facts"]["source"] == "checkpoint.safetensors"
    assert versions[0]["facts"]["recipe"]["method"]["name"] == "dino"
    assert (versions[0]["facts"]["step"], versions[0]["facts"]["total_steps"]) == (3, 4)
    assert versions[2]["description"]["weights_hash"] == info.weights_hash
    # The weights that are kept are those that the description speaks of.
    registry = open_registry(Settings(data_dir=shell.folder))
    for name in ("v1", "v2", "v3"):
        version = registry.version(name)
        kept = load_encoder(registry.fetch(version, "encoder"))
        assert kept.info.weights_hash == version.description.weights_hash
        assert torch.equal(kept.embed_inputs(inputs), expected[name])
    check_whole(registry)
    history = registry.events("v1")
    assert [(event.action, event.who, event.why) for event in history] == [("add", "me", "the first")]
    registry.close()
    # The same again, also by another name or from another file, is the same version.
    for source, name in ((checkpoint, "v1"), (half, "v3"), (foreign, "v4")):
        again = shell.json("import", source, "--name", "another")
        assert (again["is_new"], again["version"]["name"]) == (False, name)
    _, out, _ = shell.run("import", checkpoint)
    assert out == f"{checkpoint} is in the registry already: v1 (candidate)\n"
    assert len(shell.json("list")) == 4


def test_a_version_goes_its_way_by_commands_alone(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    shell.run("import", checkpoint)
    shell.run("import", foreign_onnx(tmp_path / "foreign [red].onnx", collapsed=True))
    promoted = shell.json("promote", "v1", "--why", "a start")
    assert promoted["promoted"] is True
    assert promoted["version"]["state"] == "serving"
    assert promoted["report"]["against"] is None
    refused = shell.json("promote", "v2", status=1)
    assert (refused["promoted"], refused["version"]["state"], refused["report"]["passed"]) == (False, "refused", False)
    status, out, error = shell.run("promote", "v2")
    assert status == 1
    assert re.search(r"^ ?\w+ +FAILED", out, re.MULTILINE)
    assert error.startswith("lowssl registry: v2 was refused: ")
    forced = shell.json("promote", "v2", "--force", "--who", "chief")
    assert (forced["promoted"], forced["report"]["passed"]) == (True, False)
    assert shell.json("rollback")["version"]["name"] == "v1"
    shown = shell.json("show", "v2")
    assert [(event["action"], event["who"] == "chief") for event in shown["events"]] == [
        ("add", False),
        ("refuse", False),
        ("refuse", False),
        ("force", True),
        ("retire", False),
    ]
    assert shown["state"] == "retired"
    _, out, _ = shell.run("show", "v2")
    assert "foreign [red]" in out
    assert "chief" in out
    _, out, _ = shell.run("list")
    assert re.search(r"v2 +retired +foreign \[red\]", out)
    difference = shell.json("diff", "v1", "v2")
    widths = difference["description"]["width"]
    assert "are" in difference["probe"]
    assert str(widths[0]) in difference["probe"]
    assert difference["agreement"] is None
    pruned = shell.json("prune", "--keep", "0", "--dry-run")
    assert pruned == shell.json("prune", "--keep", "0")
    assert (pruned["versions"], pruned["files"]) == (["v2"], 1)
    _, out, _ = shell.run("list")
    assert "pruned" in out
    _, out, _ = shell.run("diff", "v1", "v2")
    assert "v2 has no file any more" in out


def test_the_same_weights_in_other_clothes_agree(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    student = load_encoder(checkpoint)
    half = tmp_path / "half.safetensors"
    save_encoder(half, student.backbone, student.info, half=True)
    shell.run("import", checkpoint)
    shell.run("import", half)
    found = shell.json("diff", "v1", "v2")
    assert found["agreement"]["cosine"] > 0.9999
    assert found["description"]["weights_hash"][0] != found["description"]["weights_hash"][1]
    same = shell.json("diff", "v1", "v1")
    assert same["agreement"] == pytest.approx({"cosine": 1, "centered_cosine": 1, "neighbors": 1})
    _, out, _ = shell.run("diff", "v1", "v2")
    assert "centered cosine" in out


def test_what_cannot_be_done_is_one_line_and_leaves_nothing(shell: Shell, checkpoint: Path, tmp_path: Path) -> None:
    assert "there is no registry in" in shell.refusal("list")
    assert not shell.folder.exists()
    text = tmp_path / "text.onnx"
    text.write_text("no graph")
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"junk")
    for source, reason in (
        ("nowhere", "there is no encoder 'nowhere': give a checkpoint"),
        ("untrained:resnet18", "nothing to serve"),
        ("timm:no_such_model", "timm has no model"),
        (tmp_path, "there is no encoder"),
        (text, "text.onnx"),
        (tmp_path / "nowhere.onnx", "nowhere.onnx"),
        (junk, "junk.safetensors"),
    ):
        assert reason in shell.refusal("import", source)
    assert "goes with a checkpoint" in shell.refusal("import", "default", "--branch", "teacher")
    assert "there is no version v7" in shell.refusal("import", checkpoint, "--parent", "v7")
    assert "there is no version 'x'" in shell.refusal("show", "x")
    assert "there is no version v1: the registry is empty" in shell.refusal("promote", "v1")
    assert "nothing to roll back" in shell.refusal("rollback")
    assert "keep is -1" in shell.refusal("prune", "--keep", "-1")
    assert "no such setting" in shell.refusal("list", "--config", _toml(tmp_path, "colour = 1"))
    assert shell.json("list") == []
    assert [path for path in (shell.folder / "files").rglob("*") if path.is_file()] == []


def test_settings_may_say_where_the_registry_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = _toml(
        tmp_path, f'database_url = "sqlite:///{tmp_path}/elsewhere/r.db"\nfiles_url = "file://{tmp_path}/blobs"'
    )
    assert main(["registry", "import", str(checkpoint), "--config", str(config)]) == 0
    capsys.readouterr()
    assert main(["registry", "list", "--json", "--config", str(config)]) == 0
    (version,) = json.loads(capsys.readouterr().out)
    stored = {path.name for path in (tmp_path / "blobs").rglob("*") if path.is_file()}
    assert stored == {file["sha256"] for file in version["files"].values()}
    assert (tmp_path / "elsewhere" / "r.db").is_file()


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, server.commands.registry\n"
        "print([name for name in ('torch', 'sqlalchemy', 'onnx', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def _toml(folder: Path, content: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(content + "\n")
    return path
