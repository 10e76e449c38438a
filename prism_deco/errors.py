"""The error for mistakes of the user, as opposed to bugs."""

from __future__ import annotations


class UsageError(ValueError):
    """Invalid input: an unknown key, a missing file, parts that do not fit together.

    The command line prints it as one line and exits with code 2. Every other exception is a bug in this package or in a
    plug-in, and keeps its traceback.
    """

    def __init__(self, message: str = ""):
        # A DataLoader raises a worker's error again with the worker's traceback in front of the message.
        marker = f"{type(self).__module__}.{type(self).__qualname__}: "
        super().__init__(message.rpartition(marker)[2].strip() if "\nOriginal Traceback" in message else message)
