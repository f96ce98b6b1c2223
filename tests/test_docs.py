"""What the README says is true: its commands run, its Python runs, its tables and tree are complete."""

import ast
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from client.config import CapsConfig, DeviceConfig, load_config
from client.sensors import QuietHoursConfig
from lowssl_core.photos import open_photos
from lowssl_core.recipe import recipe_names
from server.api.descriptions import routes_table
from server.app import create_app
from server.federation.operation import VersionsConfig
from server.federation.plan import Plan
from server.federation.plans import read_plan
from server.settings import Settings, settings_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# What makes a run of the README short; all else is as written.
SHORTER = [
    f"--set={change}"
    for change in (
        "epochs=1",
        "data.batch_size=8",
        "method.hidden=16",
        "method.outputs=16",
        "views.global_size=32",
        "views.num_locals=1",
        "views.local_size=18",
        "monitor.quality_images=2",
        "monitor.quality_every_epochs=1",
    )
]


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def command_lines() -> list[str]:
    """Every command of the README: whole lines of its shell blocks, and `lowssl...` or torchrun in running text."""
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    # What stands in running text first: the blocks after it compare its run with theirs.
    return re.findall(r"`(torchrun [^`]+)`", README) + [line for line in lines if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, as the README's reader has one."""
    folder = tmp_path_factory.mktemp("readme")
    photos = open_photos(split="train")
    for place in ("IMAGES", "IMAGENET/train"):
        (folder / place).mkdir(parents=True)
        for index in range(16):
            Image.fromarray(photos.read(index * 100)).save(folder / place / f"{index}.png")
    return folder


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """The servers that the README's commands left running; they end with the test."""
    running: list[subprocess.Popen[bytes]] = []
    yield running
    for process in running:
        process.terminate()
    assert [process.wait(30) for process in running] == [0] * len(running)


def start_server(command: list[str], folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Start `lowssl-server` as its line in the README does, at another port, and wait until it is ready."""
    process = subprocess.Popen([*command, "--port", str(port)], cwd=folder)
    for _ in range(300):
        assert process.poll() is None
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
        except OSError:
            time.sleep(0.1)
        else:
            return process
    raise AssertionError("lowssl-server is not ready after 30 s")


def test_every_command_of_the_readme_runs(folder: Path, servers: list[subprocess.Popen[bytes]]) -> None:
    bin_folder = Path(sys.executable).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ran = 0
    for line in command_lines():
        program, *arguments = shlex.split(line)
        if program == "make":
            continue  # make test is this; make demo has a test of its command
        if program.endswith("lowssl-server"):
            servers.append(start_server([str(bin_folder / "lowssl-server"), *arguments], folder, port))
            ran += 1
            continue
        if program == "curl":
            command = ["curl", "--silent", "--fail", *(word.replace("8080", str(port)) for word in arguments)]
            answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
            assert len(json.loads(answer)["embeddings"][0]["embedding"]) == json.loads(answer)["dimension"]
            ran += 1
            continue
        if "lowssl-pretrain" in line or "lowssl_core.pretrain" in line or "diagnose" in line:
            arguments += SHORTER
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        # Two processes show the same as eight.
        command = [str(bin_folder / Path(program).name), *("2" if word == "8" else word for word in arguments)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran == 15
    for made in (
        "views.png",
        "runs/mine/encoder.safetensors",
        "runs/mine/recalibrated.safetensors",
        "runs/dino",
        "embeddings.parquet",
        "compare.html",
        "diagnosis/pixel-scale.png",
        "encoder.onnx",
    ):
        assert (folder / made).exists()


def test_the_python_of_the_readme_runs() -> None:
    for block in blocks("python"):
        names: dict[str, object] = {}
        exec(block, names)
        assert tuple(names["features"].shape) == (8, 256)  # type: ignore[attr-defined]


def test_the_readme_names_every_recipe_and_no_other() -> None:
    table = README.split("## Recipes")[1].split("## ")[0]
    assert set(re.findall(r"`([a-z0-9-]+)`", table)) == set(recipe_names())


def test_the_file_tree_has_each_module_with_its_first_sentence() -> None:
    tree = README.split("## Files")[1].split("## ")[0]
    for place in ("lowssl_core", "server", "client", "benchmarks"):
        for path in (ROOT / place).rglob("*.py"):
            sentence = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
            if path.name != "__init__.py":
                assert re.search(rf"{re.escape(path.name)} +{re.escape(sentence)}\n", tree), f"{path.name}  {sentence}"


def test_the_docs_have_every_setting_and_every_route() -> None:
    assert settings_table() in (ROOT / "docs" / "serving.md").read_text()
    assert routes_table(create_app(Settings()).openapi()) in (ROOT / "docs" / "api.md").read_text()


def test_the_docs_tell_the_defaults_of_plans_and_devices() -> None:
    text = (ROOT / "docs" / "federation.md").read_text()
    plan, device = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.toml"
        path.write_text(plan)
        read = read_plan(path)
        assert (read.plan, read.versions, read.schedule.every_hours) == (Plan(), VersionsConfig(), 24)
        path.write_text(device)
        config = load_config(path)
        assert (config.caps.threads, config.conditions.quiet_hours.start) == (2, "22:00")
        conditions = replace(config.conditions, quiet_hours=QuietHoursConfig())
        assert replace(config, conditions=conditions, caps=CapsConfig()) == DeviceConfig()


def test_the_docs_of_the_federation_have_its_routes() -> None:
    routes = routes_table(create_app(Settings(federation=True)).openapi()).splitlines()
    text = (ROOT / "docs" / "federation.md").read_text()
    assert all(line in text for line in routes if "/v1/devices" in line or "/v1/federation" in line)
