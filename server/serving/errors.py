"""Why a request cannot be answered at the moment or as asked; what is wrong with one image is a `BadImage`."""

from lowssl_core.errors import UserError
from lowssl_core.images import BadImage


class Overloaded(Exception):  # noqa: N818 - a fact of the moment, told to the client, rather than an error of the program
    """No place is free; `retry_after` is the number of whole seconds, from 1, after which one should be."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy: try again in {retry_after} s")
        self.retry_after = retry_after


class NoModel(Exception):  # noqa: N818 - see above
    """No version serves yet; the message says so."""


class UnknownVersion(UserError):  # noqa: N818 - see above
    """The version asked for does not exist, or cannot be served."""


class TimedOut(Exception):  # noqa: N818 - see above
    """The answer was not there within `ServingLimits.request_seconds`; the message says how long that is."""


class UnknownFormat(BadImage):
    """Bytes that are no JPEG, PNG or WebP."""
