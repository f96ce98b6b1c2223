"""Execution by workers that each decode and embed one image at a time: what is fastest on CPUs."""

from lowssl_core.images import Pixels
from server.serving.decoding import Decoder
from server.serving.jobs import Execution, Job
from server.serving.workers import Workers


class Pool(Execution):
    """One thread for each core, all with one session that has no threads of its own: nothing is waited for or shared.

    Args:
        workers: how many threads; the number of cores is best.
        decoder: makes the inputs.
    """

    def __init__(self, workers: int, decoder: Decoder) -> None:
        self._workers = Workers(workers, decoder, _embed)

    def submit(self, job: Job) -> None:
        """See `Execution`."""
        self._workers.submit(job)

    def close(self) -> None:
        """See `Execution`."""
        self._workers.close()


def _embed(job: Job, index: int, inputs: Pixels) -> None:
    features, embedding = job.session.run(inputs[None])
    job.finish(index, features[0], embedding[0])
