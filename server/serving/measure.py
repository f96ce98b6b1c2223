"""How to execute on this machine: chosen by what is there, and measured where that does not say."""

import io
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Literal

import numpy as np
from PIL import Image

from lowssl_core.errors import UserError
from server.serving.batches import Batches
from server.serving.decoding import Decoder
from server.serving.jobs import Execution, Job
from server.serving.pool import Pool
from server.serving.session import EncoderSession, Provider, available_gpus

Kind = Literal["pool", "batches"]

_SECONDS = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A kind of execution, and where the encoder runs."""

    kind: Kind
    provider: Provider

    def build(self, workers: int, decoder: Decoder) -> Execution:
        """Start its threads."""
        return Pool(workers, decoder) if self.kind == "pool" else Batches(workers, decoder)


def choose_plan(wanted: Literal["auto", "pool", "batches"], path: Path, workers: int, decoder: Decoder) -> Plan:
    """The plan that was asked for, on a GPU if batches are and there is one; for "auto" the fastest on this machine.

    Without a GPU that is the pool, and nothing is measured. With one, each plan embeds JPEGs of a usual size for a
    second, since a GPU wins or loses by the encoder's size and by how many cores there are to decode.

    Args:
        wanted: what the settings say.
        path: the encoder to measure with.
        workers: threads that decode.
        decoder: makes the inputs.
    """
    on_cpu = Plan("pool", "cpu")
    if wanted == "pool":
        return on_cpu
    gpus = [Plan("batches", provider) for provider in available_gpus()]
    if wanted == "batches":
        return fastest([*gpus, Plan("batches", "cpu")], path, workers, decoder)
    return fastest([*gpus, on_cpu], path, workers, decoder)


def fastest(plans: list[Plan], path: Path, workers: int, decoder: Decoder) -> Plan:
    """The plan that embeds most images a second; of those that cannot be used here the log says why.

    Raises:
        UserError: none can be used.
    """
    if len(plans) == 1:
        return plans[0]
    speeds: dict[Plan, float] = {}
    for plan in plans:
        try:
            speeds[plan] = measure(plan, path, workers, decoder)
        except UserError as error:
            _log.warning("%s on %s cannot be used: %s", plan.kind, plan.provider, error)
        else:
            _log.info("%s on %s: %.0f images a second", plan.kind, plan.provider, speeds[plan])
    if not speeds:
        raise UserError(f"{path}: no way to execute it works on this machine")
    return max(speeds, key=lambda plan: speeds[plan])


def measure(plan: Plan, path: Path, workers: int, decoder: Decoder, *, seconds: float = _SECONDS) -> float:
    """Images a second that a plan embeds, of JPEGs of 640 x 427 pixels, once it is warm.

    Raises:
        UserError: the encoder cannot be run that way.
    """
    session = EncoderSession(path, provider=plan.provider)
    execution = plan.build(workers, decoder)
    try:
        pictures = _pictures(8)
        _embed(execution, session, pictures * 8, seconds=60.0)  # a GPU's first batches choose algorithms
        start = time.perf_counter()
        count = _embed(execution, session, pictures * 10_000, seconds=seconds)
        return count / (time.perf_counter() - start)
    finally:
        execution.close()


def _embed(execution: Execution, session: EncoderSession, images: list[bytes], *, seconds: float) -> int:
    """How many of the images were embedded before they were all done or the time was over."""
    done = Event()
    job = Job(session, images, normalize=True, done=done.set)
    execution.submit(job)
    done.wait(seconds)
    job.cancel()
    if job.error is not None:
        raise UserError(f"running it failed: {job.error}")
    return len(job.results)


def _pictures(count: int) -> list[bytes]:
    """JPEGs of waves and noise, about as large as those of photographs."""
    rng, pictures = np.random.default_rng(0), []
    rows, columns = np.mgrid[:427, :640]
    for _ in range(count):
        waves = [np.sin(rows / a + columns / b) for a, b in rng.uniform(8, 60, (3, 2))]
        pixels = 127 + 80 * np.stack(waves, -1) + rng.normal(0, 10, (427, 640, 3))
        stream = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
        pictures.append(stream.getvalue())
    return pictures
