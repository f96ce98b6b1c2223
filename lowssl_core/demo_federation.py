"""The demonstration's last step: three devices and a server, real programs, train the encoder on together."""

import json
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from lowssl_core.interruption import Interruption

# How many rounds, the steps of a device in each, and the images it gets before and after its scenes change.
ROUNDS, STEPS, IMAGES = 6, 60, 300
RESULTS = "results.json"
_POLL_SECONDS = 0.1


def why_not() -> str:
    """Why this installation cannot run a federation, in one line that says what to do; "" if it can."""
    if sys.platform != "linux":
        return "left out: a federation's programs run on Linux"
    if find_spec("flwr") is None:
        return "left out: a federation takes Flower, which is not installed: pip install 'lowssl[server,client]'"
    return ""


def federate(checkpoint: Path, server: Path, out: Path, picture: Path) -> int:
    """Run the federation to its end, printing how it goes; nothing of it runs any more when this returns.

    A signal that asks this program to stop is passed on.

    Args:
        checkpoint: of the run that devices go on with.
        server: the server's folder, which has the run's encoder; rounds become versions in it.
        out: folder of the devices, the logs and the figures, made anew.
        picture: the PNG of the curves.

    Returns:
        An exit status: 0, 2 if something failed and a line on stderr says what, 130 or 143 where it was told to stop.
    """
    paths = {"checkpoint": checkpoint, "server": server, "out": out, "picture": picture}
    counts = {"rounds": ROUNDS, "steps": STEPS, "images": IMAGES}
    options = [part for name, value in {**paths, **counts}.items() for part in (f"--{name}", str(value))]
    # By its name, as Flower takes an app, for the core knows neither server nor client; and in a session of its own, so
    # that Ctrl-C reaches it once and from here.
    command = [sys.executable, "-m", "server.demonstration", *options]
    with (
        Interruption() as asked,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process,
    ):
        assert process.stdout is not None
        words = threading.Thread(target=_pass_on, args=(process.stdout,))
        words.start()
        try:
            _wait(process, asked)
        finally:
            process.kill()  # at a second signal: what it has started goes with it
            words.join()
    return process.returncode


def read_results(out: Path) -> dict[str, Any]:
    """What a federation in the folder `out` came to."""
    results: dict[str, Any] = json.loads((out / RESULTS).read_text())
    return results


def _wait(process: "subprocess.Popen[str]", asked: Interruption) -> None:
    is_told = False
    while process.poll() is None:
        if asked.signal_name and not is_told:
            process.send_signal(signal.Signals[asked.signal_name])
            is_told = True
        time.sleep(_POLL_SECONDS)


def _pass_on(lines: IO[str]) -> None:
    """Print what comes, here, where standard output may be anything."""
    for line in lines:
        print(line, end="", flush=True)
