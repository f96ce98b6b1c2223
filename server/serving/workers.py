"""Threads that decode images of jobs in turn and hand each input on."""

from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

from lowssl_core.images import BadImage, Pixels
from server.serving.decoding import Decoder
from server.serving.jobs import Job


class Workers:
    """Each takes one image of the job whose turn it is, so that no job waits for all images of another.

    Args:
        count: how many threads.
        decoder: makes the inputs.
        hand_on: called in the worker's thread with a job, an image's index in it and its input (size, size, 3).
    """

    def __init__(self, count: int, decoder: Decoder, hand_on: Callable[[Job, int, Pixels], None]) -> None:
        self._decoder = decoder
        self._hand_on = hand_on
        self._turns: SimpleQueue[Job | None] = SimpleQueue()
        # Daemons: a process that must end does not wait for a slow image.
        self._threads = [Thread(target=self._work, name=f"worker-{number}", daemon=True) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Give a job its first turn."""
        self._turns.put(job)

    def close(self) -> None:
        """Stop the threads, once each has finished its image."""
        for _ in self._threads:
            self._turns.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._turns.get()) is not None:
            self._take_turn(job)
            del job  # its lease on a session must not last until the next job comes

    def _take_turn(self, job: Job) -> None:
        if (taken := job.take()) is None:  # cancelled, or other workers took the rest
            return
        if job.waiting:
            self._turns.put(job)
        index, image = taken
        try:
            self._hand_on(job, index, self._decoder.make_input(image, job.session.preprocess))
        except BadImage as reason:
            job.refuse(index, reason)
        except Exception as error:
            job.fail(error)
