"""How long exported encoders take for an image: one thread, a batch of one, in turns."""

import statistics
import time
from collections.abc import Sequence

from onnx import ModelProto

from lowssl_core.export.checks import GraphRunner
from lowssl_core.images import Pixels

WARM_UP = 3


def milliseconds_an_image(
    models: Sequence[ModelProto], inputs: Pixels, *, seconds: float = 3.0, least: int = 5, most: int = 200
) -> list[float]:
    """The median time of each model for one image, in milliseconds.

    The models take turns, image by image, so that whatever else the machine does meets all of them.

    Args:
        models: exported encoders with the same input.
        inputs: evaluation-style (N, S, S, 3), one or more, gone through again and again.
        seconds: about how long to measure.
        least: rounds that are made even if they take longer.
        most: rounds after which there is no more to learn.
    """
    runners = [GraphRunner(model) for model in models]
    taken: list[list[float]] = [[] for _ in models]
    for number in range(WARM_UP + most):
        image = inputs[number % len(inputs)][None]
        for times, runner in zip(taken, runners, strict=True):
            began = time.perf_counter()
            runner.run(image)
            if number >= WARM_UP:
                times.append(time.perf_counter() - began)
        if sum(map(sum, taken)) > seconds and len(taken[0]) >= least:
            break
    return [1000 * statistics.median(times) for times in taken]
