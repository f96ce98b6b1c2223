"""The images of one request on their way through the workers, and what every kind of execution promises."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from lowssl_core.images import BadImage, Pixels
from server.serving.session import EncoderSession

Result = NDArray[np.float32] | BadImage
"""One image's embedding, (width,), or why it has none."""


class Job:
    """The images of one request, all embedded by one session; its methods may be called from any thread.

    Args:
        session: the lease: held by the job, so that a version lives as long as a request needs it.
        images: a file's bytes, or pixels (H, W, 3) uint8.
        normalize: whether results have length 1.
        done: called once, in a worker's thread, when every image has its result or the job failed.
    """

    def __init__(
        self, session: EncoderSession, images: Sequence[bytes | Pixels], *, normalize: bool, done: Callable[[], None]
    ) -> None:
        self.session = session
        self.error: Exception | None = None
        self._images: list[bytes | Pixels | None] = list(images)
        self._results: list[Result | None] = [None] * len(images)
        self._normalize = normalize
        self._done = done
        self._lock = Lock()
        self._next, self._left = 0, len(images)
        self._is_over = False

    @property
    def waiting(self) -> int:
        """How many images no worker has taken yet."""
        return 0 if self._is_over else len(self._images) - self._next

    @property
    def is_over(self) -> bool:
        """Whether it is answered, failed or cancelled: what is still being worked on is of no use to anyone."""
        return self._is_over

    @property
    def results(self) -> list[Result]:
        """One for each image, once the job is done without an error."""
        return [result for result in self._results if result is not None]

    def take(self) -> tuple[int, bytes | Pixels] | None:
        """The next image with its index, or None if none is left or the job is over."""
        with self._lock:
            if not self.waiting:
                return None
            index, self._next = self._next, self._next + 1
            image, self._images[index] = self._images[index], None  # a decoded image's bytes need not stay
        assert image is not None
        return index, image

    def finish(self, index: int, features: NDArray[np.float32], embedding: NDArray[np.float32]) -> None:
        """Record what the session gave for one image: two arrays (width,)."""
        chosen = embedding if self._normalize else features
        finite = bool(np.isfinite(chosen).all())
        self._record(index, chosen if finite else BadImage("the encoder's answer is not finite"))

    def refuse(self, index: int, reason: BadImage) -> None:
        """Record that one image has no embedding."""
        self._record(index, reason)

    def fail(self, error: Exception) -> None:
        """Give up the whole job: something went wrong that is not an image's fault."""
        with self._lock:
            if self._is_over:
                return
            self._is_over, self.error = True, error
        self._tell()

    def cancel(self) -> None:
        """Drop what has not started; `done` is not called any more."""
        with self._lock:
            self._is_over = True

    def _record(self, index: int, result: Result) -> None:
        with self._lock:
            if self._is_over:
                return
            self._results[index] = result
            self._left -= 1
            if self._left:
                return
            self._is_over = True
        self._tell()

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop that waited is closed
            self._done()


class Execution(ABC):
    """A way to work off jobs with threads of its own.

    An exception in a worker becomes the error of its image or its job; the worker goes on.
    """

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Take in a job of at least one image; it is told when it is done."""

    @abstractmethod
    def close(self) -> None:
        """Stop the threads, once each has finished what it is at; jobs that wait are not worked on any more."""
