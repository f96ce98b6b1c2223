"""The one kind of error that a user can cause and mend."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line: what was given, what is accepted.

    Commands print the message alone, without a traceback, and exit with `status`.

    Attributes:
        status: 2: a person must mend it; a kind of error that may pass by itself has 1, and is worth another try.
    """

    status = 2
