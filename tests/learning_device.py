"""A device whose agent is started and killed many times, run as a program: PyTorch is loaded once, agents are forks."""

import os
import re
import resource
import signal
import sys
from pathlib import Path

import torch

from client.agent import Agent
from client.arrivals import Arrivals, ArrivalsConfig
from client.learner import Learner
from client.learner_config import LearnerConfig
from client.memory import MemoryConfig
from client.rounds import Budget
from client.tasks import TaskLearner

CONFIG = LearnerConfig(
    budget=Budget(new_images=12, steps=8),
    memory=MemoryConfig(max_bytes=1_000_000),
    save_every_steps=2,
    steps_per_epoch=4,
    refresh_images=10,
)


def run_agent(folder: Path, spare: int | None) -> None:
    """The real agent on the real learner, with so many bytes to spare."""
    torch.set_num_threads(1)
    if spare is not None:
        used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + spare, resource.RLIM_INFINITY))
    arrivals = Arrivals(folder / "images", folder, ArrivalsConfig(settle_seconds=0))

    def open_tasks() -> TaskLearner:
        return TaskLearner(lambda recipe: Learner(recipe, CONFIG, arrivals, folder), "device", folder)

    with Agent(open_tasks, folder) as agent:
        agent.run()


def main() -> None:
    """For each folder (and bytes to spare) on stdin fork an agent, and print its process id; all end with this one."""
    running: set[int] = set()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                folder, _, spare = line.strip().partition(" ")
                run_agent(Path(folder), int(spare) if spare else None)
            finally:
                os._exit(1)
        running.add(pid)
        print(pid, flush=True)
    for pid in running:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main()
