"""The two kinds of failure that a user is shown in one line."""


class UserError(ValueError):
    """A mistake of the caller's. The message is one line: what is wrong, the value, and the remedy. Exit status 2."""


class RunError(RuntimeError):
    """A run that failed through nobody's mistake (a full disk, an unreachable download). Exit status 1."""


def printable(text: str) -> str:
    """Text from elsewhere (a file's name, a class's) as it may stand in one line of a terminal: the rest is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
