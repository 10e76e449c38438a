"""The error that is the user's to fix, not a bug."""

from __future__ import annotations


class UsageError(ValueError):
    """Input that cannot be used: an unknown key, a missing file, parts that do not fit.

    The command line prints it as one line and exits with code 2. Every other exception is a bug, in this package or
    in a user's plug-in, and keeps its traceback.
    """

    def __init__(self, message: str = ""):
        # A loader process's error arrives with that process's traceback in front.
        marker = f"{type(self).__module__}.{type(self).__qualname__}: "
        super().__init__(message.rpartition(marker)[2].strip() if "\nOriginal Traceback" in message else message)
