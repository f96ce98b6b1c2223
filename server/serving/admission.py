"""A bounded number of requests in flight, and when to come back for those that find no place."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.serving.errors import Overloaded

_WINDOW = 256


class Admission:
    """Counts requests in flight, in one event loop, and estimates from the images answered when there is place.

    Args:
        max_in_flight: how many places there are.
    """

    def __init__(self, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight
        self._is_closed = False
        self._answers: deque[tuple[float, int]] = deque(maxlen=_WINDOW)  # when, and how many images
        self.in_flight = 0

    @contextmanager
    def admit(self, waiting: Callable[[], int]) -> Iterator[None]:
        """Hold a place; `Overloaded` if there is none. `waiting` tells how many images wait."""
        if self._is_closed or self.in_flight >= self._max_in_flight:
            raise Overloaded(self.retry_after(waiting()))
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def count(self, images: int) -> None:
        """Take note that a request of so many images was answered."""
        self._answers.append((time.monotonic(), images))

    def retry_after(self, waiting: int) -> int:
        """Seconds, 1 to 60, until `waiting` images are worked off at the pace of the last answers."""
        if len(self._answers) < 2:
            return 1
        seconds = time.monotonic() - self._answers[0][0]
        pace = sum(images for _, images in self._answers) / max(seconds, 1e-3)
        return min(max(math.ceil(waiting / pace), 1), 60)

    def close(self) -> None:
        """Give out no more places."""
        self._is_closed = True
