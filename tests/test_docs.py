"""What the README says is true: its commands run, its Python runs, its tables and tree are complete."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lowssl_core.photos import open_photos
from lowssl_core.recipe import recipe_names

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


def test_every_command_of_the_readme_runs(folder: Path) -> None:
    bin_folder = Path(sys.executable).parent
    ran = 0
    for line in command_lines():
        program, *arguments = shlex.split(line)
        if program == "make":
            continue  # make test is this; make demo has a test of its command
        if "lowssl-pretrain" in line or "lowssl_core.pretrain" in line or "diagnose" in line:
            arguments += SHORTER
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        # Two processes show the same as eight.
        command = [str(bin_folder / Path(program).name), *("2" if word == "8" else word for word in arguments)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran == 10
    for made in (
        "views.png",
        "runs/mine/encoder.safetensors",
        "runs/mine/recalibrated.safetensors",
        "runs/dino",
        "embeddings.parquet",
        "compare.html",
        "diagnosis/pixel-scale.png",
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
    for place in ("lowssl_core", "benchmarks"):
        for path in (ROOT / place).rglob("*.py"):
            sentence = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
            if path.name != "__init__.py":
                assert re.search(rf"{re.escape(path.name)} +{re.escape(sentence)}\n", tree), f"{path.name}  {sentence}"
