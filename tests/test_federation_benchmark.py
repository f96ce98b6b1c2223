"""benchmarks/federation.py accounts for a recorded federation, deals images out, and sees what a process takes."""

import importlib
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowssl_core.errors import UserError
from lowssl_core.photos import open_photos
from lowssl_core.protocol.manifest import Entry, Manifest
from lowssl_core.sources import ArraySource
from server.federation.history import Completed, History, Record

MANIFEST = Manifest((Entry(name="weight", shape=(1000,), dtype="float32", offset=0, kind="parameter"),))
START = datetime(2026, 3, 1, 12, 0, 0).timestamp()
# Seconds after the start at which each round was on the disk, and at which each device began and answered it.
SAVED = {0: 0.0, 1: 20.0, 2: 28.0, 3: 38.5}
DEVICES = {
    "near": {1: (5.0, 18.0), 2: (23.5, 26.0), 3: (32.25, 37.5)},
    "far": {1: (6.0, 19.0), 2: (24.0, 27.25), 3: (33.0, 36.0)},
}
TRAINED = {"near": {1: 9.0, 2: 1.5, 3: 2.0}, "far": {1: 9.0, 2: 1.25, 3: 2.5}}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    # The benchmarks are programs beside the package, which import each other as they lie.
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("federation")


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """A federation's folder after three rounds, and its devices' logs."""
    model = np.zeros(MANIFEST.size, np.float32)
    history = History.begin(tmp_path, MANIFEST, model)
    for version, moment in SAVED.items():
        if version:
            replies = tuple({"device": name, "metrics": {"seconds": TRAINED[name][version]}} for name in DEVICES)
            record = Record(
                version=version,
                seconds=moment - SAVED[version - 1] - 0.5,
                asked=tuple(DEVICES),
                accepted=replies,
                bytes_down=4000,
                bytes_up=2200,
            )
            history.save(Completed(record, model))
        os.utime(tmp_path / "rounds" / f"{version:06}" / "round.json", (START + moment, START + moment))
    logs = {}
    for name, rounds in DEVICES.items():
        lines = []
        for number, (begun, answered) in rounds.items():
            lines += [f"{stamp(begun)} round {number}: begun"]
            lines += [f"{stamp(answered)} round {number}: answered after 4 steps"]
        logs[name] = tmp_path / f"{name}.log"
        logs[name].write_text("\n".join(lines))
    return tmp_path, logs


def stamp(seconds: float) -> str:
    """As a device's log has it."""
    return datetime.fromtimestamp(START + seconds).strftime("%Y-%m-%d %H:%M:%S,%f")[:-3]


def test_overhead_is_a_round_less_the_longest_training(benchmark: Any, recorded: tuple[Path, dict[str, Path]]) -> None:
    second, third = benchmark.read_rounds(*recorded)
    assert (second["round"], third["round"]) == (2, 3)
    assert second["seconds"] == pytest.approx(28.0 - 20.0)
    assert second["recorded_seconds"] == pytest.approx(7.5)
    assert second["overhead"] == pytest.approx(8.0 - 1.5)
    assert third["overhead"] == pytest.approx(10.5 - 2.5)
    assert (second["bytes_down"], second["bytes_up"]) == (2000, 1100)


def test_parts_follow_the_device_that_answered_last_and_make_up_the_round(
    benchmark: Any, recorded: tuple[Path, dict[str, Path]]
) -> None:
    second, third = benchmark.read_rounds(*recorded)
    parts = {row["round"]: [row[part] for part in benchmark.PARTS] for row in (second, third)}
    assert parts[2] == pytest.approx([4.0, 1.25, 3.25 - 1.25, 0.75])
    assert parts[3] == pytest.approx([32.25 - 28.0, 2.0, 5.25 - 2.0, 1.0])
    for row in (second, third):
        assert sum(row[part] for part in benchmark.PARTS) == pytest.approx(row["seconds"])


def test_summary_counts_rounds_below_the_bound_and_divides_by_plain_flower(
    benchmark: Any, recorded: tuple[Path, dict[str, Path]]
) -> None:
    found = benchmark.summarize(benchmark.read_rounds(*recorded), {"number": [7.0, 7.0, 9.0], "network": [29.0]})
    assert found["overhead"] == pytest.approx({"median": 7.25, "least": 6.5, "most": 8.0})
    assert found["over_plain_number"] == pytest.approx(7.25 / 7)
    assert found["over_plain_network"] == pytest.approx(0.25)
    assert found["rounds_below_bound"] == 2


def test_no_image_is_dealt_to_two_devices(benchmark: Any, tmp_path: Path) -> None:
    photos = open_photos(split="train")
    names = [photos.name(index) for index in range(40)]
    source = ArraySource(np.stack([photos.read(index) for index in range(40)]), names, description="photographs")
    fleet, folders = importlib.import_module("fleet"), [tmp_path / "a", tmp_path / "b"]
    fleet.deal_images(source, folders, 18)
    dealt = [path.read_bytes() for folder in folders for path in folder.iterdir()]
    assert len(set(dealt)) == len(dealt) == 36
    with pytest.raises(UserError, match="photographs: 48 images are needed"):
        fleet.deal_images(source, [*folders, tmp_path / "c"], 18)


def test_a_process_is_seen_with_the_memory_that_it_takes(benchmark: Any) -> None:
    watch = importlib.import_module("process_watch").ProcessWatch
    code = "import sys; data = b'x' * 64 * 2**20; print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "client.main"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with watch({"device-1": process.pid}) as watched:
            deadline = time.monotonic() + 60
            while not watched.rows() and time.monotonic() < deadline:
                time.sleep(0.05)
        process.communicate()
    (row,) = watched.rows()
    assert (row["side"], row["role"], row["processes"]) == ("device", "agent", 1)
    assert 64 < row["proportional_mib"] <= row["resident_mib"] < 128


def test_without_images_it_is_skipped_and_nonsense_is_refused(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main([]) == 0
    assert capsys.readouterr().out == "federation: skipped, --data was not given\n"
    assert benchmark.main(["--data", str(tmp_path), "--rounds", "1"]) == 2
    assert capsys.readouterr().err == "federation: --rounds 1: wanted a whole number from 2\n"
    assert benchmark.main(["--data", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
