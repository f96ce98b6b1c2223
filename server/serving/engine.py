"""The engine behind `/embed`: admission, execution, and swapping versions without a failed or mixed answer."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowssl_core.errors import UserError
from lowssl_core.export.description import Description
from lowssl_core.images import Pixels
from server.serving.admission import Admission
from server.serving.cores import count_cores
from server.serving.decoding import Decoder
from server.serving.errors import TimedOut
from server.serving.jobs import Execution, Job, Result
from server.serving.limits import ServingLimits
from server.serving.measure import Kind, Plan, choose_plan
from server.serving.models import Loaded, LoadedModels, Models
from server.serving.session import EncoderSession

ExecutionName = Literal["auto", "pool", "batches"]

_KEPT = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embedded:
    """The answer to one request: every result is from the one version that it names, in the order of the images."""

    version: str
    description: Description
    results: list[Result]


@dataclass(frozen=True, kw_only=True)
class Status:
    """What the engine is doing.

    Attributes:
        version: the one that serves, None if none does.
        description: of that version.
        loaded: versions in memory, the serving one first.
        execution: "pool" or "batches", None until a first version is loaded.
        workers: threads that decode.
        in_flight: requests admitted and not yet answered.
        waiting: images that no worker has taken yet.
        problem: why the version that should serve could not be loaded the last time, None if all is well.
    """

    version: str | None
    description: Description | None
    loaded: tuple[str, ...]
    execution: Kind | None
    workers: int
    in_flight: int
    waiting: int
    problem: str | None


class Engine:
    """Embeds images with the version that serves; one in a process, used from one event loop.

    Args:
        models: where versions come from.
        limits: of a request and of all.
        workers: threads that decode; None for as many as the process has cores.
        execution: "pool", "batches", or "auto" for what is faster here.
        poll_seconds: how often to look whether another version serves.
    """

    def __init__(
        self,
        models: Models,
        limits: ServingLimits | None = None,
        *,
        workers: int | None = None,
        execution: ExecutionName = "auto",
        poll_seconds: float = 2.0,
    ) -> None:
        self._limits = limits or ServingLimits()
        self._workers = count_cores() if workers is None else workers
        self._wanted = execution
        self._decoder = Decoder(self._limits)
        self._poll_seconds = poll_seconds
        self._models = LoadedModels(models, self._load, keep=_KEPT)
        self._admission = Admission(self._limits.max_in_flight)
        self._plan: Plan | None = None
        self._execution: Execution | None = None
        self._jobs: set[Job] = set()
        self._poll: asyncio.Task[None] | None = None
        self._problem: str | None = None

    async def start(self) -> None:
        """Load the version that serves, if there is one, and go on looking for another.

        A version that cannot be loaded is logged and stands in `status`; the engine starts all the same.
        """
        await self._look()
        self._poll = asyncio.create_task(self._keep_looking())

    async def close(self) -> None:
        """Admit no more, let what is in flight be answered (for `request_seconds` at most), and stop."""
        self._admission.close()
        if self._poll is not None:
            self._poll.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.request_seconds):
                while self._admission.in_flight or self._jobs:
                    await asyncio.sleep(0.01)
        if self._execution is not None:
            await asyncio.to_thread(self._execution.close)
        self._models.close()

    def admit(self) -> AbstractContextManager[None]:
        """A place among the requests in flight, for a with-block from before the body is read until the answer.

        Raises:
            Overloaded: no place is free, or the engine is closing.
        """
        return self._admission.admit(self._waiting)

    async def embed(
        self, images: Sequence[bytes | Pixels], *, version: str | None = None, normalize: bool = True
    ) -> Embedded:
        """Embed files' bytes or (H, W, 3) uint8 pixels; what cannot be used gets a `BadImage` in its place.

        Cancelling the call drops what has not started.

        Args:
            images: of one request.
            version: None for the one that serves.
            normalize: embeddings of length 1, or the encoder's features as they are.

        Raises:
            NoModel: no version serves yet.
            UnknownVersion: there is none of that name.
            TimedOut: `request_seconds` are over.
        """
        deadline = asyncio.get_running_loop().time() + self._limits.request_seconds
        lease = await self._find(version, deadline) if version is not None else self._models.lease_serving()
        results = await self._solve(lease, images, normalize, deadline) if images else []
        return Embedded(lease.version, lease.session.description, results)

    async def refresh(self) -> None:
        """Look now whether another version serves, and swap to it.

        Raises:
            UserError: it cannot be loaded; the one before goes on serving.
        """
        if await self._models.refresh():
            serving = self._models.serving
            _log.info("serving version %s", serving.version if serving else "none")
        self._problem = None

    @property
    def status(self) -> Status:
        """What the engine is doing now."""
        serving = self._models.serving
        return Status(
            version=serving.version if serving else None,
            description=serving.session.description if serving else None,
            loaded=self._models.versions,
            execution=self._plan.kind if self._plan else None,
            workers=self._workers,
            in_flight=self._admission.in_flight,
            waiting=self._waiting(),
            problem=self._problem,
        )

    def _waiting(self) -> int:
        """How many images no worker has taken yet."""
        return sum(job.waiting for job in self._jobs)

    async def _find(self, version: str, deadline: float) -> Loaded:
        try:
            async with asyncio.timeout_at(deadline) as timeout:
                return await self._models.lease(version)
        except TimeoutError:
            if not timeout.expired():
                raise  # a registry's own
            raise self._timed_out() from None

    async def _solve(
        self, lease: Loaded, images: Sequence[bytes | Pixels], normalize: bool, deadline: float
    ) -> list[Result]:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[None] = loop.create_future()

        def tell() -> None:  # called by a worker
            loop.call_soon_threadsafe(settle, None)

        def settle(error: Exception | None) -> None:
            if answered.done():
                return
            if error is None:
                answered.set_result(None)
            else:
                answered.set_exception(error)

        job = Job(lease.session, images, normalize=normalize, done=tell)
        # A timer of its own costs a fifth of asyncio.timeout, which counts at some hundred requests a second.
        timer = loop.call_at(deadline, lambda: settle(self._timed_out()))
        assert self._execution is not None
        self._jobs.add(job)
        try:
            self._execution.submit(job)
            await answered
        finally:
            timer.cancel()
            job.cancel()
            self._jobs.discard(job)
        if job.error is not None:
            raise job.error
        self._admission.count(len(images))
        return job.results

    def _timed_out(self) -> TimedOut:
        return TimedOut(f"no answer within {self._limits.request_seconds:g} s")

    async def _look(self) -> None:
        try:
            await self.refresh()
        except Exception as error:  # a registry out of reach must not stop what serves
            problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            if problem != self._problem:
                _log.error("the version that should serve cannot be loaded: %s", problem)
            self._problem = problem

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            await self._look()

    def _load(self, path: Path) -> EncoderSession:
        """Called in the thread that loads; the first version decides how to execute."""
        session = EncoderSession(path)
        if self._plan is None:
            self._plan = choose_plan(self._wanted, path, self._workers, self._decoder)
            self._execution = self._plan.build(self._workers, self._decoder)
            _log.info("executing by %s on %s with %d workers", self._plan.kind, self._plan.provider, self._workers)
        return session if self._plan.provider == "cpu" else EncoderSession(path, provider=self._plan.provider)
