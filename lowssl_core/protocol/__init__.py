"""What server and devices say to each other: the order of the weights that travel, their codecs and the messages."""


class BadUpdate(ValueError):  # noqa: N818 - as BadImage: what is bad, not who erred
    """What came from the other side cannot be used; the message is one line that says why.

    The only exception that reading a message, a manifest or an encoded array raises, whatever bytes arrive.
    """
