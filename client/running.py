"""`lowssl-client run`: the long-lived process that owns the model, trains when it may, and stays connected."""

import logging
import os
import resource
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import cv2
import torch

from client.agent import Agent
from client.arrivals import Arrivals
from client.calls import parse_url
from client.conditions import Conditions
from client.config import CapsConfig, DeviceConfig
from client.connection import Connection
from client.folder import NEWS, PAUSED, Joined
from client.identity import open_identity
from client.learner import Learner
from client.news import News
from client.node import Node
from client.tasks import TaskLearner
from client.throttle import Throttle
from lowssl_core.errors import UserError
from lowssl_core.recipe import Recipe

_LOG = logging.getLogger(__name__)
_GRACE_SECONDS = 20.0
_FILES_AT_ONCE = 256  # that a look at the folder opens at most: a task must not wait long for it


def run(images: Path, folder: Path, joined: Joined, config: DeviceConfig) -> None:
    """Work for the server until SIGTERM or SIGINT.

    The state on disk is good at every moment, so what does not end within 20 seconds is cut off.

    Args:
        images: the folder where images arrive.
        folder: the device's; the caller has locked it.
        joined: the server.
        config: the device's settings.

    Raises:
        UserError: no such folder of images, a damaged file in the device's folder, or Flower is not installed.
    """
    _log_to_stderr()
    _keep_to(config.caps)
    identity, certificate = open_identity(folder), folder / joined.certificate
    news = News(parse_url(joined.url), certificate, identity, folder / NEWS)
    conditions = config.conditions.build(folder)
    metered = Conditions([config.conditions.metered.build(Path("/"))])
    with ExitStack() as stack:
        arrivals = stack.enter_context(Arrivals(images, folder, config.images))

        def open_learner(recipe: Recipe) -> Learner:
            return Learner(recipe, config.learner, arrivals, folder)

        def look_for_images() -> None:
            arrivals.rescan(_FILES_AT_ONCE)
            if not (folder / PAUSED).exists():  # a round that is ordered for its sake would wait for it
                news.tell(arrivals.counts().new)

        cap = config.caps.bytes_per_second
        throttle = None if cap is None else stack.enter_context(Throttle(joined.address, cap))
        connection = Connection(
            lambda: Node(joined.address, identity, folder, certificate=certificate, throttle=throttle),
            metered.waiting,
        )
        agent = stack.enter_context(
            Agent(
                lambda: TaskLearner(open_learner, identity.device, folder),
                folder,
                waiting=conditions.waiting,
                at_leisure=look_for_images,
                leisure_seconds=config.rescan_seconds,
                about=lambda: {"pid": os.getpid(), "connection": connection.status(), "news": news.status()},
            )
        )
        _stop_on_signals(agent)
        arrivals.rescan(_FILES_AT_ONCE)
        stack.enter_context(connection)
        _LOG.info("device %s (%s) works for %s on %s", joined.name, identity.device, joined.url, images)
        agent.run()
        _LOG.info("stops")


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    ours = logging.getLogger("client")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)


def _keep_to(caps: CapsConfig) -> None:
    threads = caps.threads or max(1, (os.cpu_count() or 1) // 2)
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    os.nice(max(0, caps.niceness - os.nice(0)))
    if caps.memory_bytes is not None:
        _cap_memory(caps.memory_bytes)


def _cap_memory(limit: int) -> None:
    """Let the kernel hold this process, and those it starts, to so many bytes each; UserError where it cannot."""
    taken = next(
        1024 * int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData:")
    )
    if limit <= taken:
        raise UserError(f"caps.memory_bytes is {limit:,}; the agent takes {taken:,} before it has begun")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    except (ValueError, OverflowError):
        raise UserError(f"caps.memory_bytes is {limit:,}; this machine's limit is lower: ulimit -d") from None


def _stop_on_signals(agent: Agent) -> None:
    """Close the agent when told to stop, in a thread of its own: the signal may come while the agent is locked."""

    def stop(number: int, frame: object) -> None:
        for heard in (signal.SIGTERM, signal.SIGINT):
            signal.signal(heard, signal.SIG_DFL)
        _LOG.info("told to stop")
        threading.Thread(target=agent.close, daemon=True).start()
        cut = threading.Timer(_GRACE_SECONDS, os._exit, [128 + number])
        cut.daemon = True
        cut.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
