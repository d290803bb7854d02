"""The ends of a program that a user is shown in one line."""


class UserError(ValueError):
    """A mistake of the caller's. The message is one line: what is wrong, the value, and the remedy. Exit status 2."""

    status = 2


class RunError(RuntimeError):
    """A run that failed through nobody's mistake (a full disk, an unreachable download). Exit status 1."""

    status = 1


class Stopped(Exception):
    """A run that a signal ended, and that can be gone on with. Exit status 143 (SIGTERM) or 130 (SIGINT)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def printable(text: str) -> str:
    """Text from elsewhere (a file's name, a class's) as it may stand in one line of a terminal: the rest is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
