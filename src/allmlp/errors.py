"""The exceptions that the command line reports in one line, each with its exit status."""


class UserError(ValueError):
    """A mistake in the input. The message is one line: what is wrong, the value, and the remedy. Exit status 2."""

    status = 2


class RunError(RuntimeError):
    """A failure that the user's input did not cause (a full disk, an unreachable server). Exit status 1."""

    status = 1


class Stopped(Exception):
    """A signal stopped a run, which can be resumed. Exit status 143 (SIGTERM) or 130 (SIGINT)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def printable(text: str) -> str:
    """Escapes control and other unprintable characters of outside text (a file or class name) to fit in one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
