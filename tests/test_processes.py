"""A kept program: started again when it ends, stopped with all that it has started, and gone with its keeper."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lowssl_core.errors import UserError
from lowssl_core.processes import KeptProcess, programs_path

ENVIRONMENT = {"PATH": programs_path()}
PATIENCE = 120.0

# Writes its own number and those of two children, one of them in a session of its own.
PROGRAM = """
import os, subprocess, sys, time
children = [subprocess.Popen(["sleep", "1000"], start_new_session=own) for own in (False, True)]
with open(sys.argv[1] + ".new", "w") as file:
    file.write(" ".join(str(number) for number in (os.getpid(), *(child.pid for child in children))))
os.replace(sys.argv[1] + ".new", sys.argv[1])
time.sleep(1000)
"""

KEEPER = """
import os, sys, time
from pathlib import Path
from lowssl_core.processes import KeptProcess
folder = Path(sys.argv[2])
command = [sys.executable, "-c", sys.argv[1], f"{folder}/numbers"]
KeptProcess(command, environment=dict(os.environ), log=folder / "log").start()
time.sleep(1000)
"""


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kept(folder: Path, *command: str) -> KeptProcess:
    return KeptProcess(command, environment=ENVIRONMENT, log=folder / "log")


def numbers(path: Path) -> list[int]:
    wait_for(path.exists)
    return [int(word) for word in path.read_text().split()]


def test_a_stopped_program_leaves_nothing_behind(tmp_path: Path) -> None:
    with kept(tmp_path, sys.executable, "-c", PROGRAM, str(tmp_path / "numbers")) as process:
        pids = numbers(tmp_path / "numbers")
        assert all(map(runs, pids))
        assert process.pid == pids[0]
    assert not any(map(runs, pids))


def test_a_program_that_is_killed_is_started_again_and_what_it_started_is_gone(tmp_path: Path) -> None:
    with kept(tmp_path, sys.executable, "-c", PROGRAM, str(tmp_path / "numbers")) as process:
        first = numbers(tmp_path / "numbers")
        (tmp_path / "numbers").unlink()
        os.kill(first[0], signal.SIGKILL)
        second = numbers(tmp_path / "numbers")
        assert process.starts == 2
        assert process.pid == second[0] != first[0]
        assert not any(map(runs, first))


def test_a_program_that_cannot_be_started_yet_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()  # no file can be opened there, as on a full disk
    with kept(tmp_path, sys.executable, "-c", "print('here', flush=True); input()") as process:
        wait_for(lambda: process.starts == 1)
        (tmp_path / "log").rmdir()
        wait_for(lambda: "here" in process.tail())


def test_a_program_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    deaf = "trap '' TERM; echo deaf; while true; do sleep 0.1; done"
    with KeptProcess(["sh", "-c", deaf], environment=ENVIRONMENT, log=tmp_path / "log", grace_seconds=0.2) as process:
        wait_for(lambda: process.tail(1) == "deaf")
        pid = process.pid
        assert pid is not None
    assert not runs(pid)


def test_a_program_and_all_it_started_die_with_its_keeper_however_that_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KEEPER, PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, env=os.environ | ENVIRONMENT) as keeper:
        pids = numbers(tmp_path / "numbers")
        keeper.kill()
    wait_for(lambda: not any(map(runs, pids)))


def test_a_program_is_told_to_end_when_its_keeper_dies_so_that_it_can_say_goodbye(tmp_path: Path) -> None:
    polite = "trap 'echo goodbye; exit' TERM; touch $0/numbers; while true; do sleep 0.1; done"
    keeper_program = KEEPER.replace(
        '[sys.executable, "-c", sys.argv[1], f"{folder}/numbers"]', '["sh", "-c", *sys.argv[1:]]'
    )
    with subprocess.Popen(
        [sys.executable, "-c", keeper_program, polite, str(tmp_path)], env=os.environ | ENVIRONMENT
    ) as keeper:
        wait_for((tmp_path / "numbers").exists)
        keeper.kill()
    wait_for(lambda: "goodbye" in (tmp_path / "log").read_text())


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such-program is not installed"):
        kept(tmp_path, "no-such-program").start()
