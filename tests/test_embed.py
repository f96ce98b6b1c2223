"""`lowssl embed`: every format holds the same embeddings and paths, and a killed call goes on."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from evaluation_data import write_checkpoint, write_data
from numpy.typing import NDArray
from pyarrow import parquet

from lowssl_core.command_line import main
from lowssl_core.encoder import load_encoder
from lowssl_core.evaluation.subjects import fingerprint
from lowssl_core.sources import open_source
from lowssl_core.sources.memory import read_pixels


def read(path: Path) -> tuple[list[str], set[str], NDArray[np.float32]]:
    """Paths, fingerprints and embeddings in a file."""
    if path.suffix == ".parquet":
        table = parquet.read_table(path)
        assert table.schema.metadata[b"lowssl.model"].decode() in table["model"].to_pylist()
        values = np.array(table["embedding"].to_pylist(), np.float32)
        return table["path"].to_pylist(), set(table["model"].to_pylist()), values
    if path.suffix == ".npy":
        beside = json.loads(path.with_name(f"{path.name}.json").read_text())
        return beside["paths"], {beside["model"]}, np.load(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    values = np.array([[row[f"e{i}"] for i in range(len(row) - 2)] for row in rows], np.float32)
    return [row["path"] for row in rows], {row["model"] for row in rows}, values


@pytest.mark.parametrize("ending", ["parquet", "npy", "csv"])
def test_each_format_holds_the_paths_the_fingerprint_and_every_bit_of_the_embeddings(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data")
    (data / "train" / "cat" / 'a "b", c.png').write_bytes((data / "train" / "cat" / "00.png").read_bytes())
    (data / "train" / "cat" / "zz.png").write_bytes(b"")
    path = tmp_path / "out" / f"e.{ending}"
    assert main(["embed", str(data), "--checkpoint", "default", "--out", str(path)]) == 0
    said = capsys.readouterr()
    encoder, source = load_encoder("default"), open_source(str(data))
    good = [i for i in range(len(source)) if source.name(i) != "train/cat/zz.png"]
    paths, models, values = read(path)
    assert paths == [source.name(i) for i in good]
    assert models == {fingerprint(encoder)}
    inputs = np.stack([encoder.preprocess(read_pixels(source, i)) for i in good])
    assert np.array_equal(values, encoder.embed_inputs(inputs).numpy())
    assert f"{len(good)} embeddings of 256 numbers, model {fingerprint(encoder)}" in said.out
    assert "left out: train/cat/zz.png (empty file)" in said.err
    assert not path.with_name(f"{path.name}.partial").exists()


def test_a_checkpoint_gives_either_branch(tmp_path: Path) -> None:
    data, checkpoint = write_data(tmp_path / "data", 2, 1), write_checkpoint(tmp_path / "c.safetensors")
    for branch in ("student", "teacher"):
        out = tmp_path / f"{branch}.npy"
        arguments = ["embed", str(data), "--checkpoint", str(checkpoint), "--out", str(out), "--branch", branch]
        assert main(arguments) == 0
        assert read(out)[1] == {fingerprint(load_encoder(checkpoint, branch=branch))}  # type: ignore[arg-type]
    assert not np.allclose(np.load(tmp_path / "student.npy"), np.load(tmp_path / "teacher.npy"))


def test_a_killed_process_goes_on_and_ends_with_the_same_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lowssl_core.command_line", "embed", "photos", "--checkpoint", "default", "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    straight, killed = tmp_path / "straight.npy", tmp_path / "killed.npy"
    assert main(["embed", "photos", "--checkpoint", "default", "--out", str(straight)]) == 0
    process = subprocess.Popen([*command, str(killed)], env=environment)
    waited = time.monotonic()
    while not list(tmp_path.glob("killed.npy.partial/*/state.json")) and process.poll() is None:
        assert time.monotonic() - waited < 60
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists(), "it was too quick to be killed"
    (state,) = tmp_path.glob("killed.npy.partial/*/state.json")
    assert 0 < json.loads(state.read_text())["next"] < 1877
    done = subprocess.run([*command, str(killed)], env=environment, capture_output=True, text=True, check=True)
    assert "1,877 embeddings" in done.stdout
    assert np.array_equal(np.load(killed), np.load(straight))


@pytest.mark.parametrize(
    ("path", "out", "model", "message"),
    [
        ("photos", "e.txt", "default", "wanted a name that ends in .parquet, .npy, .csv"),
        ("photos", ".", "default", "is a folder; give the file to write"),
        ("photos", "e.npy", "nothing", "there is no model 'nothing'"),
        ("nothing", "e.npy", "default", "there is no data at 'nothing'"),
    ],
)
def test_wrong_input_is_one_line(
    path: str, out: str, model: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", path, "--checkpoint", model, "--out", str(tmp_path / out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lowssl embed: ")
    assert message in said
    assert said.count("\n") == 1
