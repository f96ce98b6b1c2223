"""Execution by workers that decode and one thread that embeds what is there in batches: what GPUs need."""

import time
from queue import Empty, Queue
from threading import Thread

import numpy as np

from lowssl_core.images import Pixels
from server.serving.decoding import Decoder
from server.serving.jobs import Execution, Job
from server.serving.session import MAX_BATCH, EncoderSession
from server.serving.workers import Workers

_WAIT_SECONDS = 0.003

_Item = tuple[Job, int, Pixels]


class Batches(Execution):
    """Batches of up to `MAX_BATCH` images; a batch that is not full waits 3 ms for more.

    Args:
        workers: how many threads decode.
        decoder: makes the inputs.
    """

    def __init__(self, workers: int, decoder: Decoder) -> None:
        # Bounded, so that workers do not decode far ahead of the device.
        self._inputs: Queue[_Item | None] = Queue(2 * MAX_BATCH)
        self._workers = Workers(workers, decoder, lambda *item: self._inputs.put(item))
        self._thread = Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """See `Execution`."""
        self._workers.submit(job)

    def close(self) -> None:
        """See `Execution`."""
        self._workers.close()
        self._inputs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._inputs.get()) is not None:
            groups = self._gather(first)
            for session, items in groups.items():
                _embed(session, items)
            del first, groups  # no lease on a session may last until the next image comes

    def _gather(self, first: _Item) -> dict[EncoderSession, list[_Item]]:
        """What comes in time, less what nobody waits for any more, by session: while versions change there are two."""
        items, deadline = [first], time.monotonic() + _WAIT_SECONDS
        while len(items) < MAX_BATCH:
            try:
                item = self._inputs.get(timeout=max(deadline - time.monotonic(), 0))
            except Empty:
                break
            if item is None:
                self._inputs.put(None)  # for `_run`: nothing else comes after it
                break
            items.append(item)
        groups: dict[EncoderSession, list[_Item]] = {}
        for item in items:
            if not item[0].is_over:
                groups.setdefault(item[0].session, []).append(item)
        return groups


def _embed(session: EncoderSession, items: list[_Item]) -> None:
    try:
        features, embedding = session.run(np.stack([inputs for _, _, inputs in items]))
    except Exception as error:
        for job, _, _ in items:
            job.fail(error)
        return
    for row, (job, index, _) in enumerate(items):
        # Copies: an answer must not keep the whole batch.
        job.finish(index, features[row].copy(), embedding[row].copy())
